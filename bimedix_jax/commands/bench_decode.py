"""`bimedix bench decode`: how fast prompts and greedy decoding are, against transformers and the machine's limit."""

import dataclasses
from typing import Any, Literal

from rich.console import Console

from bimedix_jax.errors import BimedixError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the speed of prefill and greedy decoding of a small Mixtral on this machine.

    The model has width 512, expert width 1,792, 4 layers, 8 experts, top-2, a vocabulary of 32,000 and random weights.
    Each result also has the machine's limit, measured alternately in the same run. For prefill it is the time of the
    matrix products alone, and for decoding the time to read the weights of a step once. With --against, transformers is
    measured too, with the fastest of its data types and expert implementations.
    """

    against: Literal["transformers"] | None = None
    """Library to compare with; it needs torch, transformers and peft. By default none."""
    base: Literal["bfloat16", "float32", "nf4"] | None = None
    """Storage of the weights of this project's model; by default the fastest in a short trial for each result."""
    batch: int = 2
    """Rows of the prefill."""
    length: int = 512
    """Tokens of a row of the prefill."""
    decode_batches: tuple[int, ...] = (1, 8)
    """Batch sizes of decoding; each gives one result."""
    prompt_tokens: int = 128
    """Tokens of the prompt that is decoded from."""
    steps: int = 24
    """Tokens decoded in each repetition; the cache keeps growing."""
    repetitions: int = 9
    """Repetitions; the result is their median."""
    size: Literal["small", "full_width", "smoke"] = "small"
    """Model: the one above (small), two layers of Mixtral-8x7B for accelerators (full_width), a tiny one (smoke)."""
    router: str | None = None
    """Router variant of this project's model (topk, softmax_topk, sigmoid_bias); by default topk, the router of
    transformers."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Measures the rows `prefill` and `decode_b<batch size>`."""
    from bimedix_jax.bench import model, report, whole

    sizes = (
        config.batch,
        config.length,
        config.prompt_tokens,
        config.steps,
        config.repetitions,
        *config.decode_batches,
    )
    if min(sizes) < 1 or not config.decode_batches:
        raise BimedixError(
            "--batch, --length, --prompt-tokens, --steps, --repetitions and each of --decode-batches must be at least "
            "1; correct them"
        )
    architecture = model.with_variant(model.SIZES[config.size], config.router)
    prompt, steps = config.prompt_tokens, config.steps
    report.check(architecture, max(config.length, prompt + steps * (config.repetitions + 7) + 1))
    versions = report.versions(config.against is not None)
    options = whole.Options(config=architecture, against=config.against is not None, repetitions=config.repetitions)
    rows = [whole.prefill_row(options, config.base, config.batch, config.length)]
    rows += [whole.decoding_row(options, config.base, batch, prompt, steps) for batch in config.decode_batches]
    console.print(report.table(rows))
    shape = {"batch": config.batch, "length": config.length, "prompt": prompt, "steps": steps}
    return versions | shape | {"size": config.size, "rows": rows}
