"""expert_mlp: checks the operands, picks a backend, and differentiates."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from bimedix_jax.kernels import backends, native_weights
from bimedix_jax.kernels.expert_mlp import avx512, composed, few_rows, xla
from bimedix_jax.kernels.expert_mlp.layout import (
    Deltas,
    GivenDeltas,
    GivenWeights,
    Weights,
    without_layers,
)
from bimedix_jax.kernels.manual_axes import vary_alike
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.rows import RowMajor
from bimedix_jax.kernels.nf4.tensor import zero_cotangent
from bimedix_jax.kernels.permute import Permutation
from bimedix_jax.kernels.stacks import is_packed_layer, with_packed_sliced
from bimedix_jax.kernels.unstacked import is_unstacked, stack

BACKENDS = ("avx512", "xla", "composed", "few_rows")
FUSED = {"avx512": avx512, "xla": xla}
FUSED_SHARE = 1 / 4
"""From this many token-expert pairs for each expert on, as a share of the width D, the fused loop of XLA is faster, on
two AVX-512 cores (docs/results/moe_kernels.md). With fewer pairs, as in decoding, concatenating the expert's matrices
takes longer than multiplying by them."""
AVX512_SHARE = 1 / 16
"""The same for the kernel in C++ and dense weights, which it reorders. With packed weights it always is faster."""


def pick_backend(name: str | None, rows: int, pairs: int, weights: GivenWeights, dtype: Any = jnp.float32) -> str:
    experts, width, hidden = weights[0].shape
    share = pairs / (experts * width)
    separate = any(map(is_unstacked, weights))
    least = FUSED_SHARE if separate else 0 if all(map(in_4_bits, weights)) else AVX512_SHARE
    cpu = ("composed",) if share < FUSED_SHARE else ("xla", "composed")
    if share >= least and avx512.is_best(dtype, width, hidden):
        cpu = ("avx512", *cpu)
    if separate:
        cpu = ("few_rows", *cpu)
    preferred = {"cpu": cpu, "gpu": ("composed",), "tpu": ("composed",)}

    def refusal(backend: str) -> str | None:
        if backend == "few_rows":
            return few_rows.refusal(rows, weights)
        if backend == "avx512":
            return avx512.refusal(dtype, jax.eval_shape(plain, weights))
        return xla.refusal(jax.eval_shape(plain, weights)) if backend == "xla" else None

    return backends.pick("expert_mlp", BACKENDS, preferred, name, refusal)


def in_4_bits(w: Any) -> bool:
    return isinstance(w, NF4Tensor | RowMajor) or is_packed_layer(w)


def plain(weights: GivenWeights) -> Weights:
    """Experts stacked, packed layers sliced: what the fused loop takes."""
    return stack(with_packed_sliced(weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused(
    backend: str,
    x_ND: jax.Array,
    weights_NK: jax.Array,
    permutation: Permutation,
    weights: Weights,
    deltas: Deltas,
) -> jax.Array:
    return FUSED[backend].forward(x_ND, weights_NK, permutation, weights, deltas)[0]


def fused_forward(backend, x_ND, weights_NK, permutation, weights, deltas):
    operands = jax.tree.map(lambda leaf: leaf.value, (x_ND, weights_NK, permutation, weights, deltas))
    if not in_4_bits(operands[3][0]) and any(leaf.perturbed for leaf in jax.tree.leaves(weights)):
        # the gradient of a dense weight needs the hidden rows of all experts, which the fused loops do not return
        y_ND, pullback = jax.vjp(composed.expert_mlp, *operands)
        return y_ND, (None, None, pullback)
    y_ND, saved = FUSED[backend].forward(*operands, keep=True)
    return y_ND, (operands, saved, None)


def fused_backward(backend, residuals, dout_ND):
    operands, saved, pullback = residuals
    if isinstance(dout_ND, SymbolicZero):
        dout_ND = jnp.zeros(dout_ND.shape, str(dout_ND.dtype))
    if pullback is not None:
        return pullback(dout_ND)
    dx_ND, dweights_NK, ddeltas = FUSED[backend].backward(*operands, saved, dout_ND)
    frozen = jax.tree.map(zero_cotangent, operands[2:4])
    return dx_ND, dweights_NK, *frozen, ddeltas


fused.defvjp(fused_forward, fused_backward, symbolic_zeros=True)


def check(
    x_ND: jax.Array, weights_NK: jax.Array, permutation: Permutation, weights: GivenWeights, deltas: GivenDeltas
) -> None:
    """Raises ValueError for operands of `expert_mlp` that do not fit."""
    w1, w3, w2 = weights
    width, hidden = x_ND.shape[1], w1.shape[-1]
    experts = permutation.group_sizes_E.shape[0]
    expected = [(experts, width, hidden), (experts, width, hidden), (experts, hidden, width)]
    pairs = (weights_NK.shape[0], permutation.order_M.shape[0]) == (x_ND.shape[0], weights_NK.size)
    if [w.shape for w in (w1, w3, w2)] != expected or not pairs:
        raise ValueError(
            f"expert_mlp needs w1 and w3 [E, D, F], w2 [E, F, D] and a permutation of N K pairs; got "
            f"{w1.shape}, {w3.shape}, {w2.shape} for x {x_ND.shape}, weights {weights_NK.shape} and "
            f"{experts} groups of {permutation.order_M.shape[0]} pairs."
        )
    for pair, (_, inputs, outputs) in zip(deltas, expected, strict=True):
        if pair is not None and [w.shape for w in pair] != [
            (experts, inputs, pair[0].shape[-1]),
            (experts, pair[0].shape[-1], outputs),
        ]:
            raise ValueError(
                f"expert_mlp needs factors [E, in, R] and [E, R, out] of weights ({experts}, {inputs}, {outputs}); got "
                f"{pair[0].shape} and {pair[1].shape}."
            )
    if not all(jnp.issubdtype(part.dtype, jnp.integer) for part in permutation):
        raise ValueError(
            "expert_mlp needs a permutation of integers, as sort_by_expert makes; got "
            f"{', '.join(str(part.dtype) for part in permutation)}."
        )


def expert_mlp(
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    permutation: Permutation,
    weights: GivenWeights,
    deltas: GivenDeltas = (None, None, None),
    *,
    backend: str | None = None,
) -> Float[Array, "N D"]:
    """Each token's sum over its pairs of weight * w2(silu(w1 x) * w3 x), accumulated in float32.

    Differentiable in x, the pairs' weights, the factors of `deltas`, and dense weights (which are then trained by the
    composed backend). A 4-bit weight is frozen.

    Args:
      weights_NK: the routing weight of each pair; pairs without an expert do not count.
      permutation: of the pairs, by `sort_by_expert`. Of the sorted rows that experts own, `order_M` must name pairs.
      weights: (w1 [E, D, F], w3 [E, D, F], w2 [E, F, D]), arrays, NF4Tensors or RowMajor. Or layers of stacks
        (`LayerOf`): packed ones, and dense ones whose gradient is not taken.
        Experts may be Unstacked, for `few_rows`; the other backends stack them first, which copies all of them.
      deltas: for each weight, the factors (a [E, in, R], b [E, R, out]) of its low-rank delta, or None. The scale of
        the delta is part of b. Factors may be layers of stacks (`LayerOf`).
      backend: one of BACKENDS; None takes that of `backends.use`, else the platform's best for the size that can take
        the operands. A named backend never falls back.

    Raises:
      ValueError: shapes that do not fit, or an unknown backend.
      NotImplementedError: the named backend does not take these operands.
    """
    check(x_ND, weights_NK, permutation, weights, deltas)
    permutation = Permutation(*(part.astype(jnp.int32) for part in permutation))
    deltas = tuple(None if pair is None or pair[0].shape[-1] == 0 else pair for pair in deltas)  # rank 0 adds nothing
    name = pick_backend(backend, x_ND.shape[0], weights_NK.size, weights, x_ND.dtype)
    if weights_NK.size == 0:
        return jnp.zeros(x_ND.shape, x_ND.dtype)
    operands = vary_alike(x_ND, weights_NK, permutation, weights, deltas)
    if name == "few_rows":
        return few_rows.expert_mlp(*operands)
    x_ND, weights_NK, permutation, weights, deltas = operands
    if name in FUSED:
        stacked = stack(tuple(map(native_weights.prepared, weights))) if name == "avx512" else plain(weights)
        return fused(name, x_ND, weights_NK, permutation, stacked, stack(without_layers(deltas)))
    return composed.expert_mlp(x_ND, weights_NK, permutation, stack(weights), stack(deltas))
