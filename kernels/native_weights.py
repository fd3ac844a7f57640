"""Weights as operands of kernels in C++: dense bfloat16, or NF4 in the bytes of bitsandbytes."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.tables import DYNAMIC_MAP
from bimedix_jax.kernels.stacks import LayerOf, as_tensor

COLUMNS = 32
"""Widths and blocks are multiples of this."""


def fits(widths: Sequence[int]) -> bool:
    """Whether the kernels take matrices of these widths."""
    return all(width > 0 and width % COLUMNS == 0 for width in widths)


def refusal(weights: Sequence[Any]) -> str | None:
    """The reason why the kernels cannot take weights of these shapes, or None."""
    if not fits(weights[0].shape[-2:]):
        return f"widths must be positive multiples of {COLUMNS}, not {weights[0].shape[-2:]}."
    packed = [w for w in weights if isinstance(w, NF4Tensor)]
    if any(w.block_size % COLUMNS or w.dtype not in ("bfloat16", "float32") for w in packed):
        return f"packed weights must come from bfloat16 or float32, in blocks of a multiple of {COLUMNS}."
    return None


def takes_stack(stack: Any) -> bool:
    """Whether the kernels read a layer in this stack."""
    return isinstance(stack, NF4Tensor) or getattr(stack, "dtype", None) == jnp.bfloat16


def prepared(w: Any) -> Any:
    """Weights as `operands` takes them: in their stack if the kernels can read them there, and no RowMajor."""
    if isinstance(w, LayerOf) and not takes_stack(w.stack):
        w = w.value()
    return as_tensor(w)


def block_size(w: Any) -> int:
    """Of `prepared` weights; 0 for dense ones."""
    stack = w.stack if isinstance(w, LayerOf) else w
    return stack.block_size if isinstance(stack, NF4Tensor) else 0


def operands(weights: Sequence[Any]) -> list[jax.Array]:
    """Index of the layer, then for each matrix: values, scales of blocks, scales of groups and offsets of these under
    double quantisation, and the values that the scales' bytes stand for. What a matrix does not have is empty.

    The weights are `prepared`. Layers are read from their stacks if all weights are layers.
    """
    layers = [w for w in weights if isinstance(w, LayerOf)]
    if len(layers) == len(weights):
        layer, stacks = layers[0].layer, [w.stack for w in layers]
    else:
        layer, found = 0, [w.value() if isinstance(w, LayerOf) else w for w in weights]
        stacks = [jax.tree.map(lambda leaf: leaf[None], w) for w in found]
    return [jnp.asarray(layer, jnp.int32), *itertools.chain.from_iterable(map(stored, stacks))]


def stored(w: Any) -> tuple[Any, ...]:
    """The operands of a stack of matrices, dense or an NF4Tensor."""
    none = jnp.zeros(0, jnp.float32)
    if not isinstance(w, NF4Tensor):
        return w.astype(jnp.bfloat16), none, none, none, none
    if w.nested_absmax is None or w.nested_offset is None:
        return w.packed, w.absmax, none, none, none
    return w.packed, w.absmax, w.nested_absmax, w.nested_offset, jnp.asarray(DYNAMIC_MAP)
