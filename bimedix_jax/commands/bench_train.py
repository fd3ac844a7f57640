"""`bimedix bench train`: how fast training steps are, against transformers + peft and the machine's limit."""

import dataclasses
from typing import Any, Literal

from rich.console import Console

from bimedix_jax.errors import BimedixError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the speed of optimiser steps of a small Mixtral with adapters on this machine.

    The model has width 512, expert width 1,792, 4 layers, 8 experts, top-2, a vocabulary of 32,000 and random weights,
    with adapters of rank 16 on q, k, v, the experts and the router. The time of the step's matrix products alone is
    measured alternately in the same run. With --against, so is the same step in transformers + peft, with the fastest
    of its data types and expert implementations.
    """

    against: Literal["transformers"] | None = None
    """Library to compare with; it needs torch, transformers and peft. By default none."""
    base: Literal["bfloat16", "float32", "nf4"] = "nf4"
    """Storage of the base weights in this project's steps."""
    remat: Literal["none", "experts", "layer"] = "none"
    """What the backward pass of this project recomputes."""
    batch: int = 2
    """Rows of a step."""
    length: int = 512
    """Tokens of a row."""
    repetitions: int = 9
    """Repetitions; the result is their median."""
    size: Literal["small", "full_width", "smoke"] = "small"
    """Model: the one above (small), two layers of Mixtral-8x7B for accelerators (full_width), a tiny one (smoke)."""
    router: str | None = None
    """Router variant of this project's model (topk, softmax_topk, sigmoid_bias); by default topk, the router of
    transformers."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Measures the row `train`."""
    from bimedix_jax.bench import model, report, whole

    if min(config.batch, config.repetitions) < 1 or config.length < 2:
        raise BimedixError("--batch and --repetitions must be at least 1, and --length at least 2; correct them")
    architecture = model.with_variant(model.SIZES[config.size], config.router)
    report.check(architecture, config.length)
    versions = report.versions(config.against is not None)
    options = whole.Options(config=architecture, against=config.against is not None, repetitions=config.repetitions)
    rows = [whole.training_row(options, config.base, config.remat, config.batch, config.length)]
    console.print(report.table(rows))
    return versions | {"batch": config.batch, "length": config.length, "size": config.size, "rows": rows}
