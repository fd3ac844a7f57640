"""Compiles the kernels at Mixtral-8x7B's shapes, for accelerators that need not be present, and inspects them.

    python scripts/measure_kernel_codegen.py                                 # tables; some minutes on 2 cores
    python scripts/measure_kernel_codegen.py --json                          # one JSON document: rows, moe_layers
    python scripts/measure_kernel_codegen.py --targets a100-80gb --cases "w1 nf4 forward" "w1 nf4 rows"

A row is one kernel for one target: a product of the experts (NF4 base, dense base, adapters of rank 128) or of the
attention's projections (NF4 base), attention itself, or a gradient of it, at 4,096 tokens unless it says otherwise.
`registers`, `spill_bytes` and `shared_bytes` are reported by ptxas and XLA, `vmem_bytes` by the TPU compiler.
`flops_ratio` is the FLOPs of the kernel's grid, including the padding of tiles, over the useful ones. `moe_layers` has
this ratio for the compiled forward and backward pass of one MoE layer. Needs bimedix_jax[aot].
"""

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from bimedix_jax import startup
from bimedix_jax.errors import run_script
from bimedix_jax.plan.codegen import attention, gpu, layer, tpu
from bimedix_jax.plan.codegen.cases import cases

MEASURE: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    target: module.measure for module in (gpu, tpu) for target in module.TARGETS
}
"""The function that compiles the cases for each target."""
FIGURES = ("registers", "spill_bytes", "shared_bytes", "vmem_bytes", "flops_ratio")


def shown(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.3f}" if isinstance(figure, float) else str(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=MEASURE, default=list(MEASURE), help="what to compile for")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="names of cases, all by default")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    startup.prepare()
    known = [name for target in options.targets for name in (gpu.more_cases() if target in gpu.TARGETS else cases())]
    known += ["attention forward, bfloat16"]
    if unknown := [name for name in options.cases or () if name not in known and not name.startswith("attention ")]:
        parser.error(f"there is no case {unknown[0]!r}; the names are {', '.join(dict.fromkeys(known))}")
    rows = [
        row for target in options.targets for row in tqdm(MEASURE[target](target, names=options.cases), desc=target)
    ]
    for target in options.targets:
        measure = attention.measure_gpu if target in gpu.TARGETS else attention.measure_tpu
        rows += [row for row in measure(target) if not options.cases or row["case"] in options.cases]
    if not rows:
        parser.error("none of these cases exists; run without --cases to list all of them")
    layers = [layer.measure(target) for target in options.targets]
    if options.json:
        print(json.dumps({"rows": rows, "moe_layers": layers}))
        return
    print(f"{'target':10} {'case':34} {'tile':>14} " + " ".join(f"{name:>12}" for name in FIGURES))
    for row in [*rows, *layers]:
        tile = "x".join(map(str, row.get("tile") or ()))
        figures = " ".join(f"{shown(row.get(name)):>12}" for name in FIGURES)
        print(f"{row['target']:10} {row['case']:34} {tile:>14} {figures}")


if __name__ == "__main__":
    run_script(main)
