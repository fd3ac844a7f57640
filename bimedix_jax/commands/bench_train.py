"""`bimedix bench train`: how fast whole training steps are, against transformers + peft and the machine's limit."""

import dataclasses
from typing import Any, Literal

from rich.console import Console

from bimedix_jax import startup
from bimedix_jax.errors import BimedixError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Time whole optimiser steps of a small Mixtral with adapters on this machine.

    The model: width 512, expert width 1,792, 4 layers, 8 experts, top-2, vocabulary 32,000, random weights; adapters
    of rank 16 on q, k, v, the experts and the router. Beside it, in the same run and taking turns, the time of the
    step's matrix products alone, and with --against the same step in transformers + peft, in the fastest of its data
    types and ways to run experts.
    """

    against: Literal["transformers"] | None = None
    """Peer to measure as well; needs torch, transformers and peft."""
    base: Literal["bfloat16", "float32", "nf4"] = "nf4"
    """Storage of our base weights."""
    remat: Literal["none", "experts", "layer"] = "none"
    """What our backward pass recomputes."""
    batch: int = 2
    """Rows of a step."""
    length: int = 512
    """Tokens of a row."""
    repetitions: int = 9
    """Repetitions whose median counts."""
    size: Literal["small", "full_width", "smoke"] = "small"
    """The model: the one above; four layers of Mixtral-8x7B, for accelerators; or a tiny one, to see that all runs."""
    router: str | None = None
    """Router variant of our side (topk, softmax_topk, sigmoid_bias); the peer has topk."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """One row, `train`."""
    from bimedix_jax.bench import model, report, whole

    if min(config.batch, config.repetitions) < 1 or config.length < 2:
        raise BimedixError("--batch and --repetitions are at least 1, --length at least 2.")
    startup.reuse_memory()  # for both sides
    architecture = model.with_variant(model.SIZES[config.size], config.router)
    report.check(architecture, config.length)
    versions = report.versions(config.against is not None)
    options = whole.Options(architecture, config.against is not None, config.repetitions)
    rows = [whole.training_row(options, config.base, config.remat, config.batch, config.length)]
    console.print(report.table(rows))
    return versions | {"batch": config.batch, "length": config.length, "size": config.size, "rows": rows}
