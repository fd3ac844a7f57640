"""Forms of the layers' arrays: stacked, `Unstacked`, or stacks that a layer may read in place."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from bimedix_jax.kernels.unstacked import Unstacked, is_unstacked

Body = Callable[[Any, jax.Array, Any, Any], tuple[jax.Array, Any, Any]]
"""body(constants, x, layer, slot) -> (next x, output that is stacked over layers, new slot of the memory)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InPlace:
    """Marks a leaf of `layers`, dense weights of experts [L, E, in, out], that the body can also take as a `LayerOf`.

    A loop over experts then reads each expert from the stack. Slicing the layer would copy all of its experts.
    """

    stack: Any


def is_in_place(leaf: Any) -> bool:
    return isinstance(leaf, InPlace)


def unmarked(layers: Any, keep_arrays: bool = False) -> Any:
    """`layers` with each InPlace replaced by its content. `keep_arrays`: not those of stacked dense arrays."""

    def plain(leaf: Any) -> Any:
        if not is_in_place(leaf) or (keep_arrays and isinstance(leaf.stack, jax.Array)):
            return leaf
        return leaf.stack

    return jax.tree.map(plain, layers, is_leaf=is_in_place)


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
