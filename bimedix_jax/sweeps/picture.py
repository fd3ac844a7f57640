"""Pictures of a sweep: the effect of each arm with its interval, and the training loss with a band over its seeds.

The bytes of a PNG depend on the numbers alone, so that a report made again is the same file.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bimedix_jax.training.picture import png

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's, which colour-blind readers can tell apart."""
LINES = ("-", "--", "-.", ":")
"""In print without colours, neighbours differ by these."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X")


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
        colour, line = COLOURS[number % len(COLOURS)], LINES[number % len(LINES)]
        smooth_SN = smoothed(losses_SN, max(1, len(steps) // 20))
        axis.plot(steps, smooth_SN.mean(axis=0), line, color=colour, label=arm, linewidth=1.6)
        if len(found) > 1:
            axis.fill_between(
                steps, smooth_SN.min(axis=0), smooth_SN.max(axis=0), color=colour, alpha=0.15, linewidth=0
            )
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("training loss, nats per token")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return png(figure)


def draw_effects(
    groups: Mapping[str, Mapping[str, tuple[float, float | None, float | None]]], arms: Sequence[str], label: str
) -> bytes:
    """A PNG with the difference of each arm to the baseline and its interval, by group of records.

    Args:
      groups: group -> arm -> (mean, low, high); an arm may be missing, and low and high are None with one seed.
      label: of the axis of differences.
    """
    figure = Figure(figsize=(8.0, 1.2 + 0.28 * len(arms) * len(groups)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for number, arm in enumerate(arms):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        shown = [(row, *found[arm]) for row, found in enumerate(groups.values()) if arm in found]
        places = [row + (number + 1) / (len(arms) + 1) - 0.5 for row, *_ in shown]
        for place, (_, _, low, high) in zip(places, shown, strict=True):
            if low is not None and high is not None:
                axis.plot([low, high], [place, place], color=colour, linewidth=1.6)
        axis.plot([mean for _, mean, *_ in shown], places, marker, color=colour, label=arm, markersize=6)
    axis.axvline(0, color="#555555", linewidth=0.8)
    for row in range(1, len(groups)):
        axis.axhline(row - 0.5, color="#dddddd", linewidth=0.8)
    axis.set_yticks(range(len(groups)), list(groups))
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.set_xlabel(label)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
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
