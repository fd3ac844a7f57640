"""What XLA, Triton and ptxas make of the kernels for GPUs, on a machine without one."""

import functools
import importlib.util
import math
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bimedix_jax.errors import BimedixError
from bimedix_jax.plan.codegen.cases import Case, cases

TARGETS = ("a100-80gb",)
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
"""One kernel in what `ptxas -v` prints."""
LAUNCH = re.compile(
    r" (?P<name>\w+) grid: \[(?P<grid>[\d, ]+)\] threads: \[(?P<threads>[\d, ]+)\]\s+shared_memory: (?P<shared>\d+)"
)
"""One kernel in XLA's list of what a program launches."""
SHAPE = re.compile(r"(%[\w.-]+) = \w+\[([\d,]*)\]")
DOT = re.compile(
    r"(?P<name>%[\w.-]+) = \S+ dot\((?:\S+ )?(?P<left>%[\w.-]+), .*?lhs_contracting_dims=\{(?P<axes>[\d,]+)\}"
)
CALL = re.compile(
    r'custom_call_target="__gpu\$xla.gpu.triton", operand_layout_constraints=\{(?P<operands>.*?)\}, api_version.*?'
    r'op_name="(?P<name>[^"]*)".*?grid_x = (?P<x>\d+) : i32, grid_y = (?P<y>\d+)'
)
"""Shapes, matrix products and Triton kernels in the text of a compiled program."""
GRADIENT, UNPACK = "weight_gradient", "unpack"
TILE = re.compile(
    rf"(?P<kernel>grouped_matmul|nf4_matmul|{GRADIENT}|{UNPACK})_(?P<m>\d+)x(?P<n>\d+)x(?P<k>\d+)(__\d+)?"
)
"""Name of a Triton kernel of ours: what it does, its tile, and a number where a program has several."""


@dataclass(frozen=True)
class GpuKernel:
    """A kernel of a compiled program. `spill_bytes`: stack stores and loads for want of registers, in its code."""

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
      arguments: abstract ones, sharded on a device of `hardware.devices`.

    Raises:
      BimedixError: ptxas is missing or refuses a kernel.
    """
    import jax

    assembler = ptxas()
    with tempfile.TemporaryDirectory() as folder:
        # a function of its own, since XLA writes nothing for a program that JAX finds in its cache
        jax.jit(lambda *x: function(*x)).lower(*arguments).compile(compiler_options={"xla_dump_to": folder})
        launches = {}
        for path in Path(folder).glob("*thunk_sequence.txt"):
            launches |= {match["name"]: match for match in LAUNCH.finditer(path.read_text())}
        kernels = []
        for path in Path(folder).glob("*.ptx"):
            if not path.stat().st_size:  # XLA writes an empty one where it has no kernels of its own
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


def kernel_flops(kernel: str, tile: tuple[int, int, int], grid: tuple[int, ...], contracted: int) -> int:
    """FLOPs of all programs of a Triton kernel that contracts this many columns, or rows (GRADIENT); UNPACK has none.

    Programs that end at once because their tile has no rows are counted; so are, for GRADIENT, as many masked rows as
    the worst group sizes cause.
    """
    m, n, k = tile
    if kernel == UNPACK:
        return 0
    if kernel == GRADIENT:
        return 2 * grid[0] * m * n * (contracted + grid[1] * (k - 1))
    return 2 * grid[0] * m * n * -(-contracted // k) * k


def more_cases() -> dict[str, Case]:
    """`cases`, and what else may run on a GPU: few tokens, and float32."""
    found = cases()
    for name, each in (("w1 nf4", 2), ("w2 nf4", 2), ("q nf4", 1), ("k nf4", 1)):  # rows of a token
        forward, rows = found[f"{name} forward"], found[f"{name} rows"]
        found[f"{name} forward, 1 token"] = replace(forward, rows=each)
        for tokens in (256, 1024):
            found[f"{name} forward, {tokens} tokens"] = replace(forward, rows=tokens * each)
            found[f"{name} rows, {tokens} tokens"] = replace(rows, rows=tokens * each)
    for name in ("w1 nf4 forward", "w1 nf4 rows", "w1 lora_a forward", "w1 lora_a rows", "w1 lora_a weight"):
        found[f"{name}, float32"] = replace(found[name], dtype="float32")
    return found


def measure(target: str, names: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """A row for each kernel of each case (of those named): ptxas' figures, and `flops_ratio`, FLOPs of its grid over
    the case's useful ones.

    Raises:
      BimedixError: the extra `aot` is not installed.
    """
    import jax

    from bimedix_jax.kernels import backends
    from bimedix_jax.plan.hardware import devices

    placed = jax.sharding.SingleDeviceSharding(devices(target)[0])
    for name, case in more_cases().items():
        if names is not None and name not in names:
            continue
        began = time.perf_counter()
        with backends.use(platform="gpu"):
            kernels = gpu_kernels(functools.partial(case.run, "triton"), *case.operands(placed))
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


def program_flops(text: str | None) -> int:
    """FLOPs of all matrix products of a program that XLA compiled for a GPU, each counted once.

    Raises:
      BimedixError: there is no text, or it contains products of a kind that is not counted here.
    """
    if not text:
        raise BimedixError("XLA does not print the compiled program, so that its FLOPs cannot be counted.")
    if "__cublas" in text or " convolution(" in text:
        raise BimedixError("The compiled program calls cuBLAS or cuDNN, whose FLOPs are not counted.")
    shapes = {name: [int(n) for n in sizes.split(",") if n] for name, sizes in SHAPE.findall(text)}
    total = 0
    for match in DOT.finditer(text):
        left = shapes[match["left"]]
        total += 2 * math.prod(shapes[match["name"]]) * math.prod(left[int(i)] for i in match["axes"].split(","))
    for match in CALL.finditer(text):
        part = TILE.search(match["name"])
        if part is None:
            raise BimedixError(f"The compiled program calls {match['name']}, whose FLOPs are not counted.")
        if part["kernel"] == UNPACK:
            continue
        # the first operand that is no tile's row or expert is x: [rows, contracted columns]
        rows, columns = re.findall(r"(?:bf16|f16|f32)\[(\d+),(\d+)\]", match["operands"])[0]
        contracted = int(rows if part["kernel"] == GRADIENT else columns)
        tile = (int(part["m"]), int(part["n"]), int(part["k"]))
        total += kernel_flops(part["kernel"], tile, (int(match["x"]), int(match["y"])), contracted)
    return total
