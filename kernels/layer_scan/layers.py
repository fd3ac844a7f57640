"""Forms of the layers' arrays: stacked, `Unstacked`, or stacks that a layer may read in place."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from bimedix_jax.kernels.stacks import LayerOf
from bimedix_jax.kernels.unstacked import Unstacked, is_unstacked

Body = Callable[[Any, jax.Array, Any, Any], tuple[jax.Array, Any, Any]]
"""body(constants, x, layer, slot) -> (next x, output that is stacked over layers, new slot of the memory)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InPlace:
    """Marks weights of `layers`, dense experts [L, E, in, out] or an NF4Tensor, that the body also takes as `LayerOf`.

    They are then read from the stack of all layers. Slicing the layer would copy it. NF4Tensors get no gradient.
    """

    stack: Any


def is_in_place(leaf: Any) -> bool:
    return isinstance(leaf, InPlace)


def unmarked(layers: Any, keep: tuple[type[Any], ...] = ()) -> Any:
    """`layers` with each InPlace replaced by its content, except those of these types."""

    def plain(leaf: Any) -> Any:
        if not is_in_place(leaf) or isinstance(leaf.stack, keep):
            return leaf
        return leaf.stack

    return jax.tree.map(plain, layers, is_leaf=is_in_place)


def without_stacks(layers: Any) -> Any:
    """`layers` with None for each InPlace: what a loop slices."""
    return jax.tree.map(lambda leaf: None if is_in_place(leaf) else leaf, layers, is_leaf=is_in_place)


def with_stacks(layers: Any, own: Any, layer: jax.Array) -> Any:
    """One layer: the slices `own` of `without_stacks(layers)`, and a LayerOf for each InPlace."""
    return jax.tree.map(
        lambda leaf, value: LayerOf(leaf.stack, layer) if is_in_place(leaf) else value,
        layers,
        own,
        is_leaf=is_in_place,
    )


def parts_of(layers: Any) -> list[Any]:
    """Every stacked array and every Unstacked of layers (without InPlace) or of memory."""
    return jax.tree.leaves(layers, is_leaf=is_unstacked)


def part(layers: Any, index: int) -> Any:
    """One layer's values."""
    return jax.tree.map(lambda leaf: leaf[index], layers, is_leaf=is_unstacked)


def refuse_unstacked(layers: Any, memory: Any) -> str | None:
    """The reason why a backend that compiles to a loop cannot take the operands, or None."""
    if any(isinstance(leaf, Unstacked) for leaf in parts_of((layers, memory))):
        return "it takes stacked arrays only, and some of these are Unstacked."
    return None
