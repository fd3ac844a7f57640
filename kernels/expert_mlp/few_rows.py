"""Backend for decoding a few rows on a CPU: every row runs through each expert that any row chose.

Each expert is a branch of the program with separate arrays, and only the branches of chosen experts run. The other
backends would copy an expert's matrices from a stack, which takes longer than one row's products with them. Sorting and
gathering 16 rows would cost more than the products that it saves.

Matrices that are stored by output are read fastest with one row. Then pairs of a row and an expert run one by one,
sorted by expert, so that the cache still has the matrices of the pair before.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from bimedix_jax.kernels.by_output import ByOutput
from bimedix_jax.kernels.expert_mlp.layout import GivenDeltas, GivenWeights, without_layers
from bimedix_jax.kernels.nf4_matmul import matmul
from bimedix_jax.kernels.permute import Permutation
from bimedix_jax.kernels.unstacked import Unstacked, is_unstacked

MAX_ROWS, MAX_EXPERTS = 16, 64
"""Limits: every row runs through each chosen expert, and each expert is compiled separately."""
PAIRS_PER_EXPERT = 2.5
"""Most pairs for each expert that run one by one: a product of 8 rows takes as long as two or three of one row."""


def takes_pairs(rows: int, chosen: int, experts: int) -> bool:
    """Whether pairs run one by one, if matrices are stored by output and a row chooses `chosen` experts."""
    return rows * chosen <= PAIRS_PER_EXPERT * experts


def refusal(rows: int, weights: GivenWeights) -> str | None:
    """The reason why this backend cannot take these operands, or None."""
    if not all(map(is_unstacked, weights)):
        return "it takes weights whose experts are Unstacked, and some of these are stacked."
    if rows > MAX_ROWS:
        return f"it takes {MAX_ROWS} rows or fewer, not {rows}."
    if (experts := weights[0].shape[0]) > MAX_EXPERTS:
        return f"it takes {MAX_EXPERTS} experts or fewer, not {experts}."
    return None


def weights_by_expert(weights_NK: jax.Array, permutation: Permutation) -> tuple[jax.Array, jax.Array]:
    """(float32 weight of each expert for each row, whether the row chose it), both [N, E]."""
    stops_E = jnp.cumsum(permutation.group_sizes_E)
    owner_M = jnp.sum(permutation.inverse_M[:, None] >= stops_E[None], axis=1)  # E where the pair has no expert
    chosen_NKE = owner_M.reshape(*weights_NK.shape, 1) == jnp.arange(stops_E.shape[0])[None, None]
    weights_NE = jnp.sum(jnp.where(chosen_NKE, weights_NK[..., None].astype(jnp.float32), 0), axis=1)
    return weights_NE, jnp.any(chosen_NKE, axis=1)


def expert_mlp(
    x_ND: jax.Array,
    weights_NK: jax.Array,
    permutation: Permutation,
    weights: tuple[Unstacked, ...],
    deltas: GivenDeltas,
) -> jax.Array:
    """Differentiated by JAX, without a custom gradient."""
    factors = without_layers(deltas)
    with jax.named_scope("dispatch"):
        weights_NE, chosen_NE = weights_by_expert(weights_NK, permutation)

    def linear(x: jax.Array, i: int, e: int, out_dtype: jnp.dtype) -> jax.Array:
        y, pair = matmul(x, weights[i][e], out_dtype), factors[i]
        return y if pair is None else y + matmul(matmul(x, pair[0][e]), pair[1][e], out_dtype)

    def expert(e: int, x_ND: jax.Array) -> jax.Array:
        with jax.named_scope("experts/w1_w3"):
            hidden_NF = jax.nn.silu(linear(x_ND, 0, e, x_ND.dtype)) * linear(x_ND, 1, e, x_ND.dtype)
        with jax.named_scope("experts/w2"):
            return linear(hidden_NF, 2, e, jnp.dtype("float32"))

    def weighted(e: int, x_ND: jax.Array) -> jax.Array:
        y_ND = expert(e, x_ND)
        with jax.named_scope("combine"):
            # rows that did not choose this expert may overflow
            return jnp.where(chosen_NE[:, e, None], y_ND * weights_NE[:, e, None], 0)

    def skip(x_ND: jax.Array) -> jax.Array:
        return jnp.zeros(x_ND.shape, jnp.float32)

    experts, by_output = weights[0].shape[0], isinstance(weights[0][0], ByOutput)
    rows, chosen = weights_NK.shape
    if by_output and rows > 1 and takes_pairs(rows, chosen, experts):
        branches = [*(functools.partial(expert, e) for e in range(experts)), skip]
        return pair_by_pair(x_ND, weights_NK, permutation, branches)
    total_ND = skip(x_ND)
    for e in range(experts):
        total_ND = total_ND + lax.cond(permutation.group_sizes_E[e] > 0, functools.partial(weighted, e), skip, x_ND)
    return total_ND.astype(x_ND.dtype)


def pair_by_pair(
    x_ND: jax.Array,
    weights_NK: jax.Array,
    permutation: Permutation,
    branches: Sequence[Callable[[jax.Array], jax.Array]],
) -> jax.Array:
    """The weighted sum of each row's experts; `branches` compute a row [1, D] in float32, the last one zeros."""
    stops_E = jnp.cumsum(permutation.group_sizes_E)

    def step(m: jax.Array, total_ND: jax.Array) -> jax.Array:
        pair = permutation.order_M[m]
        row = pair // weights_NK.shape[1]
        owner = jnp.sum(m >= stops_E)  # E where the pair has no expert
        y_1D = lax.switch(owner, branches, lax.dynamic_slice_in_dim(x_ND, row, 1))
        y_1D = y_1D * weights_NK.reshape(-1)[pair].astype(jnp.float32)
        return lax.dynamic_update_slice_in_dim(total_ND, lax.dynamic_slice_in_dim(total_ND, row, 1) + y_1D, row, 0)

    zeros_ND = jnp.zeros(x_ND.shape, jnp.float32)
    return lax.fori_loop(0, permutation.order_M.shape[0], step, zeros_ND).astype(x_ND.dtype)
