"""Data of the devices that `bimedix plan` knows, with sources, and the assumed efficiencies."""

import dataclasses
import re
from typing import Any

from bimedix_jax.errors import BimedixError

GIB = 2**30
NVIDIA_A100 = "NVIDIA A100 data sheet (2021); DGX A100: 8 GPUs on NVSwitch, eight 200 Gb/s InfiniBand ports"
NVIDIA_H100 = "NVIDIA H100 data sheet (2022); DGX H100: 8 GPUs on NVSwitch, eight 400 Gb/s InfiniBand ports"
GOOGLE_V5E = "Google Cloud TPU documentation, TPU v5e: 197 TFLOP/s, 16 GB at 819 GB/s, 1,600 Gb/s ICI over 4 links"
GOOGLE_V5P = "Google Cloud TPU documentation, TPU v5p: 459 TFLOP/s, 95 GB at 2,765 GB/s, 4,800 Gb/s ICI over 6 links"


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
      platform: "gpu" or "tpu".
      memory_bytes: memory that a program may use. Of a GPU 95 %, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95; the rest is
        for the CUDA context, NCCL and cuBLAS. Of a TPU what its compiler allows.
      bfloat16_flops, float32_flops: peak FLOP/s of dense matrix products. float32 is TF32 on GPUs, and six passes of
        bfloat16 on TPUs (JAX's precision HIGHEST).
      bandwidth: bytes/s of its memory.
      link_bandwidth: bytes/s that it sends within its node (GPU: NVLink, one direction) or slice (TPU: a ring over the
        two links of one axis).
      node: number of devices of a node or slice.
      node_bandwidth: bytes/s that each device sends to other nodes.
      launch_seconds: time between the end of one kernel and the start of the next.
    """

    name: str
    platform: str
    memory_bytes: int
    bfloat16_flops: float
    float32_flops: float
    bandwidth: float
    link_bandwidth: float
    node: int
    node_bandwidth: float
    launch_seconds: float
    source: str


A100: dict[str, Any] = {
    "platform": "gpu",
    "bfloat16_flops": 312e12,
    "float32_flops": 156e12,
    "link_bandwidth": 3e11,
    "node": 8,
}
A100 |= {"node_bandwidth": 25e9, "launch_seconds": 2e-6, "source": NVIDIA_A100}
H100: dict[str, Any] = {
    "platform": "gpu",
    "bfloat16_flops": 989e12,
    "float32_flops": 494e12,
    "link_bandwidth": 4.5e11,
    "node": 8,
}
H100 |= {"node_bandwidth": 50e9, "launch_seconds": 2e-6, "source": NVIDIA_H100}
V5E: dict[str, Any] = {
    "platform": "tpu",
    "bfloat16_flops": 197e12,
    "float32_flops": 197e12 / 6,
    "link_bandwidth": 1e11,
    "node": 256,
}
V5E |= {"node_bandwidth": 3.1e9, "launch_seconds": 5e-7, "source": GOOGLE_V5E}
V5P: dict[str, Any] = {
    "platform": "tpu",
    "bfloat16_flops": 459e12,
    "float32_flops": 459e12 / 6,
    "link_bandwidth": 2e11,
    "node": 8960,
}
V5P |= {"node_bandwidth": 6.2e9, "launch_seconds": 5e-7, "source": GOOGLE_V5P}

DEVICES = {
    "a100-80gb": Device("a100-80gb", memory_bytes=int(0.95 * 84929347584), bandwidth=2.039e12, **A100),
    "a100-40gb": Device("a100-40gb", memory_bytes=int(0.95 * 42331013120), bandwidth=1.555e12, **A100),
    "h100-80gb": Device("h100-80gb", memory_bytes=int(0.95 * 84942979072), bandwidth=3.35e12, **H100),
    "v5e": Device("v5e", memory_bytes=int(15.75 * GIB), bandwidth=8.19e11, **V5E),
    "v5p": Device("v5p", memory_bytes=95 * GIB, bandwidth=2.765e12, **V5P),
}
"""The names of `--devices NAME:COUNT`. `hardware.py` describes the same devices to the compilers."""

KINDS = {
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA H100 80GB HBM3": "h100-80gb",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
}
"""The devices above, by the beginning of the name that their driver reports."""
SAME_PEAKS = {"NVIDIA H200": "NVIDIA H100 80GB HBM3"}
"""Devices with the FLOP/s of another, but other memory (NVIDIA H200 data sheet, 2023)."""

MATMUL_SHARE = 0.7
"""Share of the peak FLOP/s that dense products reach. Large 16-bit GEMMs of cuBLAS and XLA:TPU reach 0.7 to 0.85."""
KERNEL_SHARE, PACKED_SHARE = {"gpu": 0.58, "tpu": 0.5}, {"gpu": 0.28, "tpu": 0.5}
"""Share of the peak FLOP/s that our kernels reach, with 16-bit weights and where they unpack weights themselves. The
GPU's are measured on an H100 (docs/results/gpu.md), not on an A100. The TPU's are not measured."""
MEMORY_SHARE = 0.8
"""Share of the HBM bandwidth that kernels reach."""
NETWORK_SHARE = 0.75
"""Share of the link bandwidth that collectives reach. NCCL's rings reach about 230 of 300 GB/s on A100s."""


def assumptions(device: Device) -> dict[str, float | str]:
    """The assumptions behind all predicted times, which are printed with them."""
    measured = {"gpu": "measured on one H100", "tpu": "never measured on TPUs"}[device.platform]
    return {
        "dense products reach, of peak FLOP/s": MATMUL_SHARE,
        f"our kernels reach, of peak FLOP/s ({measured})": KERNEL_SHARE[device.platform],
        "the same where they unpack weights themselves": PACKED_SHARE[device.platform],
        "kernels reach, of memory bandwidth": MEMORY_SHARE,
        "collectives reach, of link bandwidth": NETWORK_SHARE,
        "seconds between two kernels": device.launch_seconds,
        "overlap": "a kernel takes the longer of its compute and its memory time, and kernels run one after another; a "
        "collective overlaps with them only if the compiled schedule has kernels between its start and its wait",
        "peaks and bandwidths": device.source,
    }


def known(kind: str) -> Device | None:
    """The device whose driver reports this name; None if it is not known."""
    return next((DEVICES[name] for start, name in KINDS.items() if kind.startswith(start)), None)


def peak_flops(kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of dense products in bfloat16 or float32; None for a device that is not known, as any CPU."""
    found = known(SAME_PEAKS.get(kind, kind))
    return None if found is None else found.bfloat16_flops if dtype == "bfloat16" else found.float32_flops


@dataclasses.dataclass(frozen=True)
class Target:
    """A number of devices of one kind."""

    device: Device
    count: int

    @property
    def name(self) -> str:
        return f"{self.device.name}:{self.count}"


def target(text: str) -> Target:
    """Parses `a100-80gb:8`. Without a number it is one device.

    Raises:
      BimedixError: the device is unknown, or what follows the colon is not a positive number.
    """
    name, colon, count = text.partition(":")
    if name not in DEVICES:
        raise BimedixError(f"{text} is no target; write NAME:COUNT with a NAME among {', '.join(DEVICES)}.")
    if colon and (not re.fullmatch("[0-9]{1,9}", count) or int(count) < 1):
        raise BimedixError(f"{count} in {text} is no number of devices; write {name}:COUNT with a COUNT of at least 1")
    return Target(DEVICES[name], int(count) if colon else 1)
