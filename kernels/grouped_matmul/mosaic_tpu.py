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
layer, where dense weights would have 0.9 GiB. Under double quantisation the scales are decoded as well.

Bounds (Mixtral-8x7B, 4,096 tokens): 71 visits of 128 rows for 8,192 useful rows, 1.11 times the useful FLOPs. TPUs up
to v4 have too little VMEM for these tiles, and compilation fails there.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import ManualAxisType
from jaxtyping import Array, Float, Int

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.grouped_matmul import tiles
from bimedix_jax.kernels.grouped_matmul.mosaic_tiling import (
    HEIGHT,
    VMEM_LIMIT,
    WIDTHS,
    gradient_tile,
    refusal,
    round_up,
    tile_columns,
)
from bimedix_jax.kernels.manual_axes import varying
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.mosaic_tile import (
    CHUNK,
    LANES,
    ROWS,
    code_table,
    decode_scales,
    dequantise_tile,
    merge_pairs,
    split_pairs,
    value_table,
)
from bimedix_jax.kernels.nf4.tables import NESTED_BLOCK_SIZE


def pad_columns(x: jax.Array, columns: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, columns - x.shape[-1])])


def precision(dtype: jnp.dtype) -> lax.Precision:
    """The precision that keeps float32 operands from being rounded to bfloat16."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def dot(x: jax.Array, y: jax.Array, contract_x: int, contract_y: int) -> jax.Array:
    dimensions = (((contract_x,), (contract_y,)), ((), ()))
    return lax.dot_general(x, y, dimensions, precision=precision(x.dtype), preferred_element_type=jnp.float32)


def call(
    kernel: Callable[..., None],
    operands: tuple[jax.Array, ...],
    result: tuple[tuple[int, ...], Any],
    *,
    grid: tuple[int, ...],
    in_specs: list[pl.BlockSpec],
    out_spec: pl.BlockSpec,
    scalars: tuple[jax.Array, ...] = (),
    scratch: tuple[Any, ...] = (),
    flops: int = 0,
) -> jax.Array:
    """pallas_call with VMEM_LIMIT. All axes of the grid but the last are parallel.

    Interpreted for "cpu" (`backends.platform`).
    """
    moved = sum(x.size * x.dtype.itemsize for x in operands) + math.prod(result[0]) * jnp.dtype(result[1]).itemsize
    axes = ManualAxisType(varying=varying(*scalars, *operands))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(*result, manual_axis_type=axes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars), grid=grid, in_specs=in_specs, out_specs=out_spec, scratch_shapes=scratch
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * (len(grid) - 1) + ("arbitrary",), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        interpret=backends.platform() == "cpu",
        name=getattr(kernel, "func", kernel).__name__,
    )(*scalars, *operands)


def own_rows(visit: jax.Array, blocks: Any, starts: Any, stops: Any, shape: tuple[int, ...]) -> jax.Array:
    """Mask of this shape that is True at the rows of the visit, for a block with as many rows as the mask."""
    row = blocks[visit] * shape[0] + lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= starts[visit]) & (row < stops[visit])


def changed(visit: jax.Array, ids: Any) -> jax.Array:
    """Whether the id differs from that of the visit before."""
    return (visit == 0) | (ids[visit] != ids[jnp.maximum(visit - 1, 0)])


def store_rows(visits: tiles.Visits, y_ref: Any, multiply: Callable[[], jax.Array]) -> None:
    """y_ref = multiply() at the rows of this visit; other rows keep what an earlier visit wrote, or are zero."""
    visit = pl.program_id(1)
    blocks, starts, stops = visits[1:]
    first, occupied = changed(visit, blocks), stops[visit] > starts[visit]

    @pl.when(first & ~occupied)
    def _() -> None:
        y_ref[...] = jnp.zeros_like(y_ref)

    @pl.when(occupied)
    def _() -> None:
        y = multiply()
        kept = jnp.where(first, 0.0, y_ref[...].astype(jnp.float32))
        y_ref[...] = jnp.where(own_rows(visit, blocks, starts, stops, y.shape), y, kept).astype(y_ref.dtype)


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

    def multiply() -> jax.Array:
        y = dot(x_ref[...], w_ref[...], 1, 1 if contracts_pairs else 0)
        if contracts_pairs:
            return y
        chunks = [merge_pairs(y[:, start : start + CHUNK]) for start in range(0, y.shape[1], CHUNK)]
        return jnp.concatenate(chunks, axis=1)

    store_rows(visits, y_ref, multiply)


def deinterleave(x_ref: Any, y_ref: Any) -> None:
    for start in range(0, x_ref.shape[1], CHUNK):
        chunk = x_ref[:, start : start + CHUNK].astype(jnp.float32)
        y_ref[:, start : start + CHUNK] = split_pairs(chunk).astype(y_ref.dtype)


def split_rows(x_MK: jax.Array) -> jax.Array:
    """x with the columns of each chunk in the order of `split_pairs`; the number of columns is a multiple of CHUNK."""
    rows, columns = x_MK.shape
    width = next(width for width in WIDTHS if columns % width == 0)
    spec = pl.BlockSpec((min(rows, HEIGHT), width), lambda i, j: (i, j))
    grid = (-(-rows // HEIGHT), columns // width)
    return call(deinterleave, (x_MK,), (x_MK.shape, x_MK.dtype), grid=grid, in_specs=[spec], out_spec=spec)


def matrix_spec(
    shape: tuple[int, ...], rows: int | None = None, columns: int | None = None, repeat: int = 1
) -> pl.BlockSpec:
    """The tile that a visit reads from weights of this shape [E, R, C]: `rows` or `columns` of its expert.

    The other axis is whole. `repeat` tiles of the result use the same tile of the weights.
    """
    size = (shape[1] if rows is None else rows, shape[2] if columns is None else columns)

    def index(j: jax.Array, t: jax.Array, experts: Any, *_: Any) -> tuple[jax.Array | int, ...]:
        j = j if repeat == 1 else lax.div(j, repeat)
        return experts[t], j if columns is None else 0, j if rows is None else 0

    return pl.BlockSpec((None, *size), index)


def rows_call(
    kernel: Callable[..., None],
    x_MK: jax.Array,
    weights: tuple[jax.Array, ...],
    weight_specs: list[pl.BlockSpec],
    group_sizes_E: jax.Array,
    columns: int,
    width: int,
    scratch: tuple[Any, ...] = (),
) -> jax.Array:
    """[M, columns] of a kernel that calls `store_rows`, in tiles of `width` columns."""
    rows, k = x_MK.shape
    height = min(rows, HEIGHT)
    visits = tiles.aligned_visits(group_sizes_E, rows, height)
    grid = (-(-columns // width), visits.expert.shape[0])
    return call(
        kernel,
        (x_MK, *weights),
        ((rows, columns), x_MK.dtype),
        grid=grid,
        in_specs=[pl.BlockSpec((height, k), lambda j, t, e, blocks, *_: (blocks[t], 0)), *weight_specs],
        out_spec=pl.BlockSpec((height, width), lambda j, t, e, blocks, *_: (blocks[t], j)),
        scalars=visits,
        scratch=scratch,
        flops=2 * math.prod(grid) * height * k * width,
    )


def dense_matmul(x_MK: jax.Array, w: jax.Array, group_sizes_E: jax.Array, swapped: bool, width: int) -> jax.Array:
    spec = matrix_spec(w.shape, rows=width) if swapped else matrix_spec(w.shape, columns=width)
    kernel = functools.partial(grouped_dense, contract_w=1 if swapped else 0)
    return rows_call(kernel, x_MK, (w,), [spec], group_sizes_E, w.shape[1 if swapped else 2], width)


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


def grouped_matmul(
    x_MD: Float[Array, "M D"], w_EDF: jax.Array | NF4Tensor, group_sizes_E: Int[Array, "E"], swapped: bool = False
) -> Float[Array, "M F"]:
    """Raises NotImplementedError for operands that `refusal` rejects."""
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
