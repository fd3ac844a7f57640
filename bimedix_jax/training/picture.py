"""A plot of a run: the training loss by step, and the held-out loss before and after."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_run(
    metrics: Sequence[Mapping[str, Any]],
    before: Mapping[str, float],
    after: Mapping[str, float],
    path: str | Path,
    title: str,
) -> Path:
    """Writes a PNG.

    Args:
      metrics: lines of metrics.jsonl.
      before, after: held-out loss in bits per UTF-8 byte, by group; both have the same groups.
    """
    figure = Figure(figsize=(10.5, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # needs no window system and no global state of pyplot
    figure.suptitle(title, fontsize=11)
    curve, bars = figure.subplots(1, 2, width_ratios=[1, 1.25])
    steps, losses = [line["step"] for line in metrics], [line["nll"] for line in metrics]
    span = len(losses) // 15
    curve.plot(steps, losses, color="tab:blue", alpha=0.3 if span > 1 else 1.0)
    if span > 1:  # losses of single steps vary much; the mean over several shows the trend
        means = [sum(losses[i - span : i]) / span for i in range(span, len(losses) + 1)]
        curve.plot(steps[span - 1 :], means, color="tab:blue", label=f"mean of {span} steps")
        curve.legend(fontsize=8, frameon=False)
    curve.set_title("Training loss", fontsize=10)
    curve.set_xlabel("optimiser step", fontsize=9)
    curve.set_ylabel("nats per supervised token", fontsize=9)
    groups = list(after)
    places = range(len(groups))
    bars.barh([place - 0.2 for place in places], [before[g] for g in groups], 0.4, label="before", color="lightgray")
    bars.barh([place + 0.2 for place in places], [after[g] for g in groups], 0.4, label="after", color="tab:green")
    bars.set_yticks(list(places), groups)
    bars.invert_yaxis()
    bars.set_title("Held-out loss, lower is better", fontsize=10, loc="left")
    bars.set_xlabel("bits per UTF-8 byte of the answers", fontsize=9)
    bars.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    for axis in (curve, bars):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png")
    return target
