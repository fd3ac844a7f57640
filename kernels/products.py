"""The two shapes of matrix product that kernels are made of. All accumulate in float32."""

import jax
import jax.numpy as jnp
from jax import lax


def dot(x: jax.Array, w: jax.Array, contract_w: int = 0) -> jax.Array:
    """x [..., K] times w over its axis `contract_w` of length K: float32."""
    return lax.dot_general(x, w, (((x.ndim - 1,), (contract_w,)), ((), ())), preferred_element_type=jnp.float32)


def dot_rows(x: jax.Array, y: jax.Array) -> jax.Array:
    """x [K, M] and y [K, N] over their rows: float32 [M, N].

    The transpose is written out: XLA:CPU runs a product with a transposed left side at a third of the speed or less,
    and folds a transpose that is not held back into exactly that.
    """
    return dot(lax.optimization_barrier(x.T), y)
