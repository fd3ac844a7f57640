"""`bimedix bench moe`: how fast the experts' matrix products are, against a dense one and JAX's ragged_dot."""

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from bimedix_jax.errors import BimedixError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the speed of the grouped matrix product of a mixture of experts on this machine, in bfloat16.

    These are measured alternately in one process: a dense product with the same useful FLOPs, this project's product on
    balanced and on skewed groups (one expert gets half of the tokens) with 16-bit and with NF4 weights, lax.ragged_dot,
    and dequantisation.
    """

    tokens: tuple[int, ...] = (2048,)
    """Numbers of tokens, one row of the table for each. The project's speed goals are for the default."""
    width: int = 1024
    """Width D of the tokens."""
    hidden: int = 3584
    """Width F of an expert."""
    experts: int = 8
    """Number of experts."""
    top_k: int = 2
    """Experts that each token uses."""
    repetitions: int = 9
    """Repetitions; the result is their median."""
    feed_forward: bool = False
    """Measure the whole feed-forward layer on NF4 weights instead, from dispatch to combine: as one operation, and as
    separate operations."""
    rank: int = 16
    """Rank of the adapters with --feed-forward."""
    plot: Path | None = None
    """PNG file to write with a plot of GFLOP/s by tokens; by default none."""


PRODUCTS = ("dense_gflops", "ours_gflops", "ours_skewed_gflops", "nf4_gflops", "ragged_dot_gflops", "dequant_gelems")
FEED_FORWARDS = tuple(
    f"{step}_{backend}_ms"
    for step in ("forward", "forward_adapters", "training")
    for backend in ("avx512", "xla", "composed")
)


def check(config: Config) -> None:
    sizes = (*config.tokens, config.width, config.hidden, config.experts, config.top_k, config.repetitions, config.rank)
    if min(sizes, default=0) < 1 or config.top_k > config.experts or config.experts < 2 or config.width % 64:
        raise BimedixError(
            "sizes must be positive, --top-k at most --experts, and --width a multiple of 64; correct them"
        )
    if config.feed_forward and (config.hidden % 64 or config.plot is not None):
        raise BimedixError("--feed-forward needs --hidden to be a multiple of 64 and has no --plot; correct them")


def run(config: Config, console: Console) -> dict[str, Any]:
    """Measures one row for each number of tokens."""
    import jax
    from tqdm import tqdm

    from bimedix_jax.bench.moe import Size, measure, measure_feed_forward
    from bimedix_jax.files import check_file
    from bimedix_jax.process.terminal import FittedTable

    check(config)
    if config.plot is not None:
        check_file(config.plot, overwrite=True, is_ours=lambda _: True)
    rows = []
    for tokens in tqdm(config.tokens, desc="sizes", delay=2.0, disable=None):
        size = Size(
            tokens=tokens,
            width=config.width,
            hidden=config.hidden,
            experts=config.experts,
            top_k=config.top_k,
        )
        if config.feed_forward:
            rows.append(measure_feed_forward(size, config.rank, config.repetitions))
        else:
            rows.append(measure(size, config.repetitions))
    shown, title = (FEED_FORWARDS, "ms") if config.feed_forward else (PRODUCTS, "useful GFLOP/s; G elements/s")
    table = FittedTable("tokens", title=title)
    for name in shown:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(f"{row['tokens']:,}", *("-" if row[name] is None else f"{row[name]:.1f}" for name in shown))
    console.print(table)
    if config.plot is not None:
        from bimedix_jax.bench.picture import draw_speeds

        draw_speeds(rows, config.plot)
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}
