"""Backend composed of the other operations. It runs on every platform and differentiates dense weights too."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from bimedix_jax.kernels.expert_mlp.layout import GivenDeltas, Weights, out_of_stacks
from bimedix_jax.kernels.grouped_low_rank import grouped_low_rank
from bimedix_jax.kernels.grouped_matmul import grouped_matmul
from bimedix_jax.kernels.permute import Permutation, combine, dispatch

PRODUCTS = "expert_products"
"""Name in checkpoint policies of the results of the three products."""


def expert_mlp(
    x_ND: jax.Array, weights_NK: jax.Array, permutation: Permutation, weights: Weights, deltas: GivenDeltas
) -> jax.Array:
    sizes, matrices = permutation.group_sizes_E, out_of_stacks(weights, in_place=True)
    factors: tuple[Any, ...] = deltas

    def linear(x: jax.Array, i: int) -> jax.Array:
        y, pair = grouped_matmul(x, matrices[i], sizes), factors[i]
        return y if pair is None else y + grouped_low_rank(x, pair[0], pair[1], sizes)

    x_MD = dispatch(x_ND, permutation)
    with jax.named_scope("experts/w1_w3"):
        gate_MF, up_MF = (checkpoint_name(linear(x_MD, i), PRODUCTS) for i in (0, 1))
        hidden_MF = jax.nn.silu(gate_MF) * up_MF
    with jax.named_scope("experts/w2"):
        y_MD = checkpoint_name(linear(hidden_MF, 2), PRODUCTS)
    return combine(y_MD, weights_NK, permutation)
