"""The mesh, and the table from logical axes to mesh axes.

The mesh has four axes. `data`, `fsdp` and `expert` divide the rows of a batch. `fsdp` also shards the storage of every
matrix, which is gathered layer by layer (4-bit ones as packed bytes). `expert` also divides the experts, and each of
its shards gathers the tokens of the others. `tensor` divides the heads and feed-forward columns of matrix products.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bimedix_jax.errors import BimedixError
from bimedix_jax.models.axes import EMBED, EXPERTS, HEADS, KV_HEADS, MLP, VOCAB
from bimedix_jax.models.config import MixtralConfig

AXES = ("data", "fsdp", "expert", "tensor")
"""Axes of the mesh, from the slowest network to the fastest."""

BATCH_AXES = ("data", "fsdp", "expert")
"""Axes that divide the rows of a batch."""

COMPILER_OPTIONS = {"gpu": {"xla_gpu_enable_latency_hiding_scheduler": True}}
"""By platform, for programs on several devices: overlap gathers and computation."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a logical axis of a parameter is divided over the mesh.

    Attributes:
      split: mesh axis that divides computation and storage; a device has its part only.
      stored: mesh axes that further divide storage; the parameter is gathered before use.
    """

    split: str | None = None
    stored: tuple[str, ...] = ()


RULES = {
    EXPERTS: Rule(split="expert", stored=("fsdp",)),  # gathered along its first axis, a matrix needs no transpose
    HEADS: Rule(split="tensor", stored=("fsdp",)),
    KV_HEADS: Rule(split="tensor", stored=("fsdp",)),
    MLP: Rule(split="tensor", stored=("fsdp",)),
    VOCAB: Rule(stored=("tensor", "fsdp")),
    EMBED: Rule(stored=("fsdp",)),
}
"""Logical axes of parameters. Axes that are missing here are not divided. A mesh axis divides one axis of a parameter:
the first one in this table that the parameter has and whose size is a multiple of the mesh axis."""


def make_mesh(data: int = 1, fsdp: int | None = None, expert: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """A mesh of these sizes over `devices` (all by default); `fsdp` None takes the remaining devices.

    Raises:
      BimedixError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp or 1, "expert": expert, "tensor": tensor}
    if min(sizes.values()) < 1:
        raise BimedixError(f"The sizes of mesh axes must be at least 1, got {sizes}.")
    if fsdp is None:
        sizes["fsdp"] = max(1, len(devices) // math.prod(sizes.values()))
    if math.prod(sizes.values()) != len(devices):
        asked = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise BimedixError(
            f"A mesh of {asked} needs {math.prod(sizes.values())} devices, there are {len(devices)}; change mesh.data, "
            "mesh.fsdp, mesh.expert or mesh.tensor."
        )
    shape = tuple(sizes[name] for name in AXES)
    if devices[0].platform == "tpu" and len(devices) > 1:
        from jax.experimental import mesh_utils

        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)
    return Mesh(np.array(devices).reshape(shape), AXES)


def check_mesh(config: MixtralConfig, mesh: Mesh) -> None:
    """Raises BimedixError if the mesh cannot divide the heads, experts or columns of the model."""
    size = {name: mesh.shape[name] for name in AXES}
    for what, number, axis in (
        ("experts", config.router.num_experts, "expert"),
        ("heads", config.num_heads, "tensor"),
        ("key heads", config.num_kv_heads, "tensor"),
        ("feed-forward columns", config.intermediate_size, "tensor"),
    ):
        if number % size[axis]:
            raise BimedixError(
                f"{number} {what} cannot be divided among {size[axis]} devices; choose a mesh.{axis} that divides "
                f"{number}."
            )


def divide(
    shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh, whole: tuple[str, ...] = ()
) -> tuple[P, tuple[tuple[int, tuple[str, ...]], ...]]:
    """(PartitionSpec of an array with these logical axes, the gathers before its use).

    Args:
      whole: mesh axes that must not divide it.
    """
    names: list[list[str]] = [[] for _ in shape]
    gathers = []
    matrix = sum(axis is not None and axis in RULES for axis in axes) and len(shape) - (axes[0] == "layers") >= 2
    free = {name for name in AXES if mesh.shape[name] > 1 and name not in whole}
    for logical, rule in RULES.items():
        for dimension in [d for d, axis in enumerate(axes) if axis == logical]:
            if rule.split in free:
                names[dimension].append(rule.split)
                free.discard(rule.split)
            held = math.prod(mesh.shape[name] for name in names[dimension])
            taken = []
            for name in rule.stored if matrix else ():
                if name in free and shape[dimension] % (held * mesh.shape[name]) == 0:
                    taken.append(name)
                    free.discard(name)
                    held *= mesh.shape[name]
            names[dimension] += taken
            if taken:
                gathers.append((dimension - len(shape), tuple(taken)))
    return P(*(tuple(part) if part else None for part in names)), tuple(gathers)


def own_experts(mesh: Mesh, experts: int) -> set[int]:
    """Experts of which the devices of this process have a part."""
    parts = NamedSharding(mesh, P("expert")).addressable_devices_indices_map((experts,)).values()
    return {number for part in parts if part for number in range(*part[0].indices(experts))}


def split_axis(axes: tuple[str | None, ...], mesh: Mesh) -> int | None:
    """Axis, -1 or -2, along which `tensor` divides products with a matrix of these logical axes; None for neither."""
    if mesh.shape["tensor"] == 1:
        return None
    return next((axis for axis in (-1, -2) if RULES.get(axes[axis] or "", Rule()).split == "tensor"), None)
