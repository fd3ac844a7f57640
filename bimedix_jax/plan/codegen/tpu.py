"""Kernels compiled for TPUs by Mosaic. No TPU is needed."""

import functools
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bimedix_jax.errors import BimedixError
from bimedix_jax.plan.codegen.cases import BLOCK, Case, cases

TARGETS = ("v5e", "v5p")
KERNEL = re.compile(
    r"custom_call_target=\"tpu_custom_call\".*op_name=\"[^\"]*?(?P<name>\w+)/pallas_call\".*"
    r"\"scoped_memory_configs\":\[\{\"memory_space\":\"1\",\"offset\":\"(?P<start>\d+)\".*"
    r"\"used_scoped_memory_configs\":\[\{\"memory_space\":\"1\",\"offset\":\"0\",\"size\":\"(?P<stop>\d+)\""
)
"""One kernel in the text of a compiled program; memory space 1 is VMEM, of which it uses [start, stop).

The name is that of the operation: newer compilers add the names of operands to those of instructions.
"""

LOOPED = re.compile(r'op_name="[^"]*\bwhile/body\b')
"""An instruction inside a loop of the program. The compiler's own copying loops have no such names."""


@dataclass(frozen=True)
class TpuKernel:
    """A kernel of a compiled program.

    `vmem_bytes`: tiles, their double buffers, scratch and spills. Operands that XLA keeps in VMEM are not included.
    """

    name: str
    vmem_bytes: int


def tpu_kernels(compiled: Any) -> list[TpuKernel]:
    """The Mosaic kernels of a program compiled for a TPU, in order."""
    found = KERNEL.finditer(compiled.as_text())
    return [TpuKernel(match["name"], int(match["stop"]) - int(match["start"])) for match in found]


def program_flops(compiled: Any) -> float:
    """FLOPs of a program as the TPU compiler counts them, with all grid steps of our kernels.

    Raises:
      BimedixError: the program has loops; the compiler would count their bodies once.
    """
    if LOOPED.search(compiled.as_text()):
        raise BimedixError("The compiled program has loops, so that its FLOPs cannot be counted.")
    return compiled.cost_analysis()["flops"]


def compile_case(case: Case, target: str) -> Any:
    """The compiled program of a case for one chip.

    Raises:
      BimedixError: the extra `aot` is not installed.
    """
    import jax

    from bimedix_jax.kernels import backends
    from bimedix_jax.plan.hardware import devices

    [device] = devices(target)
    sharding = jax.sharding.SingleDeviceSharding(device)
    with backends.use(device=device):
        return jax.jit(functools.partial(case.call, "mosaic_tpu")).lower(*case.operands(sharding)).compile()


def tile(case: Case) -> tuple[int, ...]:
    """(rows, columns, contracted) of one step of the grid."""
    import jax.numpy as jnp

    from bimedix_jax.kernels.grouped_matmul import mosaic_tiling

    if case.part == "weight":
        return (*mosaic_tiling.gradient_tile(case.k, case.n), mosaic_tiling.HEIGHT)
    k, n = (case.n, case.k) if case.part == "rows" else (case.k, case.n)
    if case.weight == "nf4":
        columns = mosaic_tiling.packed_columns(k, n, jnp.dtype(case.dtype), case.part == "forward", BLOCK)
    else:
        columns = mosaic_tiling.dense_columns(k, n, jnp.dtype(case.dtype))
    return mosaic_tiling.HEIGHT, columns or 0, k


def measure(target: str, names: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """A row for each kernel of each case, or of the named cases: its tile, its VMEM, and `flops_ratio`.

    `flops_ratio` is the FLOPs of all steps of the grid, which do not depend on the group sizes, over the useful ones.
    Kernels that only prepare operands have neither a tile nor this ratio.

    Raises:
      BimedixError: the extra `aot` is not installed.
    """
    for name, case in cases().items():
        if names is not None and name not in names:
            continue
        began = time.perf_counter()
        compiled = compile_case(case, target)
        seconds = time.perf_counter() - began
        *preparing, product = tpu_kernels(compiled)
        described = {
            "target": target,
            "case": name,
            "shapes": case.shapes,
            "dtype": case.dtype,
            "compile_seconds": seconds,
        }
        for kernel in preparing:
            yield {**described, "kernel": kernel.name, "vmem_bytes": kernel.vmem_bytes}
        yield {
            **described,
            "kernel": product.name,
            "vmem_bytes": product.vmem_bytes,
            "tile": tile(case),
            "flops_ratio": program_flops(compiled) / case.useful_flops,
        }
