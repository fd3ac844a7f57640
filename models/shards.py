"""Collectives by logical axis: what a model asks for that runs on one shard of its arrays.

Inside `split`, a module holds its part of the heads, of the experts, of the feed-forward columns and of the rows of the
batch, and asks by logical name for what it lacks. Outside, everything here is the identity, so that the code of a layer
is the same on one device and on many. Which mesh axes a logical name means is decided in bimedix_jax/sharding/rules.py.

Gradients: each device differentiates its own share of the objective, and the shares of all devices sum to it. Then a
sum over devices transposes to a sum and a gather to a summed scatter, whatever is computed in between; what several
devices compute alike must enter the objective divided by their number (`copies`).
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

from bimedix_jax.models.axes import EXPERTS

GATHERED = "gathered"
"""Name of gathered parameters in checkpoint policies: the backward pass gathers them again instead of keeping them."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a whole parameter is put together from what devices store.

    Attributes:
      gathers: for each leaf, (axis counted from the end, mesh axes) of every gather.
      units: whether the parameter is an NF4Tensor whose last batch axis numbers parts of a unit, one on each device.
    """

    gathers: tuple[tuple[tuple[int, tuple[str, ...]], ...], ...]
    units: bool = False


@dataclasses.dataclass(frozen=True)
class Split:
    """What one shard lacks.

    Attributes:
      axes: mesh axes over which computation is split, by logical name.
      stored: by dotted path, for parameters of which devices store less than they compute with.
    """

    axes: tuple[tuple[str, tuple[str, ...]], ...]
    stored: tuple[tuple[str, Storage], ...]


# part of the key of JAX's caches: a function traced for a shard is traced anew for a whole model
current = jax.make_user_context(None)


@contextlib.contextmanager
def split(how: Split) -> Iterator[None]:
    """Runs the model code within on one shard; to be entered inside of shard_map."""
    with current(how):
        yield


def active() -> bool:
    """Whether the code runs on a shard."""
    return current.value is not None


def mesh_axes(name: str) -> tuple[str, ...]:
    return () if current.value is None else dict(current.value.axes).get(name, ())


def count(name: str) -> int:
    """Number of parts that a logical axis is split into."""
    return lax.axis_size(mesh_axes(name)) if mesh_axes(name) else 1


def index(name: str) -> jax.Array:
    """This shard's part of a logical axis, int32 scalar."""
    return lax.axis_index(mesh_axes(name)) if mesh_axes(name) else jnp.zeros((), jnp.int32)


def is_split_like(name: str, other: str) -> bool:
    """Whether every mesh axis that splits `name` splits `other` as well."""
    return set(mesh_axes(name)) <= set(mesh_axes(other))


def sum_over(name: str, x: Any) -> Any:
    """The sum of a pytree over the parts of a logical axis, on all of them."""
    return lax.psum(x, mesh_axes(name)) if mesh_axes(name) else x


def gather(name: str, x: jax.Array, axis: int = 0) -> jax.Array:
    """The parts of all shards side by side along `axis`, on all of them."""
    return lax.all_gather(x, mesh_axes(name), axis=axis, tiled=True) if mesh_axes(name) else x


def sum_and_scatter(name: str, x: jax.Array, axis: int = 0) -> jax.Array:
    """This shard's part along `axis` of the sum over all shards: the transpose of `gather`."""
    return lax.psum_scatter(x, mesh_axes(name), scatter_dimension=axis, tiled=True) if mesh_axes(name) else x


def own_part(name: str, x: jax.Array, axis: int) -> jax.Array:
    """This shard's part along `axis` of an array that all shards hold, with zeros behind its end where needed."""
    parts = count(name)
    if parts == 1:
        return x
    width = -(-x.shape[axis] // parts)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, width * parts - x.shape[axis])
    return lax.dynamic_slice_in_dim(jnp.pad(x, padding), index(name) * width, width, axis)


def whole(path: str, value: Any) -> Any:
    """A parameter, or this shard's part of it if computation is split, from what this device stores of it.

    A 4-bit parameter is gathered as packed bytes.
    """
    storage = None if current.value is None else dict(current.value.stored).get(path)
    if storage is None:
        return value
    leaves, tree = jax.tree.flatten(value)
    gathered = []
    for leaf, steps in zip(leaves, storage.gathers, strict=True):
        for axis, names in steps:
            with jax.named_scope("gather_parameters"):
                leaf = lax.all_gather(leaf, names, axis=leaf.ndim + axis, tiled=True)
        gathered.append(checkpoint_name(leaf, GATHERED) if steps else leaf)
    value = jax.tree.unflatten(tree, gathered)
    return value[(slice(None),) * (len(value.batch_shape) - 1) + (0,)] if storage.units else value


def keep_all_but_parameters(primitive: Any, *_: Any, **params: Any) -> bool:
    """Checkpoint policy that keeps every value but gathered parameters, which the backward pass gathers again.

    Kept, the gathered parameters of all layers would be the whole model on each device. JAX 0.10's own
    `save_anything_except_these_names` ignores its names. Slices are not kept either, since a gathered one would be.
    """
    if primitive.name == "name":
        return params["name"] != GATHERED
    if primitive.name == "all_gather":  # tokens are gathered over the axes of the experts, parameters over others
        names = params["axis_name"]
        return set(names if isinstance(names, tuple) else (names,)) <= set(mesh_axes(EXPERTS))
    return primitive.name not in ("slice", "squeeze")


def whole_state(prefix: str, state: Any) -> Any:
    """`whole` of every variable of a state whose paths continue `prefix`."""
    if not active():
        return state
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state(
        [(path, variable.replace(whole(dotted(prefix, path), variable.get_value()))) for path, variable in flat]
    )


def dotted(prefix: str, path: tuple) -> str:
    return ".".join([prefix, *map(str, path)])
