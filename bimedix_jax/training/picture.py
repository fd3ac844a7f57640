"""Pictures of a run: the loss by step with the held-out loss before and after, and the load of the experts."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
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


def draw_load(lines: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Writes a PNG: the share of each expert by layer and language, over the last quarter of the steps.

    Lines without loads, of earlier versions, give the busiest expert's share over time.
    """
    loads = loads_of(lines)
    figure = Figure(figsize=(3.2 * max(1, len(loads)) + 1.2, 4.0), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(loads)), squeeze=False)[0]
    shown = None
    if loads:
        most = max(load_LE.max() for load_LE in loads.values())
        for axis, (name, load_LE) in zip(axes, loads.items(), strict=True):
            shown = axis.imshow(load_LE, aspect="auto", vmin=0.0, vmax=most, cmap="viridis")
            axis.set_title(f"{name}: share of choices", fontsize=9)
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


def loads_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Share of each expert [L, E] by language, or of all tokens where no language is known."""
    last = lines[-max(1, len(lines) // 4) :]
    groups: dict[str, list[Mapping[str, Any]]] = {
        name: [line["by_language"][name] for line in last] for name in lines[-1].get("by_language", {})
    }
    found = {}
    for name, ones in (groups or {"all tokens": list(last)}).items():
        known = [one for one in ones if "load" in one]
        tokens = sum(one["tokens"] for one in known)
        if tokens:
            found[name] = np.sum([one["tokens"] * np.asarray(one["load"]) for one in known], axis=0) / tokens
    return found


def png(figure: Figure) -> bytes:
    held = BytesIO()
    figure.savefig(held, format="png", metadata={"Software": None})
    return held.getvalue()
