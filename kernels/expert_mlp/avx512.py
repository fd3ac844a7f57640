"""Backend in C++ for x86 processors with AVX-512 and its bfloat16 dot products (avx512/).

XLA:CPU multiplies blocks of an expert's rows by a matrix that was dequantised, or copied out of the stack, to memory,
and runs everything between two products as passes over float32 arrays. Here each thread dequantises a few outputs of an
expert into its cache and multiplies all rows of this expert by them; SwiGLU, its gradient, the adapters and all
conversions happen on sums in registers. Groups need no padding beyond 16 rows. The forward pass of training keeps gate
and up, so the backward pass recomputes no product of the base.

Both passes round where the backend `xla` does, except that gate and up are bfloat16 in the backward pass.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bimedix_jax.kernels import native, native_weights
from bimedix_jax.kernels.expert_mlp.composed import PRODUCTS
from bimedix_jax.kernels.expert_mlp.layout import Deltas, Weights
from bimedix_jax.kernels.expert_mlp.layout import refusal as layout_refusal
from bimedix_jax.kernels.expert_mlp.xla import gather, sum_pairs
from bimedix_jax.kernels.permute import Permutation
from bimedix_jax.kernels.products import to_bits

SOURCE = Path(__file__).with_suffix("") / "expert_mlp.cc"
FORWARD, BACKWARD = "bimedix_expert_mlp_forward", "bimedix_expert_mlp_backward"
LANES = 16
"""Ranks and the rows of an expert are padded to this."""

Saved = tuple[jax.Array, jax.Array]
"""What the backward pass reads, in the order of the kernels: products with first factors; gate and up."""


def refusal(dtype: Any, weights: tuple[Any, ...]) -> str | None:
    """The reason why it cannot take rows of this dtype and these weights, or None."""
    if dtype != jnp.bfloat16:
        return f"it computes in bfloat16, not in {jnp.dtype(dtype)}."
    if (reason := native_weights.refusal(weights) or layout_refusal(weights)) is not None:
        return reason
    return native.avx512_refusal(SOURCE, (FORWARD, BACKWARD))


def is_best(dtype: Any, width: int, hidden: int) -> bool:
    """Whether it is the fastest for such experts on this processor: not with matrix units (AMX), which XLA's products
    use."""
    fits = dtype == jnp.bfloat16 and native_weights.fits((width, hidden))
    return fits and native.has_avx512(matrix_units=False)


def padded_rows(rows: int, experts: int) -> int:
    """An upper bound for the sum of all groups' sizes, each rounded up to LANES."""
    return -(-(rows + experts * (LANES - 1)) // LANES) * LANES


def factors(weights: Weights, deltas: Deltas) -> list[Any]:
    """(a, b) of each matrix in bfloat16, with ranks padded to LANES; rank 0 without a delta."""
    found = []
    for w, pair in zip(weights, deltas, strict=True):
        experts, inputs, outputs = w.shape
        if pair is None:
            pair = (jnp.zeros((experts, inputs, 0)), jnp.zeros((experts, 0, outputs)))
        missing = -pair[0].shape[2] % LANES
        found += [
            jnp.pad(pair[0].astype(jnp.bfloat16), ((0, 0), (0, 0), (0, missing))),
            jnp.pad(pair[1].astype(jnp.bfloat16), ((0, 0), (0, missing), (0, 0))),
        ]
    return found


def call(
    name: str, results: list[tuple[tuple[int, ...], Any]], weights: Weights, operands: list[Any]
) -> list[jax.Array]:
    block, _, down_block = map(native_weights.block_size, weights)
    with jax.named_scope("experts"):
        return native.call(name, results, operands, block=block, down_block=down_block)


def forward(
    x_ND: jax.Array,
    weights_NK: jax.Array,
    permutation: Permutation,
    weights: Weights,
    deltas: Deltas,
    keep: bool = False,
) -> tuple[jax.Array, Saved]:
    """(y_ND, what `backward` needs); without `keep`, gate and up are empty."""
    experts, width, hidden = weights[0].shape
    rows = permutation.order_M.shape[0]
    low = factors(weights, deltas)
    rank = sum(a.shape[2] for a in low[::2])
    padded = padded_rows(rows, experts)
    shapes = [
        ((rows, width), jnp.bfloat16),
        ((padded, rank), jnp.uint16),
        ((padded if keep else 0, 2 * hidden), jnp.uint16),
    ]
    operands = [x_ND, permutation.order_M, permutation.group_sizes_E, *native_weights.operands(weights), *low]
    y_MD, *saved = call(FORWARD, shapes, weights, operands)
    lows, gates = (checkpoint_name(part, PRODUCTS) for part in saved)
    return sum_pairs(to_bits(y_MD), permutation, weights_NK, y_MD.dtype).astype(x_ND.dtype), (lows, gates)


def backward(
    x_ND: jax.Array,
    weights_NK: jax.Array,
    permutation: Permutation,
    weights: Weights,
    deltas: Deltas,
    saved: Saved,
    dout_ND: jax.Array,
) -> tuple[jax.Array, jax.Array, Deltas]:
    """Gradients of x, of the pairs' weights, and of the adapters' factors (in their dtype)."""
    experts, width, hidden = weights[0].shape
    rows = permutation.order_M.shape[0]
    low = factors(weights, deltas)
    scale_M = gather(weights_NK.reshape(-1).astype(jnp.float32), permutation.order_M)
    r1, r3, r2 = (a.shape[2] for a in low[::2])
    shapes = [
        ((rows, width), jnp.bfloat16),
        ((rows,), jnp.float32),
        *(
            ((experts, *shape), jnp.float32)
            for shape in ((r1, width), (hidden, r1), (r3, width), (hidden, r3), (hidden, r2), (r2, width))
        ),
    ]
    operands = [x_ND, permutation.order_M, permutation.group_sizes_E, *native_weights.operands(weights), *low]
    operands += [dout_ND.astype(jnp.bfloat16), scale_M, *saved]
    dx_MD, dscale_M, da1, db1, da3, db3, da2, db2 = call(BACKWARD, shapes, weights, operands)
    ones = jnp.ones(weights_NK.shape, jnp.float32)
    dx_ND = sum_pairs(to_bits(dx_MD), permutation, ones, dx_MD.dtype).astype(x_ND.dtype)
    owned_M = permutation.inverse_M < jnp.sum(permutation.group_sizes_E)
    dweights_NK = jnp.where(owned_M, gather(dscale_M, permutation.inverse_M), 0).reshape(weights_NK.shape)
    gradients = ((da1.mT, db1.mT), (da3.mT, db3.mT), (da2, db2))
    ddeltas = tuple(
        None
        if pair is None
        else (da[:, :, : pair[0].shape[2]].astype(pair[0].dtype), db[:, : pair[1].shape[1]].astype(pair[1].dtype))
        for pair, (da, db) in zip(deltas, gradients, strict=True)
    )
    return dx_ND, dweights_NK.astype(weights_NK.dtype), ddeltas
