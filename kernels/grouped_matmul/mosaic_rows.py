"""The TPU kernel for a layer of a stack of NF4 weights that are stored by rows: nothing is sliced, copied or padded."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.grouped_matmul import tiles
from bimedix_jax.kernels.grouped_matmul.mosaic_call import (
    changed,
    matrix_spec,
    product,
    rows_call,
    split_rows,
    store_rows,
)
from bimedix_jax.kernels.nf4.mosaic_tile import (
    LANES,
    ROWS,
    code_table,
    decode_rows,
    dequantise_tile,
    value_table,
)
from bimedix_jax.kernels.stacks import LayerOf, index


def grouped_nf4_rows(
    *refs: Any, block_size: int, recorded: str, contracts_pairs: bool, scales_a_row: int, is_nested: bool
) -> None:
    """`grouped_nf4` for weights stored by rows. Double-quantised scales are decoded here, once for each expert."""
    if is_nested:
        *visit_refs, x_ref, packed_ref, table_ref, codes_ref, nested_ref, offset_ref, book_ref = refs[:-3]
        y_ref, w_ref, scales_ref = refs[-3:]
    else:
        *visit_refs, x_ref, packed_ref, table_ref, scales_ref, y_ref, w_ref = refs
        codes_ref = nested_ref = offset_ref = book_ref = None
    visits = tiles.Visits(*visit_refs)
    column, visit = pl.program_id(0), pl.program_id(1)
    first_scale = 0 if contracts_pairs else column * (2 * packed_ref.shape[1] // block_size)

    @pl.when(changed(visit, visits.expert) & (visits.stop[visit] > visits.start[visit]))
    def _() -> None:
        if is_nested:
            decode_rows(
                codes_ref,
                nested_ref,
                offset_ref,
                book_ref,
                scales_ref,
                scales_a_row=scales_a_row,
                first_scale=0 if contracts_pairs else lax.div(first_scale, LANES) * LANES,
            )
        dequantise_tile(
            packed_ref,
            scales_ref,
            table_ref,
            w_ref,
            block_size=block_size,
            recorded=recorded,
            first_scale=0 if contracts_pairs else lax.rem(first_scale, LANES),
        )

    store_rows(visits, y_ref, lambda: product(x_ref, w_ref, contracts_pairs))


def in_hbm(x: jax.Array) -> jax.Array:
    """x, which stays in HBM. In a loop over layers, XLA would copy whole stacks into VMEM for every layer."""
    return x if backends.platform() == "cpu" else pltpu.with_memory_space_constraint(x, pltpu.HBM)


def stacked_matmul(x_MK: jax.Array, w: LayerOf, group_sizes_E: jax.Array, swapped: bool, width: int) -> jax.Array:
    """`packed_matmul` with a layer of a RowMajor stack; blocks are read where they are in the stack."""
    t, experts = w.stack, w.shape[0]
    contracts_pairs, n = t.transposed != swapped, w.shape[1 if swapped else 2]
    rows, columns = t.unit_shape
    packed, codes = (leaf.reshape(-1, *leaf.shape[-2:]) for leaf in (t.packed, t.absmax))
    if t.batch_shape[0] > 1:  # a single layer may have been gathered into VMEM
        packed, codes = in_hbm(packed), in_hbm(codes)
    scales_a_lane_row = 1 if contracts_pairs else LANES * t.block_size // width
    part = {"rows": width} if contracts_pairs else {"columns": width // 2}
    lanes = part if contracts_pairs else {"columns": LANES, "repeat": scales_a_lane_row}
    specs = [matrix_spec(packed.shape, **part), pl.BlockSpec((ROWS, LANES), lambda *_: (0, 0))]
    specs.append(matrix_spec(codes.shape, **lanes))
    operands, tile_rows = [packed, value_table(), codes], width if contracts_pairs else rows
    scratch = [pltpu.VMEM((width, columns) if contracts_pairs else (rows, width), x_MK.dtype)]
    if t.nested_rows is not None and t.nested_offset is not None:
        nested = index(t.nested_rows, w.layer)
        offset = jnp.broadcast_to(index(t.nested_offset, w.layer)[:, None, None], (experts, 1, LANES))
        specs += [
            pl.BlockSpec(
                (None, nested.shape[1], tile_rows),
                lambda j, t, e, *_: (lax.rem(e[t], experts), 0, j if contracts_pairs else 0),
            ),
            pl.BlockSpec((None, 1, LANES), lambda j, t, e, *_: (lax.rem(e[t], experts), 0, 0)),
            pl.BlockSpec((2, LANES, LANES), lambda *_: (0, 0, 0)),
        ]
        operands += [nested, offset, code_table(LANES)]
        scratch.append(pltpu.VMEM((tile_rows, codes.shape[2] if contracts_pairs else LANES), jnp.float32))
    kernel = functools.partial(
        grouped_nf4_rows,
        block_size=t.block_size,
        recorded=t.dtype,
        contracts_pairs=contracts_pairs,
        scales_a_row=t.scales,
        is_nested=len(specs) > 3,
    )
    x_MK = split_rows(x_MK) if contracts_pairs else x_MK
    first = jnp.asarray(w.layer) * experts
    return rows_call(kernel, x_MK, tuple(operands), specs, group_sizes_E, n, width, tuple(scratch), first)
