"""What the TPU kernels of products have in common: the call, the visits of blocks of rows, the order of columns."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import ManualAxisType

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.grouped_matmul import tiles
from bimedix_jax.kernels.grouped_matmul.mosaic_tiling import (
    HEIGHT,
    VMEM_LIMIT,
    WIDTHS,
)
from bimedix_jax.kernels.manual_axes import varying
from bimedix_jax.kernels.nf4.mosaic_tile import (
    CHUNK,
    merge_pairs,
    split_pairs,
)


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


def product(x_ref: Any, w_ref: Any, contracts_pairs: bool) -> jax.Array:
    """Rows times a dequantised tile; columns of the result are ordered back if pairs are outputs."""
    y = dot(x_ref[...], w_ref[...], 1, 1 if contracts_pairs else 0)
    if contracts_pairs:
        return y
    chunks = [merge_pairs(y[:, start : start + CHUNK]) for start in range(0, y.shape[1], CHUNK)]
    return jnp.concatenate(chunks, axis=1)


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
    first: jax.Array | int = 0,
) -> jax.Array:
    """[M, columns] of a kernel that calls `store_rows`, in tiles of `width` columns.

    `first` is the index of expert 0 in the weights, which may be those of several layers.
    """
    rows, k = x_MK.shape
    height = min(rows, HEIGHT)
    visits = tiles.aligned_visits(group_sizes_E, rows, height)
    visits = visits._replace(expert=visits.expert + first)
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
