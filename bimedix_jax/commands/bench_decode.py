"""`bimedix bench decode`: how fast prompts and greedy decoding are, against transformers and the machine's limit."""

import dataclasses
from typing import Any, Literal

from rich.console import Console

from bimedix_jax import startup
from bimedix_jax.errors import BimedixError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Time prefill and greedy decoding of a small Mixtral on this machine.

    The model: width 512, expert width 1,792, 4 layers, 8 experts, top-2, vocabulary 32,000, random weights. Beside
    each row, in the same run and taking turns, the machine's limit: for the prefill its matrix products alone, for
    decoding one reading of the weights that a step uses. With --against also transformers, in the fastest of its data
    types and ways to run experts.
    """

    against: Literal["transformers"] | None = None
    """Peer to measure as well; needs torch, transformers and peft."""
    base: Literal["bfloat16", "float32", "nf4"] | None = None
    """Storage of our weights; None takes the fastest in a short trial for each row, as it does for the peer."""
    batch: int = 2
    """Rows of the prefill."""
    length: int = 512
    """Tokens of a row of the prefill."""
    decode_batches: tuple[int, ...] = (1, 8)
    """Rows decoded at once, a result for each."""
    prompt: int = 128
    """Tokens before the decoded ones."""
    steps: int = 24
    """Tokens decoded in each repetition; the cache keeps growing."""
    repetitions: int = 9
    """Repetitions whose median counts."""
    size: Literal["small", "full_width", "smoke"] = "small"
    """The model: the one above; four layers of Mixtral-8x7B, for accelerators; or a tiny one, to see that all runs."""
    router: str | None = None
    """Router variant of our side (topk, softmax_topk, sigmoid_bias); the peer has topk."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Rows `prefill` and `decode_b<rows>`."""
    from bimedix_jax.bench import model, report, whole

    sizes = (config.batch, config.length, config.prompt, config.steps, config.repetitions, *config.decode_batches)
    if min(sizes) < 1:
        raise BimedixError("All sizes and --repetitions are at least 1.")
    startup.reuse_memory()  # for both sides
    architecture = model.with_variant(model.SIZES[config.size], config.router)
    report.check(architecture, max(config.length, config.prompt + config.steps * (config.repetitions + 7) + 1))
    versions = report.versions(config.against is not None)
    options = whole.Options(architecture, config.against is not None, config.repetitions)
    rows = [whole.prefill_row(options, config.base, config.batch, config.length)]
    rows += [
        whole.decoding_row(options, config.base, batch, config.prompt, config.steps) for batch in config.decode_batches
    ]
    console.print(report.table(rows))
    shape = {"batch": config.batch, "length": config.length, "prompt": config.prompt, "steps": config.steps}
    return versions | shape | {"size": config.size, "rows": rows}
