"""Pictures of a sweep: the training loss of each arm with a band over its seeds, and the load of experts of a run.

The bytes of a PNG depend on the numbers alone, so that a report made again is the same file.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's, which colour-blind readers can tell apart."""
LINES = ("-", "--", "-.", ":")


def draw_curves(curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]]) -> bytes:
    """A PNG with the mean training loss of each arm, and a band from its lowest to its highest seed.

    Args:
      curves: arm -> the curve of each seed, as (step, loss).
    """
    figure = Figure(figsize=(8.0, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for number, (arm, found) in enumerate(curves.items()):
        steps, losses_SN = aligned(found)
        if not len(steps):
            continue
        colour, line = COLOURS[number % len(COLOURS)], LINES[number // len(COLOURS) % len(LINES)]
        smooth_SN = smoothed(losses_SN, max(1, len(steps) // 20))
        axis.plot(steps, smooth_SN.mean(axis=0), line, color=colour, label=arm, linewidth=1.6)
        if len(found) > 1:
            axis.fill_between(
                steps, smooth_SN.min(axis=0), smooth_SN.max(axis=0), color=colour, alpha=0.15, linewidth=0
            )
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("training loss, nats per token")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return png(figure)


def aligned(curves: Sequence[Sequence[tuple[int, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """(steps that all seeds have [N], losses [S, N])."""
    by_step = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(curve) for curve in by_step))) if by_step else []
    return np.asarray(steps), np.asarray([[curve[step] for step in steps] for curve in by_step])


def smoothed(losses_SN: np.ndarray, span: int) -> np.ndarray:
    """The mean of each value and the `span` - 1 before it, or those that exist."""
    sums_SN = np.cumsum(losses_SN, axis=1)
    places_N = np.arange(losses_SN.shape[1])
    before_SN = np.where(places_N >= span, sums_SN[:, places_N - span], 0.0)
    return (sums_SN - before_SN) / np.minimum(places_N + 1, span)


def draw_load(lines: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Writes a PNG: the share of each expert by layer and language, or else the busiest expert's share over time."""
    loads = load_by_language(lines)
    figure = Figure(figsize=(3.2 * max(1, len(loads)) + 1.2, 4.0), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(loads)), squeeze=False)[0]
    shown = None
    if loads:
        most = max(load_LE.max() for load_LE in loads.values())
        for axis, (name, load_LE) in zip(axes, loads.items(), strict=True):
            shown = axis.imshow(load_LE, aspect="auto", vmin=0.0, vmax=most, cmap="viridis")
            axis.set_title(f"{name}: share of tokens", fontsize=9)
            axis.set_xlabel("expert")
    else:
        (axis,) = axes
        share_LS = np.asarray([line["load_max_share"] for line in lines]).T
        ends = (lines[0]["step"] - 0.5, lines[-1]["step"] + 0.5, len(share_LS) - 0.5, -0.5)
        shown = axis.imshow(share_LS, aspect="auto", extent=ends, cmap="viridis")
        axis.set_title("share of the busiest expert", fontsize=9)
        axis.set_xlabel("optimiser step")
    axes[0].set_ylabel("layer")
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
    if shown is not None:
        figure.colorbar(shown, ax=axes[-1])
    path.write_bytes(png(figure))
    return path


def load_by_language(lines: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Share of each expert [L, E] by language, over the tokens of the last quarter of the steps."""
    found: dict[str, np.ndarray] = {}
    for name, group in lines[-1].get("by_language", {}).items():
        if "load" not in group:
            continue
        last = [line["by_language"][name] for line in lines[-max(1, len(lines) // 4) :]]
        tokens = sum(one["tokens"] for one in last)
        if tokens:
            found[name] = np.sum([one["tokens"] * np.asarray(one["load"]) for one in last], axis=0) / tokens
    return found


def png(figure: Figure) -> bytes:
    held = BytesIO()
    figure.savefig(held, format="png", metadata={"Software": None})
    return held.getvalue()
