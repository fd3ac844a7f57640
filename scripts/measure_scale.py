"""Memory and compile time of the full training step, by length of rows and depth of the model.

    python scripts/measure_scale.py                                      # a table; five minutes on 2 cores
    python scripts/measure_scale.py --json --plot docs/results/scale.png # one JSON document, and a picture
    python scripts/measure_scale.py --sequences 2048 --layers            # some of the rows

The paper's recipe on Mixtral-8x7B, with one row a device and no accumulation, is compiled for devices that need not be
present (bimedix_jax[aot]): with 32 layers for each length, and with 4,096 tokens for each depth. `--rows FILE` reuses
the rows of an earlier JSON document and adds the new ones to it.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bimedix_jax import startup
from bimedix_jax.errors import positive, run_script
from bimedix_jax.experiment import override
from bimedix_jax.files import write_text
from bimedix_jax.models.config import MIXTRAL_8X7B
from bimedix_jax.presets import bimedix_mixtral_8x7b

LENGTH, DEPTH, GIB = 4096, 32, 2**30


def measure(target: str, remat: str, length: int, layers: int) -> dict[str, Any]:
    """One row: the step's memory on each device, and the time to lower and compile it."""
    from bimedix_jax.costs.devices import target as parse
    from bimedix_jax.plan.report import estimate_training, to_document

    where = parse(target)
    changes = {"data.sequence_length": length, "batch.rows": where.count, "batch.accumulation": 1, "remat": remat}
    config = dataclasses.replace(MIXTRAL_8X7B, num_layers=layers)
    document = to_document(estimate_training(config, override(bimedix_mixtral_8x7b(), changes), where))
    kept = ("fits", "peak_bytes_per_device", "parts", "compile_seconds", "step_seconds", "tokens_per_s")
    return {"target": target, "remat": remat, "sequence": length, "layers": layers} | {
        name: document.get(name) for name in kept
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots peak memory and compile time by length and depth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(8, 6), layout="constrained", sharey="row")
    for column, (key, other, fixed) in enumerate((("sequence", "layers", DEPTH), ("layers", "sequence", LENGTH))):
        for name in sorted({(row["target"], row["remat"]) for row in rows}):
            line = sorted(
                (row for row in rows if (row["target"], row["remat"]) == name and row[other] == fixed),
                key=lambda row: row[key],
            )
            label = f"{name[0]}, remat {name[1]}"
            x = [row[key] for row in line]
            axes[0][column].plot(x, [(row["peak_bytes_per_device"] or 0) / GIB for row in line], "o-", label=label)
            axes[1][column].plot(x, [row["compile_seconds"] for row in line], "o-", label=label)
        axes[1][column].set_xlabel("tokens of a row" if key == "sequence" else "layers")
        axes[0][column].set_title(f"{fixed} {'layers' if other == 'layers' else 'tokens a row'}")
    axes[0][0].set_ylabel("peak memory of a device, GiB")
    axes[1][0].set_ylabel("lowering and compiling, s")
    axes[0][0].legend(fontsize="small")
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", default="a100-80gb:8", help="what to compile for")
    parser.add_argument("--remat", default="layer", help="what the backward pass recomputes")
    parser.add_argument("--sequences", type=positive, nargs="*", default=[2048, 4096, 8192, 16_384, 32_768])
    parser.add_argument("--layers", type=positive, nargs="*", default=[8, 16, 24, 32])
    parser.add_argument("--rows", type=Path, help="JSON document with earlier rows, to which new rows are added")
    parser.add_argument("--plot", type=Path, help="write a plot to this PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    startup.prepare()
    rows = json.loads(options.rows.read_text())["rows"] if options.rows and options.rows.exists() else []
    cases = [(length, DEPTH) for length in options.sequences] + [(LENGTH, layers) for layers in options.layers]
    had = {(row["target"], row["remat"], row["sequence"], row["layers"]) for row in rows}
    for length, layers in tqdm(dict.fromkeys(cases)):
        if (options.devices, options.remat, length, layers) in had:
            continue
        rows.append(measure(options.devices, options.remat, length, layers))
        if options.rows:
            write_text(options.rows, json.dumps({"rows": rows}, indent=2) + "\n")
    if options.plot:
        draw(rows, options.plot)
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    print(f"{'target':14}{'remat':>9}{'sequence':>10}{'layers':>8}{'peak GiB':>10}{'fits':>6}{'compile s':>11}")
    for row in rows:
        peak = row["peak_bytes_per_device"]
        print(
            f"{row['target']:14}{row['remat']:>9}{row['sequence']:10,}{row['layers']:8}"
            f"{'-' if peak is None else f'{peak / GIB:.1f}':>10}{'yes' if row['fits'] else 'no':>6}"
            f"{row['compile_seconds']:11.1f}"
        )


if __name__ == "__main__":
    run_script(main)
