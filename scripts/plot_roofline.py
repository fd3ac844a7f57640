"""Rooflines: FLOPs and memory traffic of each operation of a Mixtral-8x7B layer, and lower bounds of its time.

    python scripts/plot_roofline.py --plot docs/results/kernels_roofline.png     # a Markdown table, and the plot
    python scripts/plot_roofline.py --json

Peaks and bandwidths of accelerators are from their data sheets (bimedix_jax/costs/devices.py). Those of this CPU are
measured: a bfloat16 product of 4,096^3 with float32 accumulation, and reading 1 GiB of float32.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bimedix_jax import startup
from bimedix_jax.bench.intensity import PHASES, works
from bimedix_jax.costs.devices import DEVICES
from bimedix_jax.errors import run_script

ACCELERATORS = ("a100-80gb", "v5e")
MARKS = {phase.name: mark for phase, mark in zip(PHASES, "osv^", strict=True)}


def measure_cpu() -> tuple[float, float]:
    """(FLOP/s, bytes/s) of this machine."""
    import jax
    import jax.numpy as jnp

    from bimedix_jax.bench.timing import medians
    from bimedix_jax.kernels.products import dot

    size, count = 4096, 2**28
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    numbers = jnp.ones(count, jnp.float32)
    product, total = jax.jit(lambda x: dot(x, x).astype(jnp.bfloat16)), jax.jit(jnp.sum)
    seconds = medians({"product": lambda: product(x), "read": lambda: total(numbers)}, repetitions=9)
    return 2 * size**3 / seconds["product"], 4 * count / seconds["read"]


def rows_of(limits: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    return [
        {
            "operation": work.operation,
            "phase": work.phase,
            "gflop": work.flops / 1e9,
            "megabytes": work.bytes / 1e6,
            "flop_per_byte": work.intensity,
            "milliseconds": {name: 1e3 * work.seconds(*limit) for name, limit in limits.items()},
            "limit": {
                name: "compute" if work.intensity > peak / bandwidth else "memory"
                for name, (peak, bandwidth) in limits.items()
            },
        }
        for work in works()
    ]


def figure(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def table(rows: list[dict[str, Any]], limits: dict[str, tuple[float, float]]) -> str:
    lines = []
    for phase in PHASES:
        lines += ["", f"| {phase.name} | GFLOP | MB | FLOP/B | " + " | ".join(f"{name}, ms" for name in limits) + " |"]
        lines.append("|---|" + "---|" * (3 + len(limits)))
        for row in rows:
            if row["phase"] == phase.name:
                numbers = [figure(row[key]) for key in ("gflop", "megabytes", "flop_per_byte")]
                numbers += [f"{figure(row['milliseconds'][name])} {row['limit'][name][0]}" for name in limits]
                lines.append(f"| {row['operation']} | " + " | ".join(numbers) + " |")
    return "\n".join(lines[1:])


def plot(path: Path, limits: dict[str, tuple[float, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    canvas, axes = plt.subplots(figsize=(11, 5.5))
    reach = np.geomspace(0.3, 2e4, 400)
    drawn = [work for work in works() if work.operation != "experts, bfloat16 (grouped_matmul)"]
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(work.operation for work in drawn))}
    for style, (name, (peak, bandwidth)) in zip(("-", "--", ":"), limits.items(), strict=True):
        label = f"{name}: {peak / 1e12:.3g} TFLOP/s, {bandwidth / 1e9:,.0f} GB/s"
        axes.plot(reach, np.minimum(peak, reach * bandwidth) / 1e12, f"k{style}", linewidth=1, label=label)
        for work in drawn:
            attainable = work.flops / work.seconds(peak, bandwidth) / 1e12
            axes.plot(work.intensity, attainable, MARKS[work.phase], color=colours[work.operation], markersize=6)
    for operation, colour in colours.items():
        axes.plot([], [], "s", color=colour, label=operation)
    for phase, mark in MARKS.items():
        axes.plot([], [], mark, color="grey", label=phase)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of memory traffic", ylabel="attainable TFLOP/s")
    axes.set_title("One layer of Mixtral-8x7B: operations under the roofline of each device")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    canvas.tight_layout()
    canvas.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plot", type=Path, help="write the plot to this PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    startup.prepare()
    limits = {name: (DEVICES[name].bfloat16_flops, DEVICES[name].bandwidth) for name in ACCELERATORS}
    limits["this CPU"] = measure_cpu()
    rows = rows_of(limits)
    if options.plot:
        plot(options.plot, limits)
    if options.json:
        print(json.dumps({"limits": limits, "rows": rows}))
        return
    peak, bandwidth = limits["this CPU"]
    print(f"this CPU, measured: {peak / 1e9:,.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s\n")
    print(table(rows, limits))


if __name__ == "__main__":
    run_script(main)
