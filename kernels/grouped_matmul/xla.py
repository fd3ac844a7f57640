"""Backend in plain XLA operations that multiplies each expert's matrix by the rows of this expert only.

A loop of dynamic length visits the experts that own rows, in order. Each visit materialises one expert's matrix (NF4:
as two planes, one for each nibble, because interleaving them costs four times the dequantisation). It multiplies the
rows in blocks of a few static sizes: the largest while it fits, then the smallest that holds the rest. The last block
may include rows of the next group. Their results are overwritten by the next visit, so no mask is needed. The extra
FLOPs are those of the last blocks: on average a sixteenth of the largest block for each expert.

The block sizes are loops, not branches of a switch: XLA updates the result of a loop in place, but copies it for every
branch. Rows and result are integers inside the loops (`to_bits`), and weights are behind a barrier (`pin`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from bimedix_jax.kernels.manual_axes import vary_alike
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.api import block_scales, layer_weights
from bimedix_jax.kernels.nf4.planes import is_planar, merge_columns, planes, split_columns
from bimedix_jax.kernels.products import dot, dot_rows, from_bits, to_bits
from bimedix_jax.kernels.stacks import index, pin

MAX_BLOCK = 512
"""Rows of one product: from 256 rows on, products on two AVX-512 cores are within 5 % of their best speed, and with 512
the intermediate results still fit into the caches."""
EIGHTHS = (1, 2, 3, 4, 5, 6, 8)
"""Sizes of blocks, in eighths of the largest. A product costs as much as 30 extra rows, a size 40 ms of compiling."""
NEAR = (30, 33, 34, 35, 36)
"""More sizes, in 32nds of an expert's even share. Under balanced load most groups are close to that share, and these
finer steps make a feed-forward of 2,048 pairs a tenth faster."""


def pick_blocks(rows: int, experts: int) -> tuple[int, ...]:
    """Sizes of blocks, ascending: the largest holds two even shares, or MAX_BLOCK rows.

    All are multiples of 8: with fewer rows XLA:CPU takes a matrix-vector path at a tenth of the bandwidth.
    """
    share = -(-rows // experts)
    top = min(MAX_BLOCK, max(8, 1 << (-(-2 * rows // experts) - 1).bit_length()), -(-rows // 8) * 8)
    near = (-(-share * part // 256) * 8 for part in NEAR)
    return tuple(sorted({8, *(-(-top * part // 64) * 8 for part in EIGHTHS), *(size for size in near if size < top)}))


def overrun(blocks: tuple[int, ...]) -> int:
    """The most rows of a block that may be beyond the end of its group."""
    return max(b - below - 1 for below, b in zip((0, *blocks[:-1]), blocks, strict=True))


def for_each_block(
    group_sizes_E: Int[Array, "E"],
    blocks: tuple[int, ...],
    operands: Any,
    load: Callable[[Any, jax.Array], Any],
    step: Callable[..., Any],
    carry: Any,
) -> Any:
    """Runs `carry = step(carry, e, start, stop, size, load(operands, e))` for blocks that cover all groups in order.

    `size`, one of `blocks`, is static. [start, stop) are the rows of group e in the block, at most `size`.
    """
    starts_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    experts, count = jnp.argsort(group_sizes_E == 0, stable=True), jnp.sum(group_sizes_E > 0)

    def visit(i: jax.Array, carry: Any) -> Any:
        pinned, e = pin(operands, experts[i])
        weights = load(pinned, e)
        stop = starts_E[e] + group_sizes_E[e]
        rows = (starts_E[e], carry)
        for below, size in reversed(list(zip((0, *blocks[:-1]), blocks, strict=True))):

            def body(rows: tuple[jax.Array, Any], size: int = size) -> tuple[jax.Array, Any]:
                start, carry = rows
                end = jnp.minimum(start + size, stop)
                return end, step(carry, e, start, end, size, weights)

            rows = lax.while_loop(lambda rows, below=below: stop - rows[0] > below, body, rows)
        return rows[1]

    carry, _ = vary_alike(carry, group_sizes_E)
    return lax.fori_loop(0, count, visit, carry)


def pad_rows(x: jax.Array, rows: int) -> jax.Array:
    """x with zero rows appended. Without them, dynamic_slice would silently shift a block that does not fit."""
    return jnp.pad(x, ((0, rows), (0, 0)))


def multiply_blocks(
    x_parts: tuple[jax.Array, ...],
    group_sizes_E: Int[Array, "E"],
    operands: tuple[jax.Array, ...],
    load: Callable[[tuple[jax.Array, ...], jax.Array], tuple[jax.Array, ...]],
    multiply: Callable[[tuple[jax.Array, ...], tuple[jax.Array, ...]], jax.Array],
    width: int,
) -> jax.Array:
    """`to_bits` of y [M, width]: `multiply(rows of x_parts, load(operands, e))` for the groups, zeros elsewhere."""
    rows, dtype = x_parts[0].shape[0], x_parts[0].dtype
    blocks = pick_blocks(rows, group_sizes_E.shape[0])
    spare = overrun(blocks)
    padded = tuple(pad_rows(to_bits(x), spare) for x in x_parts)

    def step(
        y: jax.Array, e: jax.Array, start: jax.Array, stop: jax.Array, size: int, weights: tuple[jax.Array, ...]
    ) -> jax.Array:
        del e, stop
        x_block = tuple(from_bits(lax.dynamic_slice_in_dim(x, start, size), dtype) for x in padded)
        return lax.dynamic_update_slice_in_dim(y, to_bits(multiply(x_block, weights).astype(dtype)), start, 0)

    empty = jnp.zeros((rows + spare, width), padded[0].dtype)
    y = for_each_block(group_sizes_E, blocks, operands, load, step, empty)
    owned = jnp.arange(rows) < jnp.sum(group_sizes_E)
    return jnp.where(owned[:, None], y[:rows], jnp.zeros((), y.dtype))


def nf4_matmul(x_MD: jax.Array, t: NF4Tensor, group_sizes_E: jax.Array) -> jax.Array:
    """The product with planar weights [E, D, F]."""
    dtype = x_MD.dtype

    def load(operands: tuple[jax.Array, ...], e: jax.Array) -> tuple[jax.Array, jax.Array]:
        packed, scales_EB = operands
        return planes(index(packed, e), index(scales_EB, e), t, dtype)

    operands, width = (t.packed, block_scales(t)), t.shape[2]
    if t.transposed:  # stored [F, D]: the planes split the contraction
        y = multiply_blocks(
            split_columns(x_MD),
            group_sizes_E,
            operands,
            load,
            lambda x, w: dot(x[0], w[0], 1) + dot(x[1], w[1], 1),
            width,
        )
        return from_bits(y, dtype)
    halves = multiply_blocks(  # stored [D, F]: the planes split the output
        (x_MD,),
        group_sizes_E,
        operands,
        load,
        lambda x, w: jnp.concatenate([dot(x[0], w[0], 0), dot(x[0], w[1], 0)], axis=1),
        width,
    )
    return from_bits(merge_columns(halves[:, : width // 2], halves[:, width // 2 :]), dtype)


def grouped_matmul(
    x_MD: Float[Array, "M D"], w_EDF: jax.Array | NF4Tensor, group_sizes_E: Int[Array, "E"], swapped: bool = False
) -> Float[Array, "M F"]:
    if swapped and isinstance(w_EDF, NF4Tensor):
        w_EDF, swapped = w_EDF.mT, False
    if isinstance(w_EDF, NF4Tensor):
        if is_planar(w_EDF):
            return nf4_matmul(x_MD, w_EDF, group_sizes_E)
        w_EDF = layer_weights(w_EDF, x_MD.dtype)
    y = multiply_blocks(
        (x_MD,),
        group_sizes_E,
        (w_EDF.astype(x_MD.dtype),),
        lambda operands, e: (index(operands[0], e),),
        # contract the stored axis: on GPUs, XLA would hoist a transpose out of the layer scan, which makes a transposed
        # copy of every layer's weights
        lambda x, w: dot(x[0], w[0], 1 if swapped else 0),
        w_EDF.shape[1 if swapped else 2],
    )
    return from_bits(y, x_MD.dtype)


def weight_gradient(
    x_MD: Float[Array, "M D"], dy_MF: Float[Array, "M F"], group_sizes_E: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """float32 [E, D, F]; rows of a block that belong to another group are masked out of x."""
    blocks = pick_blocks(x_MD.shape[0], group_sizes_E.shape[0])
    x, dy = (pad_rows(to_bits(rows), overrun(blocks)) for rows in (x_MD, dy_MF))

    def step(
        dw: jax.Array, e: jax.Array, start: jax.Array, stop: jax.Array, size: int, _: tuple[jax.Array, ...]
    ) -> jax.Array:
        inside = start + jnp.arange(size) < stop
        x_block = lax.dynamic_slice_in_dim(x, start, size)
        x_block = from_bits(jnp.where(inside[:, None], x_block, jnp.zeros((), x.dtype)), x_MD.dtype)
        dy_block = from_bits(lax.dynamic_slice_in_dim(dy, start, size), dy_MF.dtype)
        return dw.at[e].add(dot_rows(x_block, dy_block), mode="promise_in_bounds")

    zeros = jnp.zeros((group_sizes_E.shape[0], x_MD.shape[1], dy_MF.shape[1]), jnp.float32)
    return for_each_block(group_sizes_E, blocks, (), lambda operands, e: (), step, zeros)
