"""Time of products of rows with one matrix on a CPU: the backend `avx512` of nf4_matmul against XLA.

    python scripts/measure_linear.py                    # a table
    python scripts/measure_linear.py --json             # one JSON document

Each product is timed with the matrix stored by input ([in, out]) and by output ([out, in]) in bfloat16, and in NF4 by
output, as checkpoints store it. Rows are bfloat16 and results float32. The backends run alternately; figures are
medians. `gigabytes_per_s` counts the bytes of the matrix, and `gflops` the FLOPs of the product.
"""

import argparse
import json
import os
from importlib import metadata
from typing import Any

from bimedix_jax import startup
from bimedix_jax.errors import positive, run_script

SIZES = [
    (1024, 512, 32_000),
    (1024, 512, 512),
    (1024, 512, 128),
    (1024, 4096, 4096),
    (128, 4096, 4096),
    (8, 512, 32_000),
    (8, 4096, 4096),
    (1, 512, 32_000),
    (1, 4096, 4096),
    (1, 4096, 14_336),
]
"""(rows, in, out): head and projections of the benchmark's model in a prefill and in decoding, and of Mixtral-8x7B."""


def measure(rows: int, inputs: int, outputs: int, repetitions: int) -> list[dict[str, Any]]:
    """A row of the result for each form of the matrix."""
    import jax
    import jax.numpy as jnp

    from bimedix_jax.bench.timing import medians
    from bimedix_jax.costs.flops import matmul_flops
    from bimedix_jax.kernels import backends
    from bimedix_jax.kernels.by_output import ByOutput
    from bimedix_jax.kernels.nf4 import quantize
    from bimedix_jax.kernels.nf4_matmul import matmul

    x = jax.random.normal(jax.random.key(0), (rows, inputs), jnp.bfloat16)
    stored = jax.random.normal(jax.random.key(1), (outputs, inputs), jnp.bfloat16)
    forms = {
        "bfloat16 by input": jnp.copy(stored.T),
        "bfloat16 by output": ByOutput(stored),
        "nf4": quantize(stored).mT,
    }
    contestants = {}
    for form, w in forms.items():
        for backend in ("xla", "avx512"):
            with backends.use(nf4_matmul=backend):
                compiled = jax.jit(lambda x, w: matmul(x, w, "float32")).lower(x, w).compile()
            contestants[form, backend] = lambda run=compiled, w=w: run(x, w)
    seconds = medians({f"{form} {backend}": run for (form, backend), run in contestants.items()}, repetitions)
    found = []
    for form, w in forms.items():
        xla, ours = seconds[f"{form} xla"], seconds[f"{form} avx512"]
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(w))
        found.append(
            {"rows": rows, "in": inputs, "out": outputs, "form": form, "xla_ms": 1e3 * xla, "avx512_ms": 1e3 * ours}
            | {"ratio": xla / ours, "gigabytes_per_s": size / ours / 1e9}
            | {"gflops": matmul_flops(rows, inputs, outputs) / ours / 1e9}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=positive, default=15)
    parser.add_argument("--size", type=positive, nargs=3, action="append", metavar=("ROWS", "IN", "OUT"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sizes = options.size or SIZES
    if any(count % 32 for size in sizes for count in size[1:]):
        parser.error("IN and OUT must be multiples of 32; correct --size")
    os.environ["JAX_PLATFORMS"] = "cpu"
    startup.reuse_memory()
    startup.prepare()
    try:
        found = [row for rows, i, o in sizes for row in measure(rows, i, o, options.repetitions)]
    except NotImplementedError as error:  # the processor or the compiler is missing
        raise SystemExit(str(error)) from error
    if options.json:
        versions = {"threads": len(os.sched_getaffinity(0)), "jax": metadata.version("jax")}
        print(json.dumps(versions | {"rows": found}, indent=2))
        return
    print(f"{'rows x in x out':>20}  {'matrix':20}{'xla':>9}{'avx512':>9} ms{'ratio':>8}{'GB/s':>8}{'GFLOP/s':>9}")
    for row in found:
        size = f"{row['rows']} x {row['in']} x {row['out']}"
        times = f"{row['xla_ms']:9.2f}{row['avx512_ms']:9.2f}   {row['ratio']:8.2f}"
        print(f"{size:>20}  {row['form']:20}{times}{row['gigabytes_per_s']:8.1f}{row['gflops']:9.1f}")


if __name__ == "__main__":
    run_script(main)
