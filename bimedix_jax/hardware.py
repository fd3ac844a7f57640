"""Devices that programs are compiled for although they are not there.

XLA needs a description of a GPU, not the GPU: `pip install bimedix_jax[aot]` brings its CUDA compiler. Nothing that is
compiled here can run here.
"""

import functools
from typing import Any

import jax

from bimedix_jax.errors import BimedixError

A100_80GB = (
    "gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 "
    "shared_memory_per_core: 167936 threads_per_core_limit: 2048 core_count: 108 fpus_per_core: 64 "
    "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 "
    "memory_bandwidth: 2039000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41 device_memory_size: 84929347584 "
    "shared_memory_per_block_optin: 166912 cuda_compute_capability { major: 8 minor: 0 } "
    "registers_per_core_limit: 65536 registers_per_block_limit: 65536 } "
    'platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 patch: 0 } '
    'device_description_str: "NVIDIA A100-SXM4-80GB"'
)
"""What XLA asks to know of an A100-SXM4-80GB (numbers: NVIDIA A100 data sheet and CUDA C++ Programming Guide, compute
capability 8.0)."""

TARGETS = {"a100-80gb": A100_80GB}
"""GPUs by name."""


@functools.cache
def devices(name: str, count: int = 1) -> list[Any]:
    """`count` absent devices of a kind, to put into shardings of abstract arguments of `jax.jit(...).lower`.

    Raises:
      BimedixError: unknown name, or the compiler for it is not installed.
    """
    from jax.experimental import topologies

    if name not in TARGETS:
        raise BimedixError(f"No description of {name}; known are {', '.join(TARGETS)}.")
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=name, target_config=TARGETS[name], topology=f"1x1x{count}"
        )
    except (RuntimeError, ValueError, ImportError, jax.errors.JaxRuntimeError) as error:
        raise BimedixError(
            f"XLA cannot compile for {name} here ({str(error).splitlines()[0]}); install bimedix_jax[aot] (Linux only)."
        ) from error
    return list(topology.devices)
