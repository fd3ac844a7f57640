"""Operands inside shard_map with its check of what varies (`check_vma=True`)."""

from typing import Any

import jax
from jax import lax


def varying(*operands: Any) -> frozenset[str]:
    """Mesh axes along which any of the arrays (of any pytree of them) differs from device to device."""
    axes = (jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(operands))
    return frozenset[str]().union(*axes)


def vary_alike(*operands: Any) -> Any:
    """The operands, those that are the same on all devices marked as differing where another one differs.

    A custom gradient cannot tell which operands are replicated, and would have to return their gradients summed over
    devices; the transpose of this marking sums them. Without the check, or outside of shard_map, nothing happens.
    """
    axes = varying(*operands)

    def mark(leaf: jax.Array) -> jax.Array:
        missing = axes - varying(leaf)
        return lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(mark, operands)
