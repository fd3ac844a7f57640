"""Collectives by logical axis, for model code that runs on one shard.

Inside `split`, a module has its part of the heads, of the experts, of the feed-forward columns and of the rows of the
batch. It calls collectives by logical name. Outside of `split`, they are the identity, so the code of a layer is the
same on one device and on many. bimedix_jax/sharding/rules.py maps logical names to mesh axes.

Gradients: each device differentiates its share of the objective, and the objective is the sum of all shares. Then the
transpose of a sum over devices is a sum, and the transpose of a gather is a summed scatter. A term that several devices
compute redundantly must be divided by their number.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.rows import RowMajor
from bimedix_jax.kernels.stacks import LayerOf
from bimedix_jax.models.axes import EXPERTS

GATHERED = "gathered"
"""Name of gathered parameters in checkpoint policies: the backward pass gathers them again instead of keeping them."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a parameter is assembled from the parts that devices store.

    Attributes:
      gathers: for each leaf, the (axis counted from the end, mesh axes) of every gather.
      units: whether the parameter is an NF4Tensor whose last batch axis has one part of a unit for each device.
    """

    gathers: tuple[tuple[tuple[int, tuple[str, ...]], ...], ...]
    units: bool = False


@dataclasses.dataclass(frozen=True)
class Split:
    """How computation and storage are divided among shards.

    Attributes:
      axes: mesh axes that divide the computation, by logical name.
      stored: by dotted path, parameters that must be gathered before use.
    """

    axes: tuple[tuple[str, tuple[str, ...]], ...]
    stored: tuple[tuple[str, Storage], ...]


# part of the key of JAX's caches: a function traced for a shard is traced again for a model on one device
current = jax.make_user_context(None)


@contextlib.contextmanager
def split(how: Split) -> Iterator[None]:
    """Marks that the code inside runs on one shard; to be entered inside of shard_map."""
    with current(how):
        yield


def active() -> bool:
    """Whether the code runs on a shard."""
    return current.value is not None


def mesh_axes(name: str) -> tuple[str, ...]:
    return () if current.value is None else dict(current.value.axes).get(name, ())


def count(name: str) -> int:
    """Number of shards of a logical axis."""
    return lax.axis_size(mesh_axes(name)) if mesh_axes(name) else 1


def index(name: str) -> jax.Array:
    """Index of this shard along a logical axis, int32 scalar."""
    return lax.axis_index(mesh_axes(name)) if mesh_axes(name) else jnp.zeros((), jnp.int32)


def is_split_like(name: str, other: str) -> bool:
    """Whether every mesh axis that splits `name` splits `other` as well."""
    return set(mesh_axes(name)) <= set(mesh_axes(other))


def sum_over(name: str, x: Any) -> Any:
    """The sum of a pytree over the shards of a logical axis, on each of them."""
    return lax.psum(x, mesh_axes(name)) if mesh_axes(name) else x


def gather(name: str, x: jax.Array, axis: int = 0) -> jax.Array:
    """The parts of all shards concatenated along `axis`, on each of them."""
    return lax.all_gather(x, mesh_axes(name), axis=axis, tiled=True) if mesh_axes(name) else x


def sum_and_scatter(name: str, x: jax.Array, axis: int = 0) -> jax.Array:
    """This shard's part along `axis` of the sum over all shards: the transpose of `gather`."""
    return lax.psum_scatter(x, mesh_axes(name), scatter_dimension=axis, tiled=True) if mesh_axes(name) else x


def own_part(name: str, x: jax.Array, axis: int) -> jax.Array:
    """This shard's part along `axis` of an array that all shards have, padded with zeros at its end."""
    parts = count(name)
    if parts == 1:
        return x
    width = -(-x.shape[axis] // parts)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, width * parts - x.shape[axis])
    return lax.dynamic_slice_in_dim(jnp.pad(x, padding), index(name) * width, width, axis)


def gather_parameter(path: str, value: Any) -> Any:
    """The parameter that this shard computes with, gathered from the parts that devices store.

    4-bit parameters are gathered as packed bytes.
    """
    storage = None if current.value is None else dict(current.value.stored).get(path)
    if storage is None:
        return value
    if isinstance(value, LayerOf) and not any(storage.gathers):
        return dataclasses.replace(value, stack=own_unit(value.stack)) if storage.units else value
    leaves, tree = jax.tree.flatten(value)
    gathered = []
    for leaf, steps in zip(leaves, storage.gathers, strict=True):
        for axis, names in steps:
            with jax.named_scope("gather_parameters"):
                leaf = lax.all_gather(leaf, names, axis=leaf.ndim + axis, tiled=True)
        gathered.append(checkpoint_name(leaf, GATHERED) if steps else leaf)
    value = jax.tree.unflatten(tree, gathered)
    return own_unit(value) if storage.units else value


def own_unit(t: NF4Tensor | RowMajor) -> Any:
    """A packed parameter without its last batch axis, which has this device's part of every unit."""
    return jax.tree.map(lambda leaf: leaf[(slice(None),) * (len(t.batch_shape) - 1) + (0,)], t)


def keep_all_but_parameters(primitive: Any, *_: Any, **params: Any) -> bool:
    """Checkpoint policy that keeps all values but gathered parameters, which the backward pass gathers again.

    If it kept the gathered parameters of all layers, each device would have the whole model. In JAX 0.10,
    `save_anything_except_these_names` ignores its names. Slices are not kept either: they may be gathered parameters.
    """
    if primitive.name == "name":
        return params["name"] != GATHERED
    if primitive.name == "all_gather":  # tokens are gathered over the axes of the experts, parameters over others
        names = params["axis_name"]
        return set(names if isinstance(names, tuple) else (names,)) <= set(mesh_axes(EXPERTS))
    return primitive.name not in ("slice", "dynamic_slice", "squeeze")


def gathered_lead(path: str, value: Any) -> tuple[int, ...]:
    """Sizes of the axes before the matrices, [in, out], of a parameter as `gather_parameter` returns it."""
    storage = None if current.value is None else dict(current.value.stored).get(path)
    shape = list(value.shape)
    if storage is not None:
        leaf = jax.tree.leaves(value)[0]
        for axis, names in storage.gathers[0]:
            if leaf.ndim + axis < len(shape) - 2:
                shape[leaf.ndim + axis] *= lax.axis_size(names)
    return tuple(shape[:-2])


def is_gathered(path: str) -> bool:
    """Whether a shard has only a part of what it computes with, and gathers the other parts."""
    storage = None if current.value is None else dict(current.value.stored).get(path)
    return storage is not None and any(storage.gathers)


def gather_state(prefix: str, state: Any) -> Any:
    """`gather_parameter` of every variable of a state; `prefix` is the path of the state in the model."""
    if not active():
        return state
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state(
        [
            (path, variable.replace(gather_parameter(dotted(prefix, path), variable.get_value())))
            for path, variable in flat
        ]
    )


def dotted(prefix: str, path: tuple) -> str:
    return ".".join([prefix, *map(str, path)])
