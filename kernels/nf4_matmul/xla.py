"""Backend in plain XLA operations, for every platform: the matrix as two planes, one for each nibble of a byte."""

import jax

from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.api import block_scales, layer_weights
from bimedix_jax.kernels.nf4.planes import is_planar, merge_columns, planes, split_columns
from bimedix_jax.kernels.products import dot


def nf4_matmul(x: jax.Array, t: NF4Tensor) -> jax.Array:
    """x [..., D] @ t [D, F] in the dtype of x."""
    if not is_planar(t):
        return dot(x, layer_weights(t, x.dtype)).astype(x.dtype)
    even, odd = planes(t.packed, block_scales(t), t, x.dtype)
    if t.transposed:
        x_even, x_odd = split_columns(x)
        return (dot(x_even, even, 1) + dot(x_odd, odd, 1)).astype(x.dtype)
    return merge_columns(dot(x, even).astype(x.dtype), dot(x, odd).astype(x.dtype))
