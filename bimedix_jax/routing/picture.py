"""Heatmaps of expert load, layers by experts: one for each language, and one for the difference of two languages."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bimedix_jax.errors import BimedixError
from bimedix_jax.routing.load import ExpertLoad

LANGUAGES = {"en": "English", "ar": "Arabic"}


def draw(
    loads: Mapping[str, ExpertLoad],
    path: str | Path,
    subject: str = "held-out records",
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Writes a PNG with a row of panels for each entry of `loads`, for instance {"before": ..., "after": ...}.

    Args:
      subject: name of the data, for the title.
      notes: a sentence for each entry of `loads`, such as `divergence.verdict`, without which a difference in load
        says nothing about what experts do.

    Raises:
      BimedixError: there is nothing to draw, or the rows have different languages.
    """
    languages = _languages(loads)
    columns = len(languages) + (len(languages) == 2)
    layers = next(iter(loads.values())).counts[languages[0]].shape[0]
    figure = Figure(figsize=(3.6 * columns, 1.5 + (1.2 + 0.11 * layers) * len(loads)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a window system and without pyplot's global state
    figure.suptitle(_title(loads, subject), fontsize=11)
    axes = np.array(figure.subplots(len(loads), columns, squeeze=False))
    top = max(load.share(language).max() for load in loads.values() for language in languages)
    reach = 0.1  # percentage points; all rows share one colour scale
    if columns > len(languages):
        apart = [100 * (load.share(languages[1]) - load.share(languages[0])) for load in loads.values()]
        reach = max(reach, *(float(np.abs(difference).max()) for difference in apart))
    for row, (name, load) in zip(axes, loads.items(), strict=True):
        shares = [load.share(language) for language in languages]
        for axis, language, share in zip(row, languages, shares, strict=False):
            label = f"{_spelled(language)}, {name} ({load.tokens[language]:,} tokens)"
            _panel(figure, axis, 100 * share, label, "% of choices", cmap="viridis", vmin=0.0, vmax=100 * top)
        if columns > len(languages):
            difference = 100 * (shares[1] - shares[0])
            label = f"{_spelled(languages[1])} minus {_spelled(languages[0])}, {name}"
            unit = "percentage points"
            _panel(figure, row[-1], difference, label, unit, cmap="RdBu_r", vmin=-reach, vmax=reach)
            _mark_negative(row[-1], difference, reach)
    if notes:
        lines = [textwrap.fill(f"{name.capitalize()}: {note}", int(45 * columns)) for name, note in notes.items()]
        figure.supxlabel("\n".join(lines), fontsize=9, color="firebrick")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png")
    return target


def _languages(loads: Mapping[str, ExpertLoad]) -> list[str]:
    found = {tuple(group for group in load.counts if "/" not in group) for load in loads.values()}
    if len(found) != 1 or not next(iter(found)):
        raise BimedixError("the loads to draw are of different languages; measure them on the same records")
    known = list(LANGUAGES)
    return sorted(next(iter(found)), key=lambda name: (known.index(name) if name in known else len(known), name))


def _title(loads: Mapping[str, ExpertLoad], subject: str) -> str:
    experts = next(iter(next(iter(loads.values())).counts.values())).shape[1]
    return f"Expert load on {subject}: share of router choices per layer; {100 / experts:.1f} % if even"


def _spelled(language: str) -> str:
    return LANGUAGES.get(language, language)


def _mark_negative(axis: Axes, values_LE: np.ndarray, reach: float) -> None:
    """A dash in the cells below zero: in print without colours, blue and red are the same grey."""
    for low, high, colour in ((-np.inf, -reach / 2, "white"), (-reach / 2, 0, "black")):
        layers, experts = np.nonzero((values_LE >= low) & (values_LE < high))
        axis.plot(experts, layers, linestyle="", marker="_", color=colour, markersize=5)


def _panel(figure: Figure, axis: Axes, values_LE: np.ndarray, label: str, unit: str, **colours: Any) -> None:
    layers, experts = values_LE.shape
    image = axis.imshow(values_LE, aspect="auto", interpolation="nearest", origin="upper", **colours)
    axis.set_title(label, fontsize=9)
    axis.set_xlabel("expert", fontsize=8)
    axis.set_ylabel("layer", fontsize=8)
    axis.set_xticks(range(experts))
    axis.set_yticks(range(0, layers, max(layers // 8, 1)))
    axis.tick_params(labelsize=7)
    figure.colorbar(image, ax=axis).set_label(unit, fontsize=8)
