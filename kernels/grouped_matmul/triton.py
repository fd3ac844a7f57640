"""Backend in Pallas kernels that Triton compiles, for NVIDIA GPUs from compute capability 8.0 (A100) on.

A program computes one tile of the output: rows of one expert times columns of its matrix, accumulated in float32
registers. The grid is static; a tile without rows ends at once. NF4 weights come as packed bytes. For few rows they
become values on their way to the tensor cores, one tile at a time, and memory sees the packed bytes alone; for many,
where every weight would become a value once for each tile of rows, they are written out first, one matrix of all
experts at a time. On a CPU the kernels are interpreted.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.sharding import ManualAxisType
from jaxtyping import Array, Float, Int

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.grouped_matmul.tiles import Tiles, group_tiles
from bimedix_jax.kernels.manual_axes import varying
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.api import block_scales
from bimedix_jax.kernels.nf4.triton_tile import dequantised

BLOCK_SIZES = (32, 64, 128)
"""NF4 blocks of which tiles are whole multiples."""
MULTIPROCESSORS = 108
"""Of an A100."""
UNPACKED_ROWS = 512
"""Rows of an expert, on average, from which its NF4 weights are written out first. Writing and reading 2 bytes a weight
takes an H100 as long as its products on packed weights lose on 300 rows (docs/results/gpu.md)."""
UNPACKING = (16, 512, 4)
"""Rows and columns of a tile that is written out, and the warps that do it."""
SWIZZLE = 8
"""Row tiles that run through all columns together: they and a wave's columns of weights fit into the L2 cache."""


