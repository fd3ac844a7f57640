"""A plot of speed by number of tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

LINES = {
    "dense_gflops": ("one dense product", "black", "--"),
    "ours_gflops": ("ours, 16-bit weights", "tab:blue", "-"),
    "ours_skewed_gflops": ("ours, one expert takes half", "tab:blue", ":"),
    "nf4_gflops": ("ours, NF4 weights", "tab:green", "-"),
    "ragged_dot_gflops": ("lax.ragged_dot", "tab:red", "-"),
}


def draw_speeds(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Writes a PNG of useful GFLOP/s by tokens, from rows of `bench.moe.measure`."""
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    tokens = [row["tokens"] for row in rows]
    for name, (label, colour, style) in LINES.items():
        axis.plot(tokens, [row[name] for row in rows], style, color=colour, marker="o", markersize=3, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens")
    axis.set_ylabel("useful GFLOP/s")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png")
    return target
