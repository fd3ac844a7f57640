"""NF4 inside TPU kernels: from packed bytes in the layout of bitsandbytes to a tile of a matrix, in vector registers.

A row of the stored matrix runs along the 128 lanes, two elements a byte. Interleaving lanes is slow on a TPU, so the
columns of each chunk of 256 are reordered: the 128 even ones (high nibbles), then the 128 odd ones. Activations are
reordered in the same way (`split_pairs`), and results are ordered back (`merge_pairs`). Values and scales are looked up
by gathers along lanes: libtpu schedules 4.3 instructions per 1,024 elements on a v5e, against 6 for a chain of selects.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from bimedix_jax.kernels.nf4.api import unfused
from bimedix_jax.kernels.nf4.tables import DYNAMIC_MAP, NESTED_BLOCK_SIZE, NF4_VALUES

LANES = 128
CHUNK = 2 * LANES
"""Columns that 128 bytes hold."""
ROWS = 64
"""Rows that one step dequantises: a multiple of 32, the rows of a register of bytes."""


def look_up(table: jax.Array, lanes: jax.Array) -> jax.Array:
    """table[r, lanes[r, c]] for both [rows, 128]."""
    if (rows := lanes.shape[0]) == 1:  # Mosaic does not support the gather that JAX emits for a single row
        return look_up(jnp.tile(table, (2, 1)), jnp.tile(lanes, (2, 1)))[:rows]
    return jnp.take_along_axis(table, lanes, axis=1, mode="promise_in_bounds")


def lane_iota(rows: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)


def value_table() -> jax.Array:
    """float32 [ROWS, 128], every row repeating the 16 values; an operand, because kernels cannot capture arrays."""
    return jnp.tile(jnp.asarray(NF4_VALUES), (ROWS, LANES // NF4_VALUES.size))


def code_table(units: int) -> jax.Array:
    """float32 [2, units, 128]: the two halves of the code book of scales, repeated for every unit."""
    return jnp.broadcast_to(jnp.asarray(DYNAMIC_MAP).reshape(2, 1, LANES), (2, units, LANES))


def decode_scales(codes_ref: Any, nested_ref: Any, offset_ref: Any, table_ref: Any, scales_ref: Any) -> None:
    """Decodes double quantisation like `nf4.api.block_scales`, whose look-up becomes slow gathers on a TPU.

    Args:
      codes_ref: uint8 [units, 256 * 128].
      nested_ref: float32 [units, 128], second-level scales.
      offset_ref: float32 [units, 128], the offset of a unit in each lane.
      table_ref: `code_table`.
      scales_ref: float32 [units, 256 * 128].
    """
    units = codes_ref.shape[0]

    @pl.loop(0, codes_ref.shape[1] // NESTED_BLOCK_SIZE)
    def _(group: jax.Array) -> None:
        nested = look_up(nested_ref[...], jnp.full((units, LANES), group, jnp.int32))
        for half in range(NESTED_BLOCK_SIZE // LANES):
            here = pl.ds(pl.multiple_of(group * NESTED_BLOCK_SIZE + half * LANES, LANES), LANES)
            codes = codes_ref[:, here].astype(jnp.int32)
            low, high = (look_up(table_ref[part], codes & (LANES - 1)) for part in range(2))
            scales_ref[:, here] = unfused(jnp.where(codes < LANES, low, high) * nested) + offset_ref[...]


def decode_rows(
    codes_ref: Any,
    nested_ref: Any,
    offset_ref: Any,
    table_ref: Any,
    scales_ref: Any,
    *,
    scales_a_row: int,
    first_scale: jax.Array | int = 0,
) -> None:
    """Decodes scales under double quantisation, stored by rows (`nf4.rows.RowMajor`), like `nf4.api.block_scales`.

    Args:
      codes_ref: uint8 [rows, multiple of 128], some columns of the scales of each row; rows a multiple of 128.
      nested_ref: float32 [groups, rows], second-level scales of the groups that a row touches.
      offset_ref: float32 [1, 128], the offset in each lane.
      table_ref: `code_table` of 128 units.
      scales_ref: float32, the shape of codes_ref.
      scales_a_row: of the whole matrix; it divides into the groups of 256 of its flattening.
      first_scale: column of the matrix that is column 0 here.
    """
    rows, columns = codes_ref.shape

    @pl.loop(0, rows // LANES)
    def _(step: jax.Array) -> None:
        here = pl.ds(pl.multiple_of(step * LANES, LANES), LANES)
        # lanes of a row of nested scales become rows, each with its scale in all lanes
        groups = [
            jnp.broadcast_to(nested_ref[group : group + 1, here], (LANES, LANES)).T
            for group in range(nested_ref.shape[0])
        ]
        row = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0)
        place = (row * scales_a_row) & (NESTED_BLOCK_SIZE - 1)  # 128 rows are a whole number of groups
        for start in range(0, columns, LANES):
            nested = groups[0]
            for group in range(1, len(groups)):
                reached = place + (lane_iota(LANES) + (first_scale + start)) >= group * NESTED_BLOCK_SIZE
                nested = jnp.where(reached, groups[group], nested)
            codes = codes_ref[here, start : start + LANES].astype(jnp.int32)
            low, high = (look_up(table_ref[part], codes & (LANES - 1)) for part in range(2))
            values = unfused(jnp.where(codes < LANES, low, high) * nested) + offset_ref[...]
            scales_ref[here, start : start + LANES] = values


def dequantise_tile(
    packed_ref: Any,
    scales_ref: Any,
    table_ref: Any,
    w_ref: Any,
    *,
    block_size: int,
    recorded: str,
    first_scale: jax.Array | int = 0,
) -> None:
    """Writes values times scales to w_ref [rows, 2 * bytes], columns in the order of chunks.

    Args:
      packed_ref: uint8 [rows, bytes], bytes a multiple of 128.
      scales_ref: float32 [rows, multiple of 128].
      table_ref: `value_table`.
      block_size: elements that share a scale, a power of two from 16 to 256.
      recorded: the dtype that was quantised; a tile in another one is rounded to it first.
      first_scale: column of scales_ref for byte 0, a multiple of the scales of a chunk.
    """
    rows, width = packed_ref.shape
    per_chunk = CHUNK // block_size

    def convert(start: jax.Array | int, height: int) -> None:
        here = pl.ds(start, height)
        spread = lax.div(lane_iota(height), block_size // 2)
        table = table_ref[:height, :]
        for chunk in range(width // LANES):
            codes = packed_ref[here, chunk * LANES : (chunk + 1) * LANES].astype(jnp.int32)
            scale = chunk * per_chunk
            scales = scales_ref[here, scale // LANES * LANES : scale // LANES * LANES + LANES]
            scales = look_up(scales, spread + (scale % LANES + first_scale))
            for half, nibbles in enumerate((codes >> 4, codes & 15)):
                values = look_up(table, nibbles) * scales
                if recorded != w_ref.dtype.name:
                    values = as_recorded(values, recorded)
                column = chunk * CHUNK + half * LANES
                w_ref[here, column : column + LANES] = values.astype(w_ref.dtype)

    if rows >= ROWS:  # a loop without steps would still be traced, and its slices would not fit

        @pl.loop(0, rows // ROWS)
        def _(step: jax.Array) -> None:
            convert(pl.multiple_of(step * ROWS, ROWS), ROWS)

    if rows % ROWS:
        convert(rows // ROWS * ROWS, rows % ROWS)


def as_recorded(values: jax.Array, recorded: str) -> jax.Array:
    """float32 values rounded to the dtype that was quantised, as `nf4.api.as_recorded` does, ties to even.

    It computes on bits, because a TPU has no float16 and XLA may remove a cast and its inverse.
    """
    if recorded == "float32":
        return values
    dropped = {"bfloat16": 16, "float16": 13}[recorded]
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    bits = bits + ((1 << dropped - 1) - 1) + ((bits >> dropped) & 1)
    rounded = lax.bitcast_convert_type((bits >> dropped) << dropped, jnp.float32)
    if recorded == "bfloat16":
        return rounded
    size = jnp.abs(values)
    denormal = lax.round(values * 2.0**24, lax.RoundingMethod.TO_NEAREST_EVEN) * 2.0**-24
    infinite = jnp.where(values > 0, jnp.inf, -jnp.inf)
    return jnp.where(size < 2.0**-14, denormal, jnp.where(size >= 65520.0, infinite, rounded))


def split_pairs(x: jax.Array) -> jax.Array:
    """float32 [rows, 256] in the order of a chunk: even columns, then odd ones."""
    lane = lane_iota(x.shape[0])
    low, high = x[:, :LANES], x[:, LANES:]

    def every_other(first: int) -> jax.Array:
        source = (2 * lane + first) & (LANES - 1)
        return jnp.where(lane < LANES // 2, look_up(low, source), look_up(high, source))

    return jnp.concatenate([every_other(0), every_other(1)], axis=1)


def merge_pairs(y: jax.Array) -> jax.Array:
    """Inverse of split_pairs."""
    lane = lane_iota(y.shape[0])
    even, odd = y[:, :LANES], y[:, LANES:]

    def interleaved(first: int) -> jax.Array:
        source = (lane >> 1) + first
        return jnp.where(lane & 1 == 0, look_up(even, source), look_up(odd, source))

    return jnp.concatenate([interleaved(0), interleaved(LANES // 2)], axis=1)
