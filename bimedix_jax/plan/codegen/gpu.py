"""Kernels compiled for GPUs by XLA, Triton and ptxas. No GPU is needed."""

import functools
import importlib.util
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bimedix_jax.errors import BimedixError
from bimedix_jax.models.config import MIXTRAL_8X7B
from bimedix_jax.plan.codegen.cases import Case, cases
from bimedix_jax.plan.work import TILE, kernel_flops

TARGETS = ("a100-80gb",)
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
"""One kernel in the output of `ptxas -v`."""
LAUNCH = re.compile(
    r" (?P<name>\w+) grid: \[(?P<grid>[\d, ]+)\] threads: \[(?P<threads>[\d, ]+)\]\s+shared_memory: (?P<shared>\d+)"
)
"""One kernel in XLA's list of the launches of a program."""
PTX: dict[str, Any] = {
    "xla_backend_optimization_level": 3,
    "xla_dump_emitter_re": "ptx",
    "xla_gpu_libnvjitlink_mode": "LIB_NV_JIT_LINK_MODE_DISABLED",
}
"""Compiler options: optimise fully, whatever XLA_FLAGS say, dump the PTX, and compile it with ptxas.

JAX 0.12 dumps PTX on request only. It prefers any nvJitLink that is installed to ptxas (torch's wheels bring that of
CUDA 13), and then writes PTX that is too new for ptxas.
"""


@dataclass(frozen=True)
class GpuKernel:
    """A kernel of a compiled program. `spill_bytes`: stores and loads of registers that are spilled to the stack."""

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    grid: tuple[int, ...]
    threads: int


def ptxas() -> Path:
    """NVIDIA's assembler, from the wheel that the extra `aot` installs.

    Raises:
      BimedixError: it is not installed.
    """
    found = importlib.util.find_spec("nvidia.cuda_nvcc") if importlib.util.find_spec("nvidia") else None
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (path := Path(folder) / "bin" / "ptxas").is_file():
            return path
    raise BimedixError("ptxas is not installed; install bimedix_jax[aot] (Linux only).")


def gpu_kernels(function: Any, *arguments: Any, architecture: str = "sm_80") -> list[GpuKernel]:
    """Compiles `jit(function)` and returns its kernels, in no particular order.

    Args:
      arguments: abstract arguments, sharded on a device of `hardware.devices`.

    Raises:
      BimedixError: ptxas is missing or refuses a kernel.
    """
    import jax

    assembler = ptxas()
    with tempfile.TemporaryDirectory() as folder:
        options = PTX | {"xla_dump_to": folder, "xla_gpu_cuda_data_dir": str(assembler.parent.parent)}
        # a new function, since XLA dumps nothing for a program that JAX has in its cache
        jax.jit(lambda *x: function(*x)).lower(*arguments).compile(compiler_options=options)
        launches = {}
        for path in Path(folder).glob("*thunk_sequence.txt"):
            launches |= {match["name"]: match for match in LAUNCH.finditer(path.read_text())}
        kernels = []
        for path in Path(folder).glob("*.ptx"):
            if not path.stat().st_size:  # XLA writes an empty file for a program without kernels
                continue
            command = [assembler, "-v", f"-arch={architecture}", path, "-o", "/dev/null"]
            report = subprocess.run(command, capture_output=True, text=True)
            if report.returncode:
                raise BimedixError(f"ptxas refuses a kernel: {report.stderr.strip().splitlines()[0]}")
            for entry in ENTRY.finditer(report.stderr):
                if (launch := launches.get(entry["name"])) is None:
                    continue
                grid, threads = (tuple(map(int, launch[part].split(","))) for part in ("grid", "threads"))
                spills = int(entry["stores"]) + int(entry["loads"])
                kernels.append(
                    GpuKernel(entry["name"], int(entry["registers"]), spills, int(launch["shared"]), grid, threads[0])
                )
    return kernels


def more_cases() -> dict[str, Case]:
    """`cases`, products with few tokens and in float32, and products with a layer of the stack of all layers."""
    found = cases()
    for name, each in (("w1 nf4", 2), ("w2 nf4", 2), ("q nf4", 1), ("k nf4", 1)):  # rows for one token
        forward, rows = found[f"{name} forward"], found[f"{name} rows"]
        found[f"{name} forward, 1 token"] = replace(forward, rows=each)
        for tokens in (256, 1024):
            found[f"{name} forward, {tokens} tokens"] = replace(forward, rows=tokens * each)
            found[f"{name} rows, {tokens} tokens"] = replace(rows, rows=tokens * each)
    for name in ("w1 nf4 forward", "w2 nf4 rows", "w1 nf4 forward, 1 token", "w2 nf4 forward, 1 token",
                 "w1 nf4 forward, 256 tokens", "w1 nf4 rows, 256 tokens", "q nf4 forward, 1 token"):  # fmt: skip
        found[f"{name}, of 32 layers"] = replace(found[name], layers=MIXTRAL_8X7B.num_layers)
    for name in ("w1 nf4 forward", "w1 nf4 rows", "w1 lora_a forward", "w1 lora_a rows", "w1 lora_a weight"):
        found[f"{name}, float32"] = replace(found[name], dtype="float32")
    return found


def measure(target: str, names: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """A row for each kernel of each case, or of the named cases.

    It has the figures of ptxas, and `flops_ratio`: the FLOPs of the kernel's grid over the useful ones of the case.

    Raises:
      BimedixError: the extra `aot` is not installed.
    """
    import jax

    from bimedix_jax.kernels import backends
    from bimedix_jax.plan.hardware import devices

    [device] = devices(target)
    sharding = jax.sharding.SingleDeviceSharding(device)
    for name, case in more_cases().items():
        if names is not None and name not in names:
            continue
        began = time.perf_counter()
        with backends.use(device=device):
            kernels = gpu_kernels(functools.partial(case.call, "triton"), *case.operands(sharding))
        seconds = time.perf_counter() - began
        contracted = {"forward": case.k, "rows": case.n, "weight": case.rows}[case.part]
        for kernel in kernels:
            if (part := TILE.fullmatch(kernel.name)) is None:
                continue
            tile = (int(part["m"]), int(part["n"]), int(part["k"]))
            yield {
                "target": target,
                "case": name,
                "kernel": part["kernel"],
                "shapes": case.shapes,
                "dtype": case.dtype,
                "tile": tile,
                "grid": kernel.grid,
                "threads": kernel.threads,
                "registers": kernel.registers,
                "spill_bytes": kernel.spill_bytes,
                "shared_bytes": kernel.shared_bytes,
                "flops_ratio": kernel_flops(part["kernel"], tile, kernel.grid, contracted) / case.useful_flops,
                "compile_seconds": seconds,
            }
