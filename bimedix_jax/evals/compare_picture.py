"""The figure of a comparison: differences by task with their intervals, and how well each model is calibrated.

The bytes of the PNG depend on the numbers alone.
"""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bimedix_jax.evals.compare_page import means

COLOURS = {"a": "#0072B2", "b": "#D55E00"}
"""Of Okabe and Ito, which colour-blind readers can tell apart."""


def draw(found: Mapping[str, Any]) -> bytes:
    """A PNG. The calibration is that of the protocol with most questions."""
    rows = list(found["tasks"])
    rows += [{**average, "name": name} for name, average in means(found)]
    figure = Figure(figsize=(10.0, max(3.6, 1.2 + 0.32 * len(rows))), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _differences(left, rows)
    _reliability(right, found)
    held = BytesIO()
    figure.savefig(held, format="png", metadata={"Software": None})
    return held.getvalue()


def _differences(axis: Any, rows: list[Mapping[str, Any]]) -> None:
    for place, row in enumerate(rows):
        low, middle, high = (100 * row[name] for name in ("low", "difference", "high"))
        axis.plot([low, high], [place, place], color="#000000", linewidth=1.4)
        axis.plot([middle], [place], "o", color="#000000", markersize=4)
        smallest = row.get("detectable")
        if smallest is not None:
            axis.plot([-100 * smallest, 100 * smallest], [place, place], "|", color="#999999", markersize=9)
    axis.axvline(0, color="#999999", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("B - A, percentage points, 95 % interval (grey: smallest detectable)")
    axis.spines[["top", "right"]].set_visible(False)


def _reliability(axis: Any, found: Mapping[str, Any]) -> None:
    axis.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
    for side, colour in COLOURS.items():
        known = found["calibration"][side]
        if known is None:
            continue
        bins = known["bins"]
        label = f"{side.upper()}: error {100 * known['ece']:.1f} %"
        axis.plot([row["confidence"] for row in bins], [row["accuracy"] for row in bins], color=colour, label=label)
        sizes = [12 + 90 * row["n"] / known["n"] for row in bins]
        axis.scatter([row["confidence"] for row in bins], [row["accuracy"] for row in bins], sizes, color=colour)
    axis.set(xlabel="confidence in the chosen option", ylabel="share of correct answers", xlim=(0, 1), ylim=(0, 1))
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8, loc="upper left")
