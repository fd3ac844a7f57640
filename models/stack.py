"""A stack of equal layers as one loop, in the form that XLA:CPU runs fast.

XLA:CPU moves 16-bit floats as float32: in a loop, every dynamic slice of a stack of bfloat16 weights converts the whole
stack first, and every update of a stack of bfloat16 residuals rewrites all of it. Integers of 16 bits move as they are,
so whatever is stacked (weights, and what the backward pass keeps of each layer) is stacked as its bits.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.expert_mlp import LayerOf
from bimedix_jax.kernels.products import from_bits, to_bits
from bimedix_jax.models import shards

Body = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]
"""body(constants, x, layer) -> (next x, what is stacked over layers)."""


InPlace = Callable[[Any, Any], bool]
"""in_place(path, array): whether `body` takes this array of `layers` as a LayerOf."""


def nowhere(path: Any, array: Any) -> bool:
    del path, array
    return False


def run_stack(
    body: Body, constants: Any, x: jax.Array, layers: Any, in_place: InPlace = nowhere
) -> tuple[jax.Array, Any]:
    """`x` through all layers, whose arrays are stacked on their leading axes.

    Differentiable in x and in floating-point arrays of `layers`; not in `constants`, which `body` must not close over
    either. On a CPU and without gradients, arrays for which `in_place` holds are not taken out of their stacks.
    """
    if backends.platform() != "cpu" or shards.active():
        return lax.scan(lambda x, layer: body(constants, x, layer), x, layers)
    return scan_bits(body, in_place, constants, x, layers)


def is_key(dtype: Any) -> bool:
    """Random keys have no bits to speak of and move as they are."""
    return jnp.issubdtype(dtype, jax.dtypes.extended)


def bits_of(leaf: Any) -> jax.Array:
    return leaf if is_key(leaf.dtype) else to_bits(leaf)


def as_before(bits: jax.Array, dtype: Any) -> jax.Array:
    """Inverse of `bits_of`."""
    return bits if is_key(dtype) else from_bits(bits, jnp.dtype(dtype))


def all_to_bits(tree: Any) -> Any:
    return jax.tree.map(bits_of, tree)


def all_from_bits(bits: Any, like: Any) -> Any:
    """Inverse of `all_to_bits`; `like` is a tree of the same structure with the dtypes."""
    return jax.tree.map(lambda leaf, model: as_before(leaf, model.dtype), bits, like)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scan_bits(body: Body, in_place: InPlace, constants: Any, x: jax.Array, layers: Any) -> tuple[jax.Array, Any]:
    """lax.scan over bits."""
    named, tree = jax.tree_util.tree_flatten_with_path(layers)
    stays = [in_place(path, leaf) for path, leaf in named]
    stacks = [leaf if stay else bits_of(leaf) for (_, leaf), stay in zip(named, stays, strict=True)]

    def step(x: jax.Array, place: tuple[jax.Array, list[Any]]) -> tuple[jax.Array, Any]:
        layer, moved = place[0], iter(place[1])
        leaves = [
            LayerOf(stack, layer) if stay else as_before(next(moved), leaf.dtype)
            for stack, stay, (_, leaf) in zip(stacks, stays, named, strict=True)
        ]
        x, out = body(constants, x, tree.unflatten(leaves))
        return x, all_to_bits(out)

    moving = [stack for stack, stay in zip(stacks, stays, strict=True) if not stay]
    depth = stacks[0].shape[0]
    x, outs = lax.scan(step, x, (jnp.arange(depth, dtype=jnp.int32), moving))
    _, like = jax.eval_shape(lambda: body(constants, x, jax.tree.map(lambda leaf: leaf[0], layers)))
    return x, all_from_bits(outs, like)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """What the backward pass needs of all layers.

    Attributes:
      own: arrays that the layers computed, stacked, as bits.
      constants, layers: as they were given.
      fixed: NumPy constants of one layer, the same for all.
      dtypes: of `own` before they became bits.
      sources: of each array that one layer's backward pass reads, (which field of these, place there).
      tree: how that backward pass is put together from these.
    """

    own: list[Any]
    constants: Any
    layers: Any
    fixed: list[Any]
    dtypes: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    sources: tuple[tuple[str, int], ...] = dataclasses.field(metadata={"static": True})
    tree: Any = dataclasses.field(metadata={"static": True})


def forward(
    body: Body, in_place: InPlace, constants: Any, x: jax.Array, layers: Any
) -> tuple[tuple[jax.Array, Any], Kept]:
    del in_place  # the backward pass reads these arrays in other ways
    notes: dict[str, Any] = {}

    def step(x: jax.Array, bits: Any) -> tuple[jax.Array, Any]:
        layer = all_from_bits(bits, layers)
        (x, out), pull = jax.vjp(lambda x, layer: body(constants, x, layer), x, layer)
        leaves, notes["tree"] = jax.tree.flatten(pull)
        given = {id(leaf): ("constants", i) for i, leaf in enumerate(jax.tree.leaves(constants))}
        given |= {id(leaf): ("layers", i) for i, leaf in enumerate(jax.tree.leaves(layer))}
        notes["fixed"] = [leaf for leaf in leaves if isinstance(leaf, np.ndarray)]
        given |= {id(leaf): ("fixed", i) for i, leaf in enumerate(notes["fixed"])}
        own = [leaf for leaf in leaves if id(leaf) not in given]
        places = {id(leaf): ("own", i) for i, leaf in enumerate(own)} | given
        notes["sources"] = tuple(places[id(leaf)] for leaf in leaves)
        notes["dtypes"] = tuple(leaf.dtype for leaf in own)
        notes["out"] = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), out)
        return x, (all_to_bits(out), all_to_bits(own))

    x, (outs, own) = lax.scan(step, x, all_to_bits(layers))
    kept = Kept(own, constants, layers, notes["fixed"], notes["dtypes"], notes["sources"], notes["tree"])
    return (x, all_from_bits(outs, notes["out"])), kept


def backward(
    body: Body, in_place: InPlace, kept: Kept, cotangents: tuple[jax.Array, Any]
) -> tuple[Any, jax.Array, Any]:
    del body, in_place
    dx, douts = cotangents
    like, structure = jax.tree.flatten(kept.layers)
    differentiable = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in like]

    def step(dx: jax.Array, bits: Any) -> tuple[jax.Array, Any]:
        own, layer, dout = bits
        found = {
            "own": [as_before(leaf, dtype) for leaf, dtype in zip(own, kept.dtypes, strict=True)],
            "constants": jax.tree.leaves(kept.constants),
            "fixed": kept.fixed,
            "layers": all_from_bits(jax.tree.leaves(layer), like),
        }
        pull = jax.tree.unflatten(kept.tree, [found[where][place] for where, place in kept.sources])
        dx, dlayer = pull((dx, dout))
        return dx, [g for g, keep in zip(jax.tree.leaves(dlayer), differentiable, strict=True) if keep]

    dx, floating = lax.scan(step, dx, (kept.own, all_to_bits(kept.layers), douts), reverse=True)
    rest = iter(floating)
    dlayers = [
        next(rest) if keep else np.zeros(leaf.shape, jax.dtypes.float0)
        for leaf, keep in zip(like, differentiable, strict=True)
    ]
    return None, dx, jax.tree.unflatten(structure, dlayers)


scan_bits.defvjp(forward, backward)
