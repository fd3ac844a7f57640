"""Absent devices to compile for.

To compile for a GPU, XLA needs only a description of it. The TPU compiler is a library that knows all TPUs. `pip
install bimedix_jax[aot]` installs both compilers. The compiled programs cannot run on this machine.
"""

import functools
import os
from pathlib import Path
from typing import Any

from bimedix_jax.errors import BimedixError

GPU = (
    "gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 "
    "shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus} "
    "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 "
    "memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: {memory} "
    "shared_memory_per_block_optin: {block} cuda_compute_capability {{ major: {capability} minor: 0 }} "
    "registers_per_core_limit: 65536 registers_per_block_limit: 65536 }} "
    'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 patch: 0 }} '
    'device_description_str: "{name}"'
)
"""XLA's description of a GPU."""

A100 = {"shared": 167936, "cores": 108, "fpus": 64, "cache": 41943040, "clock": 1.41, "block": 166912, "capability": 8}
"""NVIDIA A100 data sheet and CUDA C++ Programming Guide, compute capability 8.0."""
H100 = {"shared": 233472, "cores": 132, "fpus": 128, "cache": 52428800, "clock": 1.98, "block": 232448, "capability": 9}
"""NVIDIA H100 data sheet and CUDA C++ Programming Guide, compute capability 9.0."""

TARGETS = {
    "a100-80gb": GPU.format(name="NVIDIA A100-SXM4-80GB", bandwidth=2039000000000, memory=84929347584, **A100),
    "a100-40gb": GPU.format(name="NVIDIA A100-SXM4-40GB", bandwidth=1555200000000, memory=42331013120, **A100),
    "h100-80gb": GPU.format(name="NVIDIA H100 80GB HBM3", bandwidth=3352320000000, memory=84942979072, **H100),
}
"""GPUs by name, with the memory that their drivers report (openxla/xla, xla/backends/gpu/target_config/specs)."""

TOPOLOGIES = {
    "v5e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v5p": {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"},
}
"""TPUs by name: topology by number of chips (Google Cloud TPU documentation, "TPU v5e" and "TPU v5p")."""

NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not query the cloud metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # the metadata server's answer; the requested topology overrides it
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # otherwise a second process fails on a lock
}
"""Environment for loading libtpu on a machine without TPUs. Variables that the user has set are kept."""


@functools.cache
def devices(name: str, count: int = 1) -> list[Any]:
    """`count` absent devices of a kind, for the shardings of abstract arguments of `jax.jit(...).lower`.

    GPUs are named in TARGETS, TPUs in TOPOLOGIES. For TPUs these are the first `count` chips of the smallest slice that
    is large enough. JAX must run on the CPU (JAX_PLATFORMS=cpu, as `startup.prepare` sets it). On a machine without
    TPUs, the variables of NO_TPU are set before libtpu is loaded.

    Raises:
      BimedixError: the name is unknown, no slice has this many chips, or the compiler is not installed.
    """
    import jax
    from jax.experimental import topologies

    if name in TARGETS:
        request = {
            "platform": "cuda",
            "topology_name": name,
            "target_config": TARGETS[name],
            "topology": f"1x1x{count}",
        }
    elif name in TOPOLOGIES:
        request = tpu_slice(name, count)
        if not any(True for pattern in ("accel[0-9]*", "vfio/[0-9]*") for _ in Path("/dev").glob(pattern)):
            for variable, value in NO_TPU.items():
                os.environ.setdefault(variable, value)
    else:
        raise BimedixError(f"No description of {name}; known are {', '.join([*TARGETS, *TOPOLOGIES])}.")
    try:
        topology = topologies.get_topology_desc(**request)
    except (RuntimeError, ValueError, ImportError, jax.errors.JaxRuntimeError) as error:
        raise BimedixError(
            f"XLA cannot compile for {name} here ({str(error).splitlines()[0]}); install bimedix_jax[aot] (Linux only) "
            "and set JAX_PLATFORMS=cpu before Python starts."
        ) from error
    return list(topology.devices)[:count]


def require_slice(name: str, count: int) -> None:
    """Raises BimedixError if these are TPUs that no slice has this number of; GPUs have no slices."""
    sizes = TOPOLOGIES.get(name, {count: ""})
    if count not in sizes:
        raise BimedixError(f"there is no slice of {count} {name} chips; name one of {', '.join(map(str, sizes))}")


def tpu_slice(name: str, count: int) -> dict[str, Any]:
    """Arguments of `get_topology_desc` for the smallest slice with this many chips."""
    fitting = [chips for chips in TOPOLOGIES[name] if chips >= count]
    if not fitting:
        raise BimedixError(f"The largest {name} slice known has {max(TOPOLOGIES[name])} chips, fewer than {count}.")
    chips = min(fitting)
    request: dict[str, Any] = {"platform": "tpu", "topology_name": f"{name}:{TOPOLOGIES[name][chips]}"}
    # by default a host has four chips, and a topology consists of whole hosts
    return {**request, "chips_per_host_bounds": (1, 1, 1)} if chips == 1 else request
