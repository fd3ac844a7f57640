"""Dispatch and combine as gathers, also in the backward pass.

Every token-expert pair is one row, so the permutation is a bijection. The transpose of a gather by it is a gather by
its inverse. JAX's gradient of a gather would be a scatter-add, which is serial on a CPU and atomic on a GPU.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bimedix_jax.kernels.manual_axes import vary_alike


class Permutation(NamedTuple):
    """The order of token-expert pairs after sorting by expert, M = N * K.

    Attributes:
      order_M: the pair, n * K + k, of each sorted row.
      inverse_M: sorted row of each pair.
      group_sizes_E: rows of each expert; pairs without an expert come after the last group.
    """

    order_M: jax.Array
    inverse_M: jax.Array
    group_sizes_E: jax.Array


def sort_by_expert(experts_NK: Int[Array, "N K"], num_experts: int) -> Permutation:
    """Stable sort of all pairs by expert. Ids are from 0 to num_experts, which means no expert and sorts last.

    Raises ValueError for ids that are no integers.
    """
    if not jnp.issubdtype(experts_NK.dtype, jnp.integer):
        raise ValueError(f"sort_by_expert needs integers, got {experts_NK.dtype}.")
    flat_M = experts_NK.reshape(-1)
    order_M = jnp.argsort(flat_M, stable=True).astype(jnp.int32)
    inverse_M = jnp.argsort(order_M).astype(jnp.int32)
    group_sizes_E = jnp.sum(flat_M[:, None] == jnp.arange(num_experts)[None], axis=0, dtype=jnp.int32)
    return Permutation(order_M, inverse_M, group_sizes_E)


def pairs_of_a_token(permutation: Permutation, tokens: int) -> int:
    """K; 1 where there is no token."""
    return permutation.order_M.shape[0] // tokens if tokens else 1


@jax.named_scope("dispatch")
def dispatch(x_ND: Float[Array, "N D"], permutation: Permutation) -> Float[Array, "M D"]:
    """The row of each pair's token, sorted by expert. Raises ValueError for a permutation of other tokens."""
    pairs, tokens = permutation.order_M.shape[0], x_ND.shape[0]
    if pairs % tokens if tokens else pairs:
        raise ValueError(f"dispatch needs a permutation of K pairs for each row of x {x_ND.shape}, got {pairs} pairs.")
    return gathered(*vary_alike(x_ND, permutation))


@jax.custom_vjp
def gathered(x_ND: jax.Array, permutation: Permutation) -> jax.Array:
    k = pairs_of_a_token(permutation, x_ND.shape[0])
    return x_ND.at[permutation.order_M // k].get(mode="promise_in_bounds")


def gathered_forward(x_ND: jax.Array, permutation: Permutation):
    return gathered(x_ND, permutation), (permutation, x_ND.shape[0])


def gathered_backward(residuals: tuple[Permutation, int], dy_MD: jax.Array):
    permutation, tokens = residuals
    pairs_MD = dy_MD.at[permutation.inverse_M].get(mode="promise_in_bounds")
    k = pairs_of_a_token(permutation, tokens)
    dx_ND = jnp.sum(pairs_MD.reshape(tokens, k, dy_MD.shape[1]), axis=1, dtype=jnp.float32)
    return dx_ND.astype(dy_MD.dtype), None


gathered.defvjp(gathered_forward, gathered_backward)


@jax.named_scope("combine")
def combine(
    y_MD: Float[Array, "M D"], weights_NK: Float[Array, "N K"], permutation: Permutation
) -> Float[Array, "N D"]:
    """Each token's sum of its pairs' rows times `weights_NK`, in float32, returned in the dtype of y.

    Raises ValueError if rows, weights and permutation differ in their number of pairs.
    """
    pairs = permutation.order_M.shape[0]
    if (y_MD.shape[0], weights_NK.size) != (pairs, pairs):
        raise ValueError(
            f"combine needs a row and a weight for each of {pairs} pairs; got {y_MD.shape} and {weights_NK.shape}."
        )
    return weighted_sum(*vary_alike(y_MD, weights_NK, permutation))


@jax.custom_vjp
def weighted_sum(y_MD: jax.Array, weights_NK: jax.Array, permutation: Permutation) -> jax.Array:
    pairs_NKD = y_MD.at[permutation.inverse_M].get(mode="promise_in_bounds").reshape(*weights_NK.shape, y_MD.shape[1])
    return jnp.sum(pairs_NKD * weights_NK[..., None], axis=1, dtype=jnp.float32).astype(y_MD.dtype)


def weighted_sum_forward(y_MD: jax.Array, weights_NK: jax.Array, permutation: Permutation):
    return weighted_sum(y_MD, weights_NK, permutation), (y_MD, weights_NK, permutation)


def weighted_sum_backward(residuals: tuple[jax.Array, jax.Array, Permutation], dout_ND: jax.Array):
    y_MD, weights_NK, permutation = residuals
    k = weights_NK.shape[1]
    # row m of the sorted side belongs to pair order_M[m], hence to token order_M[m] // k
    dout_MD = dout_ND.at[permutation.order_M // k].get(mode="promise_in_bounds")
    weights_M = weights_NK.reshape(-1).at[permutation.order_M].get(mode="promise_in_bounds")
    dy_MD = (dout_MD * weights_M[:, None]).astype(y_MD.dtype)
    dweights_M = jnp.sum(dout_MD.astype(jnp.float32) * y_MD.astype(jnp.float32), axis=1)
    dweights_NK = dweights_M.at[permutation.inverse_M].get(mode="promise_in_bounds").reshape(weights_NK.shape)
    return dy_MD, dweights_NK.astype(weights_NK.dtype), None


weighted_sum.defvjp(weighted_sum_forward, weighted_sum_backward)
