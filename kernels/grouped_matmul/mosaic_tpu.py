"""Backend for TPUs in Pallas (Mosaic): each expert's matrix is read once, and NF4 stays packed until it is in VMEM.

The grid runs over tiles of output columns, and for each of them over the visits of `tiles.aligned_visits`. A step
multiplies 128 rows by the *whole* contraction, so nothing is accumulated between steps. The expert's columns stay in
VMEM for all visits of the expert. So weights are read from HBM once, and activations once for each tile of columns. An
NF4 tile is dequantised once for each expert into a scratch buffer, which the following visits read. Dequantising takes
as long as two visits (instructions that libtpu schedules for v5e); at 4,096 tokens an expert has eight or nine visits.
If a block of rows contains the end of one group and the start of the next, the second visit keeps the rows that the
first one wrote. The block stays in VMEM between the two.

NF4 is read in the layout of bitsandbytes, [rows, bytes of a row]: a product that contracts along lanes costs the matrix
unit nothing extra. But leaves are stored as [experts, bytes], which a TPU lays out with experts interleaved. Splitting
them into rows copies the packed bytes at run time: for Mixtral-8x7B 224 MiB are read and written for each matrix of a
layer, where dense weights would have 0.9 GiB. Under double quantisation the scales are decoded as well. Weights that
are stored by rows need neither: mosaic_rows.py.

Bounds (Mixtral-8x7B, 4,096 tokens): 71 visits of 128 rows for 8,192 useful rows, 1.11 times the useful FLOPs. TPUs up
to v4 have too little VMEM for these tiles, and compilation fails there.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from bimedix_jax.kernels.grouped_matmul import tiles
from bimedix_jax.kernels.grouped_matmul.mosaic_call import (
    call,
    changed,
    dot,
    matrix_spec,
    own_rows,
    pad_columns,
    product,
    rows_call,
    split_rows,
    store_rows,
)
from bimedix_jax.kernels.grouped_matmul.mosaic_rows import in_hbm, stacked_matmul
from bimedix_jax.kernels.grouped_matmul.mosaic_tiling import (
    HEIGHT,
    dense_columns,
    gradient_tile,
    packed_columns,
    refusal,
    round_up,
    tile_columns,
)
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.mosaic_tile import (
    CHUNK,
    LANES,
    ROWS,
    code_table,
    decode_scales,
    dequantise_tile,
    value_table,
)
from bimedix_jax.kernels.nf4.rows import RowMajor
from bimedix_jax.kernels.nf4.tables import NESTED_BLOCK_SIZE
from bimedix_jax.kernels.stacks import LayerOf


def grouped_dense(*refs: Any, contract_w: int) -> None:
    *visits, x_ref, w_ref, y_ref = refs
    store_rows(tiles.Visits(*visits), y_ref, lambda: dot(x_ref[...], w_ref[...], 1, contract_w))


def grouped_nf4(*refs: Any, block_size: int, recorded: str, contracts_pairs: bool) -> None:
    *visit_refs, x_ref, packed_ref, scales_ref, table_ref, y_ref, w_ref = refs
    visits = tiles.Visits(*visit_refs)
    column, visit = pl.program_id(0), pl.program_id(1)
    scales_a_tile = 2 * packed_ref.shape[1] // block_size
    first_scale = 0 if contracts_pairs else lax.rem(column * scales_a_tile, LANES)

    @pl.when(changed(visit, visits.expert) & (visits.stop[visit] > visits.start[visit]))
    def _() -> None:
        dequantise_tile(
            packed_ref, scales_ref, table_ref, w_ref, block_size=block_size, recorded=recorded, first_scale=first_scale
        )

    store_rows(visits, y_ref, lambda: product(x_ref, w_ref, contracts_pairs))


def dense_matmul(
    x_MK: jax.Array, w: jax.Array, group_sizes_E: jax.Array, swapped: bool, width: int, first: jax.Array | int = 0
) -> jax.Array:
    spec = matrix_spec(w.shape, rows=width) if swapped else matrix_spec(w.shape, columns=width)
    kernel = functools.partial(grouped_dense, contract_w=1 if swapped else 0)
    columns = w.shape[1 if swapped else 2]
    return rows_call(kernel, x_MK, (w,), [spec], group_sizes_E, columns, width, first=first)


def layer_matmul(x_MK: jax.Array, w: LayerOf, group_sizes_E: jax.Array, swapped: bool) -> jax.Array:
    """The product with a layer of a stack, which is sliced and converted if no tile fits, or if its dtype is not that
    of the rows."""
    k, n = w.shape[1:][::-1] if swapped else w.shape[1:]
    experts, width = w.shape[0], None
    if isinstance(w.stack, RowMajor):
        width = packed_columns(k, n, x_MK.dtype, w.stack.transposed != swapped, w.stack.block_size)
    elif w.stack.dtype == x_MK.dtype:
        width = dense_columns(k, n, x_MK.dtype)
    if width is None or x_MK.shape[0] == 0:
        return grouped_matmul(x_MK, w.value(), group_sizes_E, swapped)
    if isinstance(w.stack, RowMajor):
        return stacked_matmul(x_MK, w, group_sizes_E, swapped, width)
    every = in_hbm(w.stack.reshape(-1, *w.shape[1:]))
    return dense_matmul(x_MK, every, group_sizes_E, swapped, width, jnp.asarray(w.layer) * experts)


def float32_scales(t: NF4Tensor) -> jax.Array:
    """float32 [units, blocks]."""
    units, blocks = math.prod(t.batch_shape), t.absmax.shape[-1]
    if t.nested_absmax is None or t.nested_offset is None:
        return t.absmax.reshape(units, blocks)
    # a look-up needs more than one row, so a single unit is cut into eight, at multiples of a grid step
    parts, step = 8 if units == 1 else 1, NESTED_BLOCK_SIZE * LANES
    rows, columns = units * parts, round_up(-(-blocks // parts), step)
    codes = pad_columns(t.absmax.reshape(units, blocks), parts * columns).reshape(rows, columns)
    nested = pad_columns(t.nested_absmax.reshape(units, -1), parts * columns // NESTED_BLOCK_SIZE).reshape(rows, -1)
    offset = jnp.broadcast_to(t.nested_offset.reshape(units, 1, 1), (units, parts, LANES)).reshape(rows, LANES)
    wide, narrow = (pl.BlockSpec((rows, size), lambda i: (0, i)) for size in (step, LANES))
    still = pl.BlockSpec((rows, LANES), lambda i: (0, 0))
    scales = call(
        decode_scales,
        (codes, nested, offset, code_table(rows)),
        (codes.shape, jnp.float32),
        grid=(columns // step,),
        in_specs=[wide, narrow, still, pl.BlockSpec((2, rows, LANES), lambda i: (0, 0, 0))],
        out_spec=wide,
    )
    return scales.reshape(units, parts * columns)[:, :blocks]


def stored_matrices(t: NF4Tensor) -> tuple[jax.Array, jax.Array]:
    """Packed bytes [E, rows, bytes] and scales [E, rows, scales] of the stored matrices, both padded to whole lanes."""
    experts, rows, columns = (*t.batch_shape, *t.unit_shape)
    packed = t.packed.reshape(experts, rows, columns // 2)
    scales = float32_scales(t).reshape(experts, rows, columns // t.block_size)
    packed = pad_columns(packed, round_up(columns, CHUNK) // 2)
    return packed, pad_columns(scales, round_up(2 * packed.shape[2] // t.block_size, LANES))


def packed_matmul(x_MK: jax.Array, t: NF4Tensor, group_sizes_E: jax.Array, swapped: bool, width: int) -> jax.Array:
    contracts_pairs = t.transposed != swapped
    n = t.shape[1 if swapped else 2]
    packed, scales = stored_matrices(t)
    if contracts_pairs:
        x_MK = split_rows(pad_columns(x_MK, 2 * packed.shape[2]))
        specs = [matrix_spec(packed.shape, rows=width), matrix_spec(scales.shape, rows=width)]
        columns, tile = n, (width, x_MK.shape[1])
    else:
        columns, tile = 2 * packed.shape[2], (x_MK.shape[1], width)
        tiles_a_lane_row = LANES * t.block_size // width  # a tile uses width / block_size of the LANES scales
        specs = [
            matrix_spec(packed.shape, columns=width // 2),
            matrix_spec(scales.shape, columns=LANES, repeat=tiles_a_lane_row),
        ]
    kernel = functools.partial(grouped_nf4, block_size=t.block_size, recorded=t.dtype, contracts_pairs=contracts_pairs)
    specs.append(pl.BlockSpec((ROWS, LANES), lambda *_: (0, 0)))
    scratch = (pltpu.VMEM(tile, x_MK.dtype),)
    operands = (packed, scales, value_table())
    return rows_call(kernel, x_MK, operands, specs, group_sizes_E, columns, width, scratch)[:, :n]


def takes_stack(stack: Any) -> bool:
    """Whether the kernels take a layer of this stack without a slice. An NF4Tensor would have to be split into rows."""
    return not isinstance(stack, NF4Tensor) and stack.ndim == 4


def grouped_matmul(
    x_MD: Float[Array, "M D"],
    w_EDF: jax.Array | NF4Tensor | LayerOf,
    group_sizes_E: Int[Array, "E"],
    swapped: bool = False,
) -> Float[Array, "M F"]:
    """Raises NotImplementedError for operands that `refusal` rejects."""
    if isinstance(w_EDF, LayerOf):
        return layer_matmul(x_MD, w_EDF, group_sizes_E, swapped)
    columns = None if (reason := refusal(x_MD, w_EDF)) else tile_columns(x_MD.dtype, w_EDF, swapped)
    if columns is None:
        raise NotImplementedError(f"grouped_matmul backend 'mosaic_tpu': {reason}")
    if x_MD.shape[0] == 0:
        return jnp.zeros((0, w_EDF.shape[1 if swapped else 2]), x_MD.dtype)
    if isinstance(w_EDF, NF4Tensor):
        return packed_matmul(x_MD, w_EDF, group_sizes_E, swapped, columns)
    return dense_matmul(x_MD, w_EDF.astype(x_MD.dtype), group_sizes_E, swapped, columns)


def grouped_gradient(*refs: Any) -> None:
    experts, blocks, starts, stops, x_ref, dy_ref, dw_ref = refs
    visit = pl.program_id(2)

    @pl.when(changed(visit, experts))
    def _() -> None:
        dw_ref[...] = jnp.zeros_like(dw_ref)

    @pl.when(stops[visit] > starts[visit])
    def _() -> None:
        # mask both operands: rows of other experts may hold NaN, and 0 * NaN is not 0
        x, dy = (
            jnp.where(own_rows(visit, blocks, starts, stops, ref.shape), ref[...].astype(jnp.float32), 0.0)
            for ref in (x_ref, dy_ref)
        )
        dw_ref[...] += dot(x.astype(x_ref.dtype), dy.astype(x_ref.dtype), 0, 0)


def weight_gradient(
    x_MD: Float[Array, "M D"], dy_MF: Float[Array, "M F"], group_sizes_E: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """float32 [E, D, F]."""
    (rows, d), f, experts = x_MD.shape, dy_MF.shape[1], group_sizes_E.shape[0]
    if rows == 0:
        return jnp.zeros((experts, d, f), jnp.float32)
    height, (tile_d, tile_f) = min(rows, HEIGHT), gradient_tile(d, f)
    visits = tiles.aligned_visits(group_sizes_E, rows, height, every_expert=True)
    grid = (-(-d // tile_d), -(-f // tile_f), visits.expert.shape[0])
    return call(
        grouped_gradient,
        (x_MD, dy_MF),
        ((experts, d, f), jnp.float32),
        grid=grid,
        in_specs=[
            pl.BlockSpec((height, tile_d), lambda i, j, t, e, blocks, *_: (blocks[t], i)),
            pl.BlockSpec((height, tile_f), lambda i, j, t, e, blocks, *_: (blocks[t], j)),
        ],
        out_spec=pl.BlockSpec((None, tile_d, tile_f), lambda i, j, t, experts, *_: (experts[t], i, j)),
        scalars=visits,
        flops=2 * math.prod(grid) * height * tile_d * tile_f,
    )
