"""`bimedix bench moe`: how fast the experts' matrix products are, against a dense one and JAX's ragged_dot."""

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from bimedix_jax.errors import BimedixError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Time the grouped matrix product of a mixture of experts on this machine, in bfloat16, one row a size.

    Everything is measured in one process, taking turns: one dense product with the same useful FLOPs, ours on balanced
    and on skewed groups (one expert takes half), with 16-bit and with NF4 weights, lax.ragged_dot, and dequantisation.
    """

    tokens: tuple[int, ...] = (2048,)
    """Tokens of a row of the table; the default is the size that the project's targets are stated for."""
    width: int = 1024
    """Width D of the tokens."""
    hidden: int = 3584
    """Width F of an expert."""
    experts: int = 8
    """Experts that share the rows."""
    top_k: int = 2
    """Experts that each token uses."""
    repetitions: int = 9
    """Repetitions whose median counts."""
    feed_forward: bool = False
    """Time the whole feed-forward on NF4 weights instead (dispatch to combine), as one operation and as its parts."""
    rank: int = 16
    """Rank of the adapters of the feed-forward."""
    plot: Path | None = None
    """PNG of GFLOP/s by tokens."""


PRODUCTS = ("dense_gflops", "ours_gflops", "ours_skewed_gflops", "nf4_gflops", "ragged_dot_gflops", "dequant_gelems")
FEED_FORWARDS = tuple(
    f"{step}_{shown}" for step in ("forward", "forward_adapters", "training") for shown in ("xla_ms", "composed_ms")
)


def check(config: Config) -> None:
    sizes = (*config.tokens, config.width, config.hidden, config.experts, config.top_k, config.repetitions, config.rank)
    if min(sizes, default=0) < 1 or config.top_k > config.experts or config.experts < 2 or config.width % 64:
        raise BimedixError("All sizes are positive, --top-k is at most --experts, --width is a multiple of 64.")
    if config.feed_forward and (config.hidden % 64 or config.plot is not None):
        raise BimedixError("With --feed-forward, --hidden is a multiple of 64 and there is no --plot.")


def run(config: Config, console: Console) -> dict[str, Any]:
    """The rows as a document."""
    import jax
    from rich.table import Table
    from tqdm import tqdm

    from bimedix_jax.bench.moe import Size, measure, measure_feed_forward

    check(config)
    rows = []
    for tokens in tqdm(config.tokens, desc="sizes", delay=2.0, disable=None):
        size = Size(tokens, config.width, config.hidden, config.experts, config.top_k)
        if config.feed_forward:
            rows.append(measure_feed_forward(size, config.rank, config.repetitions))
        else:
            rows.append(measure(size, config.repetitions))
    shown, title = (FEED_FORWARDS, "ms") if config.feed_forward else (PRODUCTS, "useful GFLOP/s; G elements/s")
    table = Table("tokens", *(name.replace("_", " ") for name in shown), title=title)
    for row in rows:
        table.add_row(f"{row['tokens']:,}", *(f"{row[name]:.1f}" for name in shown))
    console.print(table)
    if config.plot is not None:
        from bimedix_jax.bench.picture import draw_speeds

        draw_speeds(rows, config.plot)
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}
