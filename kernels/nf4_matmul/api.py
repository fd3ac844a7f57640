"""x @ w with float32 accumulation; a 4-bit w is dequantised inside, in the forward and again in the backward pass."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.api import block_scales, layer_weights
from bimedix_jax.kernels.nf4.planes import is_planar, merge_columns, planes, split_columns
from bimedix_jax.kernels.nf4.tensor import zero_cotangent
from bimedix_jax.kernels.products import dot, dot_rows


def packed_product(x: jax.Array, t: NF4Tensor) -> jax.Array:
    if not is_planar(t):
        return dot(x, layer_weights(t, x.dtype)).astype(x.dtype)
    even, odd = planes(t.packed, block_scales(t), t, x.dtype)
    if t.transposed:
        x_even, x_odd = split_columns(x)
        return (dot(x_even, even, 1) + dot(x_odd, odd, 1)).astype(x.dtype)
    return merge_columns(dot(x, even).astype(x.dtype), dot(x, odd).astype(x.dtype))


@jax.custom_vjp
def frozen_product(x: jax.Array, t: NF4Tensor) -> jax.Array:
    return packed_product(x, t)


def frozen_forward(x: jax.Array, t: NF4Tensor) -> tuple[jax.Array, NF4Tensor]:
    return packed_product(x, t), t


def frozen_backward(t: NF4Tensor, dy: jax.Array) -> tuple[jax.Array, NF4Tensor]:
    return packed_product(dy, t.mT), jax.tree.map(zero_cotangent, t)


frozen_product.defvjp(frozen_forward, frozen_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense_product(x: jax.Array, w: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    """x [..., K] @ w [K, N] in out_dtype.

    JAX would transpose a product with float32 output into float32 products; here the cotangent is rounded to the dtype
    of x first, so that the backward products run on 16-bit units too.
    """
    return dot(x, w).astype(out_dtype)


def dense_forward(x: jax.Array, w: jax.Array, out_dtype: jnp.dtype) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return dense_product(x, w, out_dtype), (x, w)


def dense_backward(
    out_dtype: jnp.dtype, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del out_dtype
    x, w = residuals
    dy = dy.astype(x.dtype)
    dw = dot_rows(x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]))
    return dot(dy, w, 1).astype(x.dtype), dw.astype(w.dtype)


dense_product.defvjp(dense_forward, dense_backward)


def matmul(
    x: Float[Array, "*rows D"], w_DF: Float[Array, "D F"] | NF4Tensor, out_dtype: jnp.dtype | type | str | None = None
) -> Float[Array, "*rows F"]:
    """Product in `out_dtype` (that of x if None), accumulated in float32.

    A dense weight is cast to the dtype of x. An NF4Tensor of one [D, F] unit is frozen: it gets no gradient, and the
    backward pass keeps its packed bytes, not its dequantised values.

    Raises:
      ValueError: shapes that do not fit.
    """
    if w_DF.ndim != 2 or w_DF.shape[0] != x.shape[-1]:
        raise ValueError(f"matmul needs x [..., D] and w [D, F]; got {x.shape} and {w_DF.shape}.")
    if isinstance(w_DF, NF4Tensor):
        return frozen_product(x, w_DF).astype(out_dtype or x.dtype)
    return dense_product(x, w_DF.astype(x.dtype), jnp.dtype(out_dtype or x.dtype))
