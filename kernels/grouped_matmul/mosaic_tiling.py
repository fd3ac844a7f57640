"""Tile sizes of the TPU kernels that fit into vector memory (VMEM), and the operands for which no tile fits."""

import jax
import jax.numpy as jnp

from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.mosaic_tile import CHUNK, LANES

HEIGHT = 128
"""Rows of a visit. The matrix unit takes 128 cycles to load 128 x 128 weights, so fewer rows are not faster."""

VMEM_LIMIT = 60 * 2**20
"""Limit of a kernel. v5p has 64 MiB a core, v5e and v6e have 128. TPUs up to v4 have 16: compilation fails there."""

VMEM_FOR_TILES = {2: 48 * 2**20, 4: 32 * 2**20}
"""Bytes that tiles may take, by bytes of an element. The compiler needs the rest: it splits float32 operands into three
bfloat16 parts."""

WIDTHS = (1024, 512, 256, 128)
"""Columns of a tile of the result. The activations are read once for each tile: n columns give n FLOPs a byte in
bfloat16, and a v5e needs 240 to be limited by compute."""

GRADIENT_TILE = 2**20
"""Elements of a tile of the weight gradient: 1,024 x 1,024 give 512 FLOPs a byte."""

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Sizes of NF4 blocks that divide a chunk of columns."""


Shaped = jax.Array | jax.ShapeDtypeStruct


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def refusal(x_MD: jax.Array, w_EDF: Shaped | NF4Tensor) -> str | None:
    """The reason why the kernels cannot take these operands in either pass, or None."""
    if x_MD.dtype not in (jnp.bfloat16, jnp.float32):
        return f"TPUs multiply bfloat16 and float32, not {x_MD.dtype}."
    if isinstance(w_EDF, NF4Tensor):
        shape, size = (*w_EDF.batch_shape, *w_EDF.unit_shape), w_EDF.block_size
        if len(shape) != 3 or size not in BLOCK_SIZES or shape[2] % size:
            return (
                f"NF4 weights stored as {shape} in blocks of {size} are not [E, rows, columns] with whole blocks of "
                f"{', '.join(map(str, BLOCK_SIZES))} in each row."
            )
    d, f = w_EDF.shape[1:]
    if None in (tile_columns(x_MD.dtype, w_EDF, False), tile_columns(x_MD.dtype, w_EDF, True)):
        return f"tiles of whole rows and columns of {d} x {f} matrices do not fit into VMEM in {x_MD.dtype}."
    return None


def tile_columns(dtype: jnp.dtype, w_EDF: Shaped | NF4Tensor, swapped: bool) -> int | None:
    """Columns of a tile of the result in this dtype, or None if no tile fits."""
    k, n = w_EDF.shape[1:][::-1] if swapped else w_EDF.shape[1:]
    if isinstance(w_EDF, NF4Tensor):
        return packed_columns(k, n, dtype, w_EDF.transposed != swapped, w_EDF.block_size)
    return dense_columns(k, n, dtype)


def dense_columns(k: int, n: int, dtype: jnp.dtype) -> int | None:
    # VMEM has rows and results twice, to overlap transfers and computation, and the product once more in float32
    item, lanes = dtype.itemsize, round_up(k, LANES)
    return widest(n, 2 * lanes * item + HEIGHT * (2 * item + 4), VMEM_FOR_TILES[item] - 2 * HEIGHT * lanes * item)


def packed_columns(k: int, n: int, dtype: jnp.dtype, contracts_pairs: bool, block_size: int) -> int | None:
    # as above, but values of the matrix once, its packed bytes and scales twice
    item, lanes = dtype.itemsize, round_up(k, CHUNK)
    column, room = lanes * (item + 1) + HEIGHT * (2 * item + 4), VMEM_FOR_TILES[item] - 2 * HEIGHT * lanes * item
    if contracts_pairs:
        return widest(n, column + 8 * round_up(-(-k // block_size), LANES), room)
    whole, scales = round_up(n, CHUNK), 8 * LANES * k
    widths = (width for width in WIDTHS if width >= CHUNK and whole % width == 0)
    return next((width for width in widths if scales + width * column <= room), None)


def widest(columns: int, bytes_per_column: int, room: int) -> int | None:
    """The most columns that fit into `room` bytes, of widths for which padding is at most a sixteenth of the matrix."""
    tight = [width for width in WIDTHS if -columns % width * 16 <= columns or width == WIDTHS[-1]]
    widths = [columns, *tight] if columns <= WIDTHS[0] else tight
    return next((width for width in widths if width * bytes_per_column <= room), None)


def gradient_tile(d: int, f: int) -> tuple[int, int]:
    """Rows and columns of a tile of the weight gradient, each all of its axis or a multiple of 128."""
    columns = min(f, WIDTHS[0])
    most = GRADIENT_TILE // round_up(columns, LANES)
    return round_up(-(-d // -(-d // most)), LANES) if d > most else d, columns
