"""Backend in plain XLA operations that computes no row for an expert that does not own it.

Experts that own rows are visited in order by a loop of dynamic length. Each visit materialises one expert's matrix
(NF4: as two planes, one for each nibble, since interleaving them costs four times the dequantisation itself) and
multiplies blocks of rows of static size. The last block of a group may run over into rows of the next one; these are
overwritten when their own expert is visited, so nothing is masked on the way. FLOPs beyond the useful ones: on average
half a tail block per expert.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.api import block_scales, layer_weights
from bimedix_jax.kernels.nf4.planes import is_planar, merge_columns, planes, split_columns
from bimedix_jax.kernels.products import dot, dot_rows

MAX_BLOCK = 512
"""Rows of one product: GEMMs on two AVX-512 cores reach their plateau between 256 and 512 rows."""


def pick_block(rows: int, experts: int) -> int:
    """Smallest power of two that holds an even share of rows, between 8 and MAX_BLOCK."""
    share = max(1, -(-rows // experts))
    return min(MAX_BLOCK, max(8, 1 << (share - 1).bit_length()))


def active_experts(group_sizes_E: Int[Array, "E"]) -> tuple[Int[Array, "E"], Int[Array, ""]]:
    """Expert ids with the non-empty groups first, in order, and how many these are."""
    return jnp.argsort(group_sizes_E == 0, stable=True), jnp.sum(group_sizes_E > 0)


def for_each_block(
    group_sizes_E: Int[Array, "E"],
    block: int,
    load: Callable[[jax.Array], tuple[jax.Array, ...]],
    step: Callable[[jax.Array, jax.Array, jax.Array, jax.Array, tuple[jax.Array, ...]], jax.Array],
    carry: jax.Array,
) -> jax.Array:
    """Runs `carry = step(carry, e, start, stop, load(e))` for each block of rows [start, min(start+block, stop))."""
    starts_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    experts, count = active_experts(group_sizes_E)

    def visit(i: jax.Array, carry: jax.Array) -> jax.Array:
        e = experts[i]
        start, size = starts_E[e], group_sizes_E[e]
        weights = load(e)

        def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            b, carry = state
            return b + 1, step(carry, e, start + b * block, start + size, weights)

        blocks = -(-size // block)
        return lax.while_loop(lambda state: state[0] < blocks, body, (jnp.zeros_like(blocks), carry))[1]

    return lax.fori_loop(0, count, visit, carry)


def index(x: jax.Array, e: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(x, e, keepdims=False)


def pad_rows(x: jax.Array, block: int) -> jax.Array:
    """A block that starts at any row must fit; dynamic_slice would otherwise shift it back silently."""
    return jnp.pad(x, ((0, block), (0, 0)))


def run_blocks(
    x_parts: tuple[jax.Array, ...],
    group_sizes_E: Int[Array, "E"],
    load: Callable[[jax.Array], tuple[jax.Array, ...]],
    multiply: Callable[[tuple[jax.Array, ...], tuple[jax.Array, ...]], jax.Array],
    width: int,
) -> jax.Array:
    """y [M, width]: `multiply(rows of x_parts, load(e))` on every block of every non-empty group, zeros elsewhere."""
    rows, dtype = x_parts[0].shape[0], x_parts[0].dtype
    block = pick_block(rows, group_sizes_E.shape[0])
    padded = tuple(pad_rows(x, block) for x in x_parts)

    def step(
        y: jax.Array, e: jax.Array, start: jax.Array, stop: jax.Array, weights: tuple[jax.Array, ...]
    ) -> jax.Array:
        del e, stop
        x_block = tuple(lax.dynamic_slice_in_dim(x, start, block) for x in padded)
        return lax.dynamic_update_slice_in_dim(y, multiply(x_block, weights).astype(dtype), start, 0)

    y = for_each_block(group_sizes_E, block, load, step, jnp.zeros((rows + block, width), dtype))
    owned = jnp.arange(rows) < jnp.sum(group_sizes_E)
    return jnp.where(owned[:, None], y[:rows], 0)


def grouped_matmul(
    x_MD: Float[Array, "M D"], w_EDF: jax.Array | NF4Tensor, group_sizes_E: Int[Array, "E"], swapped: bool = False
) -> Float[Array, "M F"]:
    if swapped and isinstance(w_EDF, NF4Tensor):
        w_EDF, swapped = w_EDF.mT, False
    width = w_EDF.shape[1 if swapped else 2]
    if isinstance(w_EDF, NF4Tensor) and not is_planar(w_EDF):
        w_EDF = layer_weights(w_EDF, x_MD.dtype)
    if isinstance(w_EDF, NF4Tensor):
        t, scales_EB = w_EDF, block_scales(w_EDF)

        def load(e: jax.Array) -> tuple[jax.Array, jax.Array]:
            return planes(index(t.packed, e), index(scales_EB, e), t, x_MD.dtype)

        if t.transposed:  # stored [F, D]: the planes split the contraction
            return run_blocks(
                split_columns(x_MD),
                group_sizes_E,
                load,
                lambda x, w: dot(x[0], w[0], 1) + dot(x[1], w[1], 1),
                width,
            )
        halves = run_blocks(  # stored [D, F]: the planes split the output
            (x_MD,),
            group_sizes_E,
            load,
            lambda x, w: jnp.concatenate([dot(x[0], w[0], 0), dot(x[0], w[1], 0)], axis=1),
            width,
        )
        return merge_columns(halves[:, : width // 2], halves[:, width // 2 :])
    dense = w_EDF.astype(x_MD.dtype)
    return run_blocks(
        (x_MD,),
        group_sizes_E,
        lambda e: (index(dense, e),),
        # the product reads the matrix as it lies: a transpose here would be hoisted out of the layer scan on GPUs, as a
        # transposed copy of every layer's weights
        lambda x, w: dot(x[0], w[0], 1 if swapped else 0),
        width,
    )


def weight_gradient(
    x_MD: Float[Array, "M D"], dy_MF: Float[Array, "M F"], group_sizes_E: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """float32 [E, D, F]; rows of a block that belong to another group are masked out of x."""
    experts = group_sizes_E.shape[0]
    block = pick_block(x_MD.shape[0], experts)
    x, dy = pad_rows(x_MD, block), pad_rows(dy_MF, block)

    def step(dw: jax.Array, e: jax.Array, start: jax.Array, stop: jax.Array, _: tuple[jax.Array, ...]) -> jax.Array:
        inside = start + jnp.arange(block) < stop
        x_block = jnp.where(inside[:, None], lax.dynamic_slice_in_dim(x, start, block), 0)
        dy_block = lax.dynamic_slice_in_dim(dy, start, block)
        return dw.at[e].add(dot_rows(x_block, dy_block), mode="promise_in_bounds")

    zeros = jnp.zeros((experts, x_MD.shape[1], dy_MF.shape[1]), jnp.float32)
    return for_each_block(group_sizes_E, block, lambda e: (), step, zeros)
