"""The two shapes of matrix product that kernels are made of, accumulating in float32, and moves of 16-bit floats."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped


def dot(x: jax.Array, w: jax.Array, contract_w: int = 0) -> jax.Array:
    """x [..., K] times w over its axis `contract_w` of length K: float32."""
    return lax.dot_general(x, w, (((x.ndim - 1,), (contract_w,)), ((), ())), preferred_element_type=jnp.float32)


def transposed(x: jax.Array) -> jax.Array:
    """x.T of a matrix, written out in a way that XLA:CPU cannot fold into a product.

    It is moved as bits, because a transpose next to a product becomes a product with transposed sides, which XLA:CPU
    does not have for 16-bit floats; and through one axis, because the result of a transpose alone carries a
    column-major layout, with which it would convert both sides to float32.
    """
    kind = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = lax.optimization_barrier(lax.bitcast_convert_type(x, kind).T.reshape(-1))
    return lax.bitcast_convert_type(bits.reshape(x.shape[1], x.shape[0]), x.dtype)


def dot_rows(x: jax.Array, y: jax.Array) -> jax.Array:
    """x [K, M] and y [K, N] over their rows: float32 [M, N].

    Transposes x, or a narrow y and then the result, whichever moves less.
    """
    (rows, m), n = x.shape, y.shape[1]
    if rows * m > rows * n + 2 * m * n:
        return transposed(dot(transposed(y), x))
    return dot(transposed(x), y)


def to_bits(x: Shaped[Array, "*n"]) -> Shaped[Array, "*n"]:
    """A 16-bit float as the integers of its bits; other dtypes as they are.

    XLA:CPU does everything but products of 16-bit floats in float32, moves included. In a loop that is dear: it makes
    a float32 copy of a whole operand before the loop that slices it, and rewrites the whole target of each update.
    Integers are moved as they lie.
    """
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype in (jnp.bfloat16, jnp.float16) else x


def from_bits(bits: Shaped[Array, "*n"], dtype: jnp.dtype) -> Shaped[Array, "*n"]:
    """Inverse of `to_bits` for a float of `dtype`."""
    return lax.bitcast_convert_type(bits, dtype) if bits.dtype == jnp.uint16 else bits
