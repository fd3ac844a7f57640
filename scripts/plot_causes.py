"""Plots splits of a gain and knock-outs of experts: what `routes replay` and `routes knockout` wrote with --out.

    python scripts/plot_causes.py --split NAME=split.json ... --knockout NAME=knockout.json ... --out causes.png

Each NAME is the title of a panel. Thick lines are 95 % intervals; thin lines the range over the orders of the parts.
"""

import argparse
from pathlib import Path
from typing import Any

from bimedix_jax.errors import BimedixError, run_script
from bimedix_jax.files import read_json

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", nargs="*", default=[], metavar="NAME=FILE", help="what `routes replay` wrote")
    parser.add_argument("--knockout", nargs="*", default=[], metavar="NAME=FILE", help="what `routes knockout` wrote")
    parser.add_argument("--out", type=Path, required=True, help="PNG or SVG to write")
    options = parser.parse_args()
    drawn = [(plot_split, *named(text)) for text in options.split]
    drawn += [(plot_knockout, *named(text)) for text in options.knockout]
    if not drawn:
        raise BimedixError("there is nothing to plot; give --split NAME=FILE or --knockout NAME=FILE")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(drawn), 2)
    rows = -(-len(drawn) // columns)
    canvas, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 2.6 * rows), squeeze=False)
    for axis, (draw, name, content) in zip(axes.ravel(), drawn, strict=False):
        draw(axis, name, content)
        axis.tick_params(labelsize=7)
    for axis in axes.ravel()[len(drawn) :]:
        axis.remove()
    canvas.tight_layout()
    canvas.savefig(options.out, dpi=110)


if __name__ == "__main__":
    run_script(main)
