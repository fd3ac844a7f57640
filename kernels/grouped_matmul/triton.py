"""Backend in Pallas kernels that Triton compiles, for NVIDIA GPUs from compute capability 8.0 (A100) on.

A program computes one tile of the output: rows of one expert times columns of its matrix, accumulated in float32
registers. The grid is static; programs of tiles without rows exit immediately. NF4 weights are passed as packed bytes.
For few rows, each program dequantises the tiles that it multiplies, and only packed bytes are read from memory. For
many rows, each weight would be dequantised once for each tile of rows. Then a kernel dequantises one matrix of all
experts to memory first. Scales under double quantisation are decoded in the kernels too, so only those of the experts
in use are read. Weights may be a layer of a stack: the kernels take the whole stack, and the index of the layer is part
of the index of the expert. Dense weights of another dtype than the rows are cast in the kernel. On a CPU the kernels
are interpreted.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.sharding import ManualAxisType
from jaxtyping import Array, Float, Int

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.grouped_matmul.tiles import Tiles, group_tiles
from bimedix_jax.kernels.grouped_matmul.triton_tiling import StoredWeights, Tile, gradient_tile, product_tile
from bimedix_jax.kernels.manual_axes import varying
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.api import block_scales, unfused
from bimedix_jax.kernels.nf4.tables import DYNAMIC_MAP, NESTED_BLOCK_SIZE
from bimedix_jax.kernels.nf4.triton_tile import dequantised
from bimedix_jax.kernels.stacks import LayerOf

BLOCK_SIZES = (32, 64, 128)
"""Sizes of NF4 blocks that divide the tiles."""
UNPACKED_ROWS = 512
"""Average rows of an expert from which its NF4 weights are dequantised to memory first. On an H100, writing and reading
2 bytes a weight takes as long as products on packed weights lose with 300 rows (docs/results/gpu.md)."""
UNPACKING = (16, 512, 4)
"""Rows and columns of a tile of dequantised weights, and the warps of its program."""
SWIZZLE = 8
"""Row tiles that share all column tiles: their rows and the weights that run at the same time fit into the L2 cache."""


Weights = jax.Array | NF4Tensor | LayerOf


def stored_shape(t: NF4Tensor) -> tuple[int, ...]:
    return t.batch_shape + t.unit_shape


def takes_stack(stack: Any) -> bool:
    """Whether the kernels take a layer of this stack without a slice.

    Offsets have 32 bits, or 64 where an operand has more than 2**32 bytes; in between they would overflow.
    """
    if not isinstance(stack, NF4Tensor):
        return isinstance(stack, jax.Array) and stack.ndim == 4 and stack.size < 2**31
    regular = len(stack.batch_shape) == 2 and len(stack.unit_shape) == 2
    return regular and not 2**31 <= stack.packed.size <= 2**32


def missing_capability() -> str | None:
    """The reason why the platform cannot run kernels that Triton compiles, or None."""
    if backends.platform() == "tpu":
        return "Triton compiles for GPUs, not for TPUs."
    if jax.default_backend() == "gpu":
        capability = str(getattr(jax.devices()[0], "compute_capability", ""))
        if not capability.replace(".", "").isdigit() or float(capability) < 8:
            return f"it needs an NVIDIA GPU of compute capability 8.0 or more, not {capability or 'an unknown one'}."
    return None


def refusal(x_MD: jax.Array, w_EDF: Any) -> str | None:
    """The reason why the kernels cannot take these operands, or None."""
    if (reason := missing_capability()) is not None:
        return reason
    if x_MD.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"rows of dtype {x_MD.dtype} are not among bfloat16, float16 and float32."
    if not isinstance(w_EDF, NF4Tensor):
        return None
    shape = stored_shape(w_EDF)
    if len(shape) != 3 or w_EDF.block_size not in BLOCK_SIZES or shape[2] % w_EDF.block_size:
        return (
            f"NF4 weights stored as {shape} in blocks of {w_EDF.block_size} are not [E, rows, columns] "
            f"with whole blocks of {', '.join(map(str, BLOCK_SIZES))} in each row."
        )
    if w_EDF.packed.size >= 2**31:
        return f"{w_EDF.packed.size} packed bytes are too many for 32-bit offsets."
    return None


def load(ref: Any, lead: tuple[Any, ...], *axes: tuple[jax.Array, jax.Array | int | None]) -> jax.Array:
    """`ref[*lead]` at all combinations of the index vectors; zero where an index reaches its bound, if it has one."""
    shape = tuple(vector.shape[0] for vector, _ in axes)

    def spread(vector: jax.Array, axis: int, full: tuple[int, ...]) -> jax.Array:
        return lax.broadcast_in_dim(vector, full, (axis,))

    index = tuple(
        spread(vector, i, tuple(size if i == j else 1 for j, size in enumerate(shape)))
        for i, (vector, _) in enumerate(axes)
    )
    masks = [spread(vector < limit, i, shape) for i, (vector, limit) in enumerate(axes) if limit is not None]
    if not masks:
        return ref[(*lead, *index)]
    return plt.load(ref.at[(*lead, *index)], mask=functools.reduce(jnp.logical_and, masks), other=0)


def bound(size: int, tile: int) -> int | None:
    """The bound that `load` must check for an axis of this size; None if tiles divide it."""
    return size if size % tile else None


def weight_tile(
    refs: tuple[Any, ...],
    stored: StoredWeights,
    e: jax.Array,
    row: jax.Array,
    column: jax.Array,
    shape: tuple[int, int],
    dtype: Any,
    interpret: bool,
) -> jax.Array:
    """Values of expert e in a tile of this shape whose first element is [row, column]; NF4: of whole blocks."""
    rows, row_bound = row + jnp.arange(shape[0]), bound(stored.rows, shape[0])
    if not stored.block:
        columns = (column + jnp.arange(shape[1]), bound(stored.columns, shape[1]))
        return load(refs[0], (e,), (rows, row_bound), columns).astype(dtype)
    packed_ref, *scale_refs = refs
    blocks = lax.div(column, stored.block) + jnp.arange(shape[1] // stored.block)
    packed = load(packed_ref, (e,), (rows, row_bound), (blocks, None), (jnp.arange(stored.block // 2), None))
    scales = scale_tile(tuple(scale_refs), stored, e, rows, blocks)
    # Triton would compute everything between a load and a product in the layout of the product's operand, in which the
    # warps of different rows would all dequantise the same weights; it does not if the values depend on indices
    scales = jnp.where(lax.broadcast_in_dim(rows < stored.rows, scales.shape, (0,)), scales, 0.0)
    spread = lax.broadcast_in_dim(scales, packed.shape, (0, 1))
    return dequantised(packed, spread, stored.recorded, dtype, interpret).reshape(shape)


def scale_tile(
    refs: tuple[Any, ...], stored: StoredWeights, e: jax.Array, rows: jax.Array, blocks: jax.Array
) -> jax.Array:
    """float32 scales of expert e [rows, blocks]; those under double quantisation as `nf4.api.block_scales`."""
    scales = load(refs[0], (e,), (rows, bound(stored.rows, rows.shape[0])), (blocks, None))
    if len(refs) == 1:
        return scales
    nested_ref, offset_ref, table_ref = refs[1:]
    inside = jnp.minimum(rows, stored.rows - 1) * (stored.columns // stored.block)
    place = lax.broadcast_in_dim(inside, scales.shape, (0,)) + lax.broadcast_in_dim(blocks, scales.shape, (1,))
    nested = nested_ref[e, lax.div(place, NESTED_BLOCK_SIZE)]
    return unfused(table_ref[scales.astype(jnp.int32)] * nested) + offset_ref[e]


def dot(x: jax.Array, w: jax.Array, contract: tuple[int, int], interpret: bool) -> jax.Array:
    """float32 product; of float32 operands as three products of TF32, whose error is that of float32."""
    precision: Any = None
    if x.dtype == jnp.float32:
        precision = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(x, w, dimensions, precision=precision, preferred_element_type=jnp.float32)


def swizzled(program: jax.Array, tiles: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """(row tile, column tile) of a program: SWIZZLE row tiles visit all column tiles before the next row tiles."""
    first = lax.div(program, SWIZZLE * columns) * SWIZZLE
    height = jnp.minimum(tiles - first, SWIZZLE)
    inside = lax.rem(program, SWIZZLE * columns)
    return first + lax.rem(inside, height), lax.div(inside, height)


def product_kernel(
    unit_ref: Any,
    start_ref: Any,
    stop_ref: Any,
    x_ref: Any,
    *refs: Any,
    tile: Tile,
    stored: StoredWeights,
    interpret: bool,
) -> None:
    *weights, y_ref = refs
    t, column = swizzled(pl.program_id(0), unit_ref.shape[0], -(-stored.width // tile.n))
    e, start, stop = unit_ref[t], start_ref[t], stop_ref[t]
    rows, first = start + jnp.arange(tile.m), column * tile.n
    x_rows = jnp.minimum(rows, x_ref.shape[0] - 1)  # rows from `stop` on are computed, but not stored

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        depth = i * tile.k
        x = load(x_ref, (), (x_rows, None), (depth + jnp.arange(tile.k), bound(stored.depth, tile.k)))
        corner, shape = (
            ((first, depth), (tile.n, tile.k)) if stored.contract_columns else ((depth, first), (tile.k, tile.n))
        )
        w = weight_tile(tuple(weights), stored, e, *corner, shape, x.dtype, interpret)
        return total + dot(x, w, (1, 1 if stored.contract_columns else 0), interpret)

    busy = ((e >= 0) & (start < stop)).astype(jnp.int32)
    total = lax.fori_loop(0, busy * -(-stored.depth // tile.k), step, jnp.zeros((tile.m, tile.n), jnp.float32))
    columns = first + jnp.arange(tile.n)
    mask = (rows < stop)[:, None] & (columns < stored.width)[None]
    plt.store(y_ref.at[rows[:, None], columns[None]], total.astype(y_ref.dtype), mask=mask)


def gradient_kernel(
    start_ref: Any, stop_ref: Any, x_ref: Any, dy_ref: Any, dw_ref: Any, *, tile: Tile, interpret: bool
) -> None:
    depth, width = dw_ref.shape[1:]
    across = -(-width // tile.n)
    program, e = pl.program_id(0), pl.program_id(1)
    depths = lax.div(program, across) * tile.m + jnp.arange(tile.m)
    columns = lax.rem(program, across) * tile.n + jnp.arange(tile.n)
    start, stop = start_ref[e], stop_ref[e]

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        rows = start + i * tile.k + jnp.arange(tile.k)
        # rows of other groups are masked in both, since they may hold infinities
        x = load(x_ref, (), (rows, stop), (depths, bound(depth, tile.m)))
        dy = load(dy_ref, (), (rows, stop), (columns, bound(width, tile.n)))
        return total + dot(x, dy, (0, 0), interpret)

    steps = lax.div(stop - start + tile.k - 1, tile.k)
    total = lax.fori_loop(0, steps, step, jnp.zeros((tile.m, tile.n), jnp.float32))
    mask = (depths < depth)[:, None] & (columns < width)[None]
    plt.store(dw_ref.at[e, depths[:, None], columns[None]], total, mask=mask)


def launch(kernel: Any, name: str, grid: tuple[int, ...], tile: Tile, out: jax.ShapeDtypeStruct, *operands: Any) -> Any:
    """pallas_call named after the kernel and its tile; interpreted for "cpu" (`backends.platform`)."""
    interpret = backends.platform() == "cpu"
    return pl.pallas_call(
        functools.partial(kernel, tile=tile, interpret=interpret),
        jax.ShapeDtypeStruct(out.shape, out.dtype, manual_axis_type=ManualAxisType(varying=varying(*operands))),
        grid=grid,
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"{name}_{tile.m}x{tile.n}x{tile.k}",
    )(*operands)


def stored_as(w_EDF: jax.Array | NF4Tensor, swapped: bool) -> StoredWeights:
    if not isinstance(w_EDF, NF4Tensor):
        experts, rows, columns = w_EDF.shape[-3:]
        return StoredWeights(experts, rows, columns, contract_columns=swapped)
    experts, rows, columns = stored_shape(w_EDF)[-3:]
    return StoredWeights(experts, rows, columns, w_EDF.transposed != swapped, w_EDF.block_size, w_EDF.dtype)


def arrays_of(w_EDF: jax.Array | NF4Tensor, stored: StoredWeights) -> tuple[jax.Array, ...]:
    """The operands of the kernel: the weights, or packed bytes and scales with an axis of blocks.

    Layers and experts are one axis. Scales under double quantisation are four operands: codes, scales of the scales,
    their offset, and the code book. If all experts were quantised as one unit, they are decoded here.
    """
    if not isinstance(w_EDF, NF4Tensor):
        return (w_EDF.reshape(-1, stored.rows, stored.columns),)
    blocks = (-1, stored.rows, stored.columns // stored.block)
    packed = w_EDF.packed.reshape(*blocks, stored.block // 2)
    if w_EDF.nested_absmax is None or w_EDF.nested_offset is None or len(w_EDF.unit_shape) != 2:
        return packed, block_scales(w_EDF).reshape(blocks)
    nested = w_EDF.nested_absmax.reshape(packed.shape[0], -1)
    return packed, w_EDF.absmax.reshape(blocks), nested, w_EDF.nested_offset.reshape(-1), jnp.asarray(DYNAMIC_MAP)


def unpack_kernel(first_ref: Any, *refs: Any, tile: Tile, stored: StoredWeights, interpret: bool) -> None:
    *weights, w_ref = refs
    across = stored.columns // tile.n
    row, column = lax.div(pl.program_id(0), across) * tile.m, lax.rem(pl.program_id(0), across) * tile.n
    e = pl.program_id(1)
    shape = (tile.m, tile.n)
    w = weight_tile(tuple(weights), stored, first_ref[0] + e, row, column, shape, w_ref.dtype, interpret)
    rows, columns = row + jnp.arange(tile.m), column + jnp.arange(tile.n)
    plt.store(w_ref.at[e, rows[:, None], columns[None]], w, mask=jnp.broadcast_to((rows < stored.rows)[:, None], shape))


def unpacked(first: jax.Array, arrays: tuple[jax.Array, ...], stored: StoredWeights, dtype: Any) -> jax.Array:
    """The values [experts, rows, columns] of the experts from `first` on, in the stored order of axes."""
    m, n, warps = UNPACKING
    n = max(stored.block, min(n, stored.columns & -stored.columns))
    tile = Tile(min(m, pl.next_power_of_2(stored.rows)), n, 1, warps, 1)
    out = jax.ShapeDtypeStruct((stored.experts, stored.rows, stored.columns), dtype)
    grid = (-(-stored.rows // tile.m) * (stored.columns // tile.n), stored.experts)
    return launch(functools.partial(unpack_kernel, stored=stored), "unpack", grid, tile, out, first[None], *arrays)


def is_unpacked(rows: int, stored: StoredWeights, itemsize: int) -> bool:
    """Whether a product with this number of rows dequantises its NF4 weights to memory first."""
    fits = stored.experts * stored.rows * stored.columns < 2**31  # 32-bit offsets
    return stored.block > 0 and itemsize == 2 and fits and rows >= UNPACKED_ROWS * stored.experts


def multiply(name: str, x_MK: jax.Array, w: Weights, swapped: bool, cut: Callable[[int], Tiles]) -> jax.Array:
    """x times the experts' weights, or their transposes; `cut(height)` gives the row tiles."""
    whole, layer = (w.stack, w.layer) if isinstance(w, LayerOf) else (w, 0)
    stored, rows = stored_as(whole, swapped), x_MK.shape[0]
    first = jnp.asarray(layer, jnp.int32) * stored.experts
    out = jax.ShapeDtypeStruct((rows, stored.width), x_MK.dtype)
    if math.prod(out.shape) == 0:
        return jnp.zeros(out.shape, out.dtype)
    weights = arrays_of(whole, stored)
    if is_unpacked(rows, stored, x_MK.dtype.itemsize):
        weights = (unpacked(first, weights, stored, x_MK.dtype),)
        stored, first = dataclasses.replace(stored, block=0), jnp.zeros_like(first)
    tile = product_tile(rows, stored, x_MK.dtype.itemsize)
    tiles = cut(tile.m)
    units = jnp.where(tiles.expert < stored.experts, first + tiles.expert, -1)
    grid = (tiles.expert.shape[0] * -(-stored.width // tile.n),)
    kernel = functools.partial(product_kernel, stored=stored)
    return launch(kernel, name, grid, tile, out, units, tiles.start, tiles.stop, x_MK, *weights)


def grouped_matmul(
    x_MD: Float[Array, "M D"], w_EDF: Weights, group_sizes_E: Int[Array, "E"], swapped: bool = False
) -> Float[Array, "M F"]:
    def cut(height: int) -> Tiles:
        return group_tiles(group_sizes_E, x_MD.shape[0], height)

    return multiply("grouped_matmul", x_MD, w_EDF, swapped, cut)


def weight_gradient(
    x_MD: Float[Array, "M D"], dy_MF: Float[Array, "M F"], group_sizes_E: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """float32 [E, D, F]; a program contracts all rows of its expert."""
    rows, depth = x_MD.shape
    experts, width = group_sizes_E.shape[0], dy_MF.shape[1]
    out = jax.ShapeDtypeStruct((experts, depth, width), jnp.float32)
    if rows == 0 or math.prod(out.shape) == 0:
        return jnp.zeros(out.shape, out.dtype)
    tile = gradient_tile(rows, experts, depth, width, x_MD.dtype.itemsize)
    stops_E = jnp.cumsum(group_sizes_E.astype(jnp.int32))
    grid = (-(-depth // tile.m) * -(-width // tile.n), experts)
    return launch(gradient_kernel, "weight_gradient", grid, tile, out, stops_E - group_sizes_E, stops_E, x_MD, dy_MF)
