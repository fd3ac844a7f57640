"""Operands inside shard_map with `check_vma=True`, where JAX tracks which arrays vary across devices."""

from typing import Any

import jax
from jax import lax


def varying(*operands: Any) -> frozenset[str]:
    """Mesh axes along which any array of these pytrees differs between devices."""
    axes = (jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(operands))
    return frozenset[str]().union(*axes)


def vary_alike(*operands: Any) -> Any:
    """Marks all operands as varying along every mesh axis along which at least one of them varies.

    A custom gradient would have to sum the gradients of replicated operands over devices, but it does not know which
    operands are replicated. The transpose of this marking does the sum. Outside of shard_map, and with
    `check_vma=False`, the operands are returned unchanged.
    """
    axes = varying(*operands)

    def mark(leaf: jax.Array) -> jax.Array:
        missing = axes - varying(leaf)
        return lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(mark, operands)