class Tile(NamedTuple):
    """Rows, columns and contraction of one step of a program; its warps; the stages of its pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """How weights [experts, rows, columns] lie, and along which axis a product contracts them.

    `block` is the size of NF4 blocks, 0 for dense weights; `recorded` the dtype that was quantised.
    """

    experts: int
    rows: int
    columns: int
    contract_columns: bool
    block: int = 0
    recorded: str = ""

    @property
    def depth(self) -> int:
        return self.columns if self.contract_columns else self.rows

    @property
    def width(self) -> int:
        return self.rows if self.contract_columns else self.columns


def stored_shape(t: NF4Tensor) -> tuple[int, ...]:
    return t.batch_shape + t.unit_shape


def refusal(x_MD: jax.Array, w_EDF: jax.Array | NF4Tensor) -> str | None:
    """Why these operands cannot be taken, or None."""
    if backends.platform() == "tpu":
        return "Triton compiles for GPUs, not for TPUs."
    if jax.default_backend() == "gpu":
        capability = str(getattr(jax.devices()[0], "compute_capability", ""))
        if not capability.replace(".", "").isdigit() or float(capability) < 8:
            return f"it needs an NVIDIA GPU of compute capability 8.0 or more, not {capability or 'an unknown one'}."
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
        return f"{w_EDF.packed.size} packed bytes are more than 32-bit offsets reach."
    return None


def power_of_two(size: int, most: int) -> int:
    """The smallest that holds `size`, from 16, the least that tensor cores take, to `most`."""
    return min(most, max(16, pl.next_power_of_2(max(size, 1))))


def product_tile(rows: int, layout: Layout, itemsize: int) -> Tile:
    """The tile of a product, by shapes alone; at Mixtral's none spills on an A100 (tests/kernels/test_codegen.py)."""
    # of dense weights at most half an expert's even share of rows, so that the last tile of a group costs at most half
    # as much again; packed ones become values once for each tile of rows, so that one holds most groups whole
    m = power_of_two(-(-rows * (4 if layout.block else 1) // (2 * layout.experts)), 128)
    if itemsize == 4:  # three products of TF32 each, whose operands take twice the registers
        m, n, k, warps, stages = min(m, 32), 64, 32, 4, 2
    elif layout.block:
        n, k, warps, stages = (128, 64, 8, 3) if m == 128 else (64, 256, 4, 4) if m == 16 else (64, 128, 4, 3)
    elif m == 128 and layout.width >= 1024:
        n, k, warps, stages = 256, 64, 8, 3
    else:  # a narrow output, such as that of an adapter's first factor, has few tiles; lower ones occupy more of a GPU
        m, n, k, warps, stages = min(m, 64), 128, 32, 4, 4
    # few rows only read the weights: every multiprocessor takes part, as many bytes at once as before
    narrows = m == 16 and itemsize == 2 and layout.block > 0 and layout.contract_columns
    while narrows and n > 32 and n * MULTIPROCESSORS > layout.width:
        n, k = n // 2, k * 2
    n, k = power_of_two(layout.width, n), power_of_two(layout.depth, k)
    if layout.block:  # whole blocks, and as many tiles as the columns have
        along = max(layout.block, min(layout.columns & -layout.columns, k if layout.contract_columns else n))
        n, k = (n, along) if layout.contract_columns else (along, k)
        m = 16 if itemsize == 4 and k == 128 else m
    return Tile(m, n, k, warps, stages)


def gradient_tile(rows: int, experts: int, depth: int, width: int, itemsize: int) -> Tile:
    """The tile of a gradient to the weights: m of its rows, n of its columns, k rows of the operands."""
    most = 64 if itemsize == 4 else 128
    m, n = power_of_two(depth, most), power_of_two(width, most)
    k = power_of_two(-(-rows // experts), 32)
    return Tile(m, n, k, 8 if m * n >= 128 * 128 else 4, 2 if itemsize == 4 else 3)


def load(ref: Any, lead: tuple[Any, ...], *axes: tuple[jax.Array, jax.Array | int | None]) -> jax.Array:
    """`ref[*lead]` at every combination of the index vectors; zero where one reaches its bound, unless that is None."""
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
    """The bound that `load` must check for an axis of this size."""
    return size if size % tile else None


def weight_tile(
    refs: tuple[Any, ...],
    layout: Layout,
    e: jax.Array,
    row: jax.Array,
    column: jax.Array,
    shape: tuple[int, int],
    dtype: Any,
    interpret: bool,
) -> jax.Array:
    """Values of expert e in a tile of this shape whose first element is [row, column]; NF4: of whole blocks."""
    rows, row_bound = row + jnp.arange(shape[0]), bound(layout.rows, shape[0])
    if not layout.block:
        return load(refs[0], (e,), (rows, row_bound), (column + jnp.arange(shape[1]), bound(layout.columns, shape[1])))
    packed_ref, scale_ref = refs
    blocks = lax.div(column, layout.block) + jnp.arange(shape[1] // layout.block)
    packed = load(packed_ref, (e,), (rows, row_bound), (blocks, None), (jnp.arange(layout.block // 2), None))
    scales = load(scale_ref, (e,), (rows, row_bound), (blocks, None))
    # Triton would move everything between a load and a product to the product's operand layout, in which the warps of
    # different rows would each dequantise the same weights; indices among the ancestors keep it from that
    scales = jnp.where(lax.broadcast_in_dim(rows < layout.rows, scales.shape, (0,)), scales, 0.0)
    spread = lax.broadcast_in_dim(scales, packed.shape, (0, 1))
    return dequantised(packed, spread, layout.recorded, dtype, interpret).reshape(shape)


def dot(x: jax.Array, w: jax.Array, contract: tuple[int, int], interpret: bool) -> jax.Array:
    """float32 product; of float32 operands as three products of TF32, whose error is that of float32."""
    precision: Any = None
    if x.dtype == jnp.float32:
        precision = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(x, w, dimensions, precision=precision, preferred_element_type=jnp.float32)


def swizzled(program: jax.Array, tiles: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """(row tile, column tile) of a program: SWIZZLE row tiles go through all columns before the next ones start."""
    first = lax.div(program, SWIZZLE * columns) * SWIZZLE
    height = jnp.minimum(tiles - first, SWIZZLE)
    inside = lax.rem(program, SWIZZLE * columns)
    return first + lax.rem(inside, height), lax.div(inside, height)


def product_kernel(
    expert_ref: Any, start_ref: Any, stop_ref: Any, x_ref: Any, *refs: Any, tile: Tile, layout: Layout, interpret: bool
) -> None:
    *weights, y_ref = refs
    t, column = swizzled(pl.program_id(0), expert_ref.shape[0], -(-layout.width // tile.n))
    e, start, stop = expert_ref[t], start_ref[t], stop_ref[t]
    rows, first = start + jnp.arange(tile.m), column * tile.n
    x_rows = jnp.minimum(rows, x_ref.shape[0] - 1)  # rows from `stop` on are computed and not stored

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        depth = i * tile.k
        x = load(x_ref, (), (x_rows, None), (depth + jnp.arange(tile.k), bound(layout.depth, tile.k)))
        corner, shape = (
            ((first, depth), (tile.n, tile.k)) if layout.contract_columns else ((depth, first), (tile.k, tile.n))
        )
        w = weight_tile(tuple(weights), layout, e, *corner, shape, x.dtype, interpret)
        return total + dot(x, w, (1, 1 if layout.contract_columns else 0), interpret)

    busy = ((e < layout.experts) & (start < stop)).astype(jnp.int32)
    total = lax.fori_loop(0, busy * -(-layout.depth // tile.k), step, jnp.zeros((tile.m, tile.n), jnp.float32))
    columns = first + jnp.arange(tile.n)
    mask = (rows < stop)[:, None] & (columns < layout.width)[None]
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
    """pallas_call with a name that says what runs; interpreted for "cpu" (`backends.platform`)."""
    interpret = backends.platform() == "cpu"
    return pl.pallas_call(
        functools.partial(kernel, tile=tile, interpret=interpret),
        jax.ShapeDtypeStruct(out.shape, out.dtype, manual_axis_type=ManualAxisType(varying=varying(*operands))),
        grid=grid,
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"{name}_{tile.m}x{tile.n}x{tile.k}",
    )(*operands)


def layout_of(w_EDF: jax.Array | NF4Tensor, swapped: bool) -> Layout:
    if not isinstance(w_EDF, NF4Tensor):
        experts, rows, columns = w_EDF.shape
        return Layout(experts, rows, columns, contract_columns=swapped)
    experts, rows, columns = stored_shape(w_EDF)
    return Layout(experts, rows, columns, w_EDF.transposed != swapped, w_EDF.block_size, w_EDF.dtype)


def arrays_of(w_EDF: jax.Array | NF4Tensor, layout: Layout) -> tuple[jax.Array, ...]:
    """What the kernel reads: the weights, or packed bytes and scales with an axis of blocks."""
    if not isinstance(w_EDF, NF4Tensor):
        return (w_EDF,)
    blocks = (layout.experts, layout.rows, layout.columns // layout.block)
    return w_EDF.packed.reshape(*blocks, layout.block // 2), block_scales(w_EDF).reshape(blocks)


def unpack_kernel(packed_ref: Any, scale_ref: Any, w_ref: Any, *, tile: Tile, layout: Layout, interpret: bool) -> None:
    across = layout.columns // tile.n
    row, column = lax.div(pl.program_id(0), across) * tile.m, lax.rem(pl.program_id(0), across) * tile.n
    e = pl.program_id(1)
    refs, shape = (packed_ref, scale_ref), (tile.m, tile.n)
    w = weight_tile(refs, layout, e, row, column, shape, w_ref.dtype, interpret)
    rows, columns = row + jnp.arange(tile.m), column + jnp.arange(tile.n)
    plt.store(w_ref.at[e, rows[:, None], columns[None]], w, mask=jnp.broadcast_to((rows < layout.rows)[:, None], shape))


def unpacked(arrays: tuple[jax.Array, ...], layout: Layout, dtype: Any) -> jax.Array:
    """The values [experts, rows, columns] of `arrays_of` NF4 weights, as they lie."""
    m, n, warps = UNPACKING
    n = max(layout.block, min(n, layout.columns & -layout.columns))
    tile = Tile(min(m, pl.next_power_of_2(layout.rows)), n, 1, warps, 1)
    out = jax.ShapeDtypeStruct((layout.experts, layout.rows, layout.columns), dtype)
    grid = (-(-layout.rows // tile.m) * (layout.columns // tile.n), layout.experts)
    return launch(functools.partial(unpack_kernel, layout=layout), "unpack", grid, tile, out, *arrays)


def is_unpacked(rows: int, layout: Layout, itemsize: int) -> bool:
    """Whether a product of so many rows has its NF4 weights written out first."""
    fits = layout.experts * layout.rows * layout.columns < 2**31  # 32-bit offsets
    return layout.block > 0 and itemsize == 2 and fits and rows >= UNPACKED_ROWS * layout.experts


def multiply(
    name: str, x_MK: jax.Array, w: jax.Array | NF4Tensor, swapped: bool, cut: Callable[[int], Tiles]
) -> jax.Array:
    """x times the stacked weights, or their transposes, by the row tiles that `cut` makes for a height."""
    layout, rows = layout_of(w, swapped), x_MK.shape[0]
    out = jax.ShapeDtypeStruct((rows, layout.width), x_MK.dtype)
    if math.prod(out.shape) == 0:
        return jnp.zeros(out.shape, out.dtype)
    weights = arrays_of(w, layout)
    if is_unpacked(rows, layout, x_MK.dtype.itemsize):
        weights = (unpacked(weights, layout, x_MK.dtype),)
        layout = dataclasses.replace(layout, block=0)
    tile = product_tile(rows, layout, x_MK.dtype.itemsize)
    tiles = cut(tile.m)
    grid = (tiles.expert.shape[0] * -(-layout.width // tile.n),)
    kernel = functools.partial(product_kernel, layout=layout)
    return launch(kernel, name, grid, tile, out, *tiles, x_MK, *weights)


def grouped_matmul(
    x_MD: Float[Array, "M D"], w_EDF: jax.Array | NF4Tensor, group_sizes_E: Int[Array, "E"], swapped: bool = False
) -> Float[Array, "M F"]:
    def cut(height: int) -> Tiles:
        return group_tiles(group_sizes_E, x_MD.shape[0], height)

    return multiply("grouped_matmul", x_MD, w_EDF, swapped, cut)


def weight_gradient(
    x_MD: Float[Array, "M D"], dy_MF: Float[Array, "M F"], group_sizes_E: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """float32 [E, D, F], each expert's rows contracted by the programs of its own tiles."""
    rows, depth = x_MD.shape
    experts, width = group_sizes_E.shape[0], dy_MF.shape[1]
    out = jax.ShapeDtypeStruct((experts, depth, width), jnp.float32)
    if rows == 0 or math.prod(out.shape) == 0:
        return jnp.zeros(out.shape, out.dtype)
    tile = gradient_tile(rows, experts, depth, width, x_MD.dtype.itemsize)
    stops_E = jnp.cumsum(group_sizes_E.astype(jnp.int32))
    grid = (-(-depth // tile.m) * -(-width // tile.n), experts)
    return launch(gradient_kernel, "weight_gradient", grid, tile, out, stops_E - group_sizes_E, stops_E, x_MD, dy_MF)
