"""x @ w with float32 accumulation; a 4-bit w is dequantised inside, in the forward and again in the backward pass."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bimedix_jax.kernels.nf4 import NF4Tensor, dequantize
from bimedix_jax.kernels.nf4.api import block_scales
from bimedix_jax.kernels.nf4.planes import is_planar, merge_columns, planes, split_columns
from bimedix_jax.kernels.nf4.tensor import zero_cotangent


def dot(x: jax.Array, w: jax.Array, contract_w: int = 0) -> jax.Array:
    """[..., K] times w over its axis `contract_w`: float32."""
    return lax.dot_general(x, w, (((x.ndim - 1,), (contract_w,)), ((), ())), preferred_element_type=jnp.float32)


def packed_product(x: jax.Array, t: NF4Tensor) -> jax.Array:
    if not is_planar(t):
        return dot(x, dequantize(t, x.dtype)).astype(x.dtype)
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


def matmul(x: Float[Array, "*rows D"], w_DF: Float[Array, "D F"] | NF4Tensor) -> Float[Array, "*rows F"]:
    """Product in the dtype of x, accumulated in float32.

    A dense weight is cast to the dtype of x. An NF4Tensor of one [D, F] unit is frozen: it gets no gradient, and the backward pass
    keeps its packed bytes, not its dequantised values.

    Raises:
      ValueError: shapes that do not fit.
    """
    if w_DF.ndim != 2 or w_DF.shape[0] != x.shape[-1]:
        raise ValueError(f"matmul needs x [..., D] and w [D, F]; got {x.shape} and {w_DF.shape}.")
    if isinstance(w_DF, NF4Tensor):
        return frozen_product(x, w_DF)
    return dot(x, w_DF.astype(x.dtype)).astype(x.dtype)
