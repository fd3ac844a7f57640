"""Matrix products that accumulate in float32, and 16-bit floats as integers of their bits."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped


def dot(x: jax.Array, w: jax.Array, contract_w: int = 0) -> jax.Array:
    """x [..., K] times w over its axis `contract_w` of length K: float32."""
    return lax.dot_general(x, w, (((x.ndim - 1,), (contract_w,)), ((), ())), preferred_element_type=jnp.float32)


def transposed(x: jax.Array) -> jax.Array:
    """x.T of a matrix, materialised so that XLA:CPU cannot fold it into a product.

    XLA:CPU folds a transpose into the product next to it, and has no such product for 16-bit floats: hence the
    transpose of integers. A transpose alone would also give a column-major layout, for which XLA:CPU converts both
    operands to float32: hence the reshape to one axis.
    """
    kind = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = lax.optimization_barrier(lax.bitcast_convert_type(x, kind).T.reshape(-1))
    return lax.bitcast_convert_type(bits.reshape(x.shape[1], x.shape[0]), x.dtype)


def dot_rows(x: jax.Array, y: jax.Array) -> jax.Array:
    """x [K, M] and y [K, N] over their rows: float32 [M, N].

    Transposes x, or instead y and the result, whichever moves fewer elements.
    """
    (rows, m), n = x.shape, y.shape[1]
    if rows * m > rows * n + 2 * m * n:
        return transposed(dot(transposed(y), x))
    return dot(transposed(x), y)


def to_bits(x: Shaped[Array, "*n"]) -> Shaped[Array, "*n"]:
    """16-bit floats as integers of their bits; other dtypes unchanged.

    XLA:CPU converts 16-bit floats to float32 for everything but products, even for copies. This is expensive in a loop:
    XLA makes a float32 copy of a whole operand before the loop that slices it, and rewrites the whole target of each
    update. Integers are copied unchanged.
    """
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype in (jnp.bfloat16, jnp.float16) else x


def from_bits(bits: Shaped[Array, "*n"], dtype: jnp.dtype) -> Shaped[Array, "*n"]:
    """Inverse of `to_bits` for a float of `dtype`."""
    return lax.bitcast_convert_type(bits, dtype) if bits.dtype == jnp.uint16 else bits
