"""Plots splits of a gain and knock-outs of experts: what `routes replay` and `routes knockout` wrote with --out.

    python scripts/plot_causes.py --split NAME=split.json ... --knockout NAME=knockout.json ... --out causes.png

Each NAME is the title of a panel. Thick lines are 95 % intervals; thin lines the range over the orders of the parts.
Knock-outs of many cells are a matrix for each meaning, layers across, and a dot marks an adjusted p below 0.05.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from bimedix_jax.errors import BimedixError, run_script
from bimedix_jax.files import read_json

LEVEL = 0.05
"""Of the p-values that get a dot."""
MOST_ROWS = 16
"""Cells that are drawn as rows."""
COLOURS = {"ar": "#D55E00", "en": "#0072B2", "interaction": "#222222"}


def named(text: str) -> tuple[str, dict[str, Any]]:
    """A title and the JSON of a file, from NAME=FILE."""
    name, separator, path = text.partition("=")
    if not separator:
        raise BimedixError(f"{text} has no name; write NAME=FILE")
    return name, read_json(path, dict[str, Any], "name a file that --out wrote")


def plot_split(axis: Any, name: str, split: dict[str, Any]) -> None:
    """A row for each part and for the gain."""
    parts = {**split["shapley"], "gain": split["gain"]}
    for row, (part, nats) in enumerate(parts.items()):
        if part in split["range_over_orders"]:
            axis.plot(split["range_over_orders"][part], [row, row], color="#888888", linewidth=1)
        low, high = split["intervals"][part]
        if low is not None:
            axis.plot([low, high], [row, row], color=COLOURS["en"], linewidth=4, alpha=0.6)
        axis.plot([nats], [row], "o", color="black", markersize=5)
    axis.set_yticks(range(len(parts)), list(parts))
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_title(f"{name}: what each part saves", fontsize=9)
    axis.set_xlabel("nats per token", fontsize=8)


def plot_knockout(axis: Any, name: str, knockout: dict[str, Any]) -> None:
    """A row for each cell: the change in each language, and the interaction with its interval."""
    found = {(row["layer"], row["expert"], row["meaning"]): row for row in knockout["interaction"]}
    labels = []
    for row, cell in enumerate(knockout["cells"]):
        key = (cell["layer"], cell["expert"], cell["meaning"])
        labels.append(f"{key[0]}, {key[1]}: {key[2]}")
        for language, marker in (("ar", "s"), ("en", "D")):
            if language in cell["delta"]:
                axis.plot([cell["delta"][language]], [row], marker, color=COLOURS[language], markersize=4)
        if key in found:
            one = found[key]
            if one["low"] is not None:
                axis.plot([one["low"], one["high"]], [row, row], color=COLOURS["interaction"], linewidth=1.5)
            axis.plot([one["estimate"]], [row], "o", markerfacecolor="white", color="black", markersize=5)
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_title(f"{name}: knock-outs (layer, expert)", fontsize=9)
    axis.set_xlabel("change of the loss, nats per token", fontsize=8)
    axis.plot([], [], "s", color=COLOURS["ar"], label="Arabic")
    axis.plot([], [], "D", color=COLOURS["en"], label="English")
    axis.plot([], [], "o-", markerfacecolor="white", color="black", label="interaction")
    axis.legend(fontsize=7)


def plot_matrix(axis: Any, name: str, knockout: dict[str, Any]) -> None:
    """Changes of all cells of one meaning: the experts in rows, once for each language and for the interaction."""
    from matplotlib.colors import SymLogNorm

    cells = knockout["cells"]
    depth, experts = (1 + max(cell[key] for cell in cells) for key in ("layer", "expert"))
    parts = [part for part in ("ar", "en", "interaction") if part == "interaction" or part in cells[0]["delta"]]
    values_PEL = np.full((len(parts), experts, depth), np.nan)
    tested = knockout["interaction"]
    for part, found_EL in zip(parts, values_PEL, strict=True):
        for cell in tested if part == "interaction" else cells:
            change = cell["estimate"] if part == "interaction" else cell["delta"][part]
            found_EL[cell["expert"], cell["layer"]] = change
            p = cell["p_adjusted"] if part == "interaction" else cell["p_adjusted"].get(part)
            if p is not None and p < LEVEL:
                axis.plot(cell["layer"], parts.index(part) * experts + cell["expert"], ".", color="black", markersize=4)
    most = np.nanmax(np.abs(values_PEL))
    norm = SymLogNorm(linthresh=0.01, vmin=-most, vmax=most)
    image = axis.imshow(values_PEL.reshape(-1, depth), cmap="PuOr_r", norm=norm, aspect="auto")
    for edge in range(1, len(parts)):
        axis.axhline(edge * experts - 0.5, color="black", linewidth=1)
    titles = {"ar": "Arabic", "en": "English", "interaction": "difference"}
    labels = [f"{titles[part]}, {expert}" for part in parts for expert in range(experts)]
    axis.set_yticks(range(len(labels)), labels)
    axis.set_xlabel("layer", fontsize=8)
    axis.set_title(f"{name}: {cells[0]['meaning']} one expert, change in nats per token", fontsize=9)
    axis.figure.colorbar(image, ax=axis, ticks=[-0.1, -0.01, 0, 0.01, 0.1], format="%g").ax.tick_params(labelsize=7)


def panels(name: str, knockout: dict[str, Any]) -> list[tuple[Any, str, dict[str, Any]]]:
    """A panel with a row for each cell, or one matrix for each meaning where there are many."""
    if not {"cells", "interaction"} <= knockout.keys():
        raise BimedixError(f"{name} is not what `bimedix routes knockout` wrote; name its file")
    if len(knockout["cells"]) <= MOST_ROWS:
        return [(plot_knockout, name, knockout)]
    found = []
    for meaning in dict.fromkeys(cell["meaning"] for cell in knockout["cells"]):
        own = {key: [x for x in knockout[key] if x["meaning"] == meaning] for key in ("cells", "interaction")}
        found.append((plot_matrix, name, knockout | own))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", nargs="*", default=[], metavar="NAME=FILE", help="what `routes replay` wrote")
    parser.add_argument("--knockout", nargs="*", default=[], metavar="NAME=FILE", help="what `routes knockout` wrote")
    parser.add_argument("--out", type=Path, required=True, help="PNG or SVG to write")
    options = parser.parse_args()
    drawn = [(plot_split, *named(text)) for text in options.split]
    drawn += [panel for text in options.knockout for panel in panels(*named(text))]
    if not drawn:
        raise BimedixError("there is nothing to plot; give --split NAME=FILE or --knockout NAME=FILE")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    small = [panel for panel in drawn if panel[0] is not plot_matrix]
    wide = [panel for panel in drawn if panel[0] is plot_matrix]
    rows = -(-len(small) // 2)
    canvas = plt.figure(figsize=(10.4, 2.6 * (rows + len(wide))))
    grid = canvas.add_gridspec(rows + len(wide), 2)
    places = [grid[number // 2, number % 2] for number in range(len(small))]
    places += [grid[rows + number, :] for number in range(len(wide))]
    for place, (draw, name, content) in zip(places, [*small, *wide], strict=True):
        axis = canvas.add_subplot(place)
        draw(axis, name, content)
        axis.tick_params(labelsize=7)
    canvas.tight_layout()
    canvas.savefig(options.out, dpi=110)


if __name__ == "__main__":
    run_script(main)
