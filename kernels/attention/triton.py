"""Backend in Pallas kernels that Triton compiles, for NVIDIA GPUs from compute capability 8.0 (A100) on.

FlashAttention-2 (arXiv 2307.08691) with grouped heads, packed segments, a sliding window and a cache. A program of the
forward pass computes one block of queries of one head; it visits only the blocks of keys that its segments, causality
and the window allow. The backward pass recomputes the scores in two kernels: one has a block of queries and sums over
keys, the other has a block of keys and sums over all queries of all heads that share them, so that no gradient is
stored for each query head. On a CPU the kernels are interpreted.

docs/kernels.md says which libraries have such a kernel, and what these lack.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.sharding import ManualAxisType

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.attention.api import SAVED
from bimedix_jax.kernels.attention.blocks import overlap, padded, ranges
from bimedix_jax.kernels.attention.cache import Cached, HeadMajor
from bimedix_jax.kernels.grouped_matmul.triton import dot, missing_capability
from bimedix_jax.kernels.manual_axes import vary_alike, varying
from bimedix_jax.kernels.nf4.tensor import zero_cotangent

MASKED = -1e30
"""Score of a key that a query may not attend to; finite, so that a row without any visible key gives no NaN."""
LEAST = 1e-30
"""Smallest denominator, for rows of padding that see no key."""
BASE_2 = math.log2(math.e)
"""Scores are multiplied by this, since exp2 is faster than exp."""


class Block(NamedTuple):
    """Queries and keys of a step, the warps of a program, and the stages of its pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


class Blocks(NamedTuple):
    """The blocks of the three kernels."""

    forward: Block
    queries: Block
    keys: Block


def blocks_for(length: int, slots: int, width: int, itemsize: int) -> Blocks:
    """Blocks that do not spill on an A100 (tests/kernels/test_codegen.py)."""
    if itemsize == 4:  # each product is three of TF32, whose operands take twice the registers
        forward, queries, keys = Block(32, 32, 4, 1), Block(32, 32, 8, 1), Block(32, 32, 8, 1)
    elif width > 128:
        forward, queries, keys = Block(64, 32, 8, 2), Block(64, 32, 8, 1), Block(32, 32, 8, 1)
    elif width <= 64:
        forward, queries, keys = Block(128, 64, 8, 3), Block(64, 64, 4, 2), Block(64, 32, 4, 2)
    else:
        forward, queries, keys = Block(128, 64, 8, 3), Block(128, 32, 8, 3), Block(64, 64, 8, 2)
    rows, columns = (max(16, pl.next_power_of_2(size)) for size in (length, slots))
    fit = [b._replace(queries=min(b.queries, rows), keys=min(b.keys, columns)) for b in (forward, queries, keys)]
    return Blocks(*fit)


def refusal(q_BTQH: jax.Array, *_: Any) -> str | None:
    """The reason why the kernels cannot take these operands, or None."""
    if (reason := missing_capability()) is not None:
        return reason
    if q_BTQH.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"queries of dtype {q_BTQH.dtype} are not among bfloat16, float16 and float32."
    width = q_BTQH.shape[-1]
    if width not in (16, 32, 64, 128, 256):
        return f"heads of width {width} are not a power of two from 16 to 256."
    return None


def visible(
    query_ids: jax.Array, key_ids: jax.Array, query_slot: jax.Array, key_slot: jax.Array, window: int | None
) -> jax.Array:
    """[queries, keys]: which keys of a block each query attends to. The slots are those of the first ones."""
    shape = (query_ids.shape[0], key_ids.shape[0])

    def down(x: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(x, shape, (0,))

    def across(x: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(x, shape, (1,))

    query, key = down(query_slot + jnp.arange(shape[0])), across(key_slot + jnp.arange(shape[1]))
    seen = (key <= query) & (down(query_ids) == across(key_ids))
    return seen if window is None else seen & (key > query - window)


def rows(x: jax.Array, columns: int) -> jax.Array:
    """A vector as the rows of a matrix with this number of columns."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), (0,))


def forward_kernel(
    first_ref: Any,
    stop_ref: Any,
    offset_ref: Any,
    query_ids_ref: Any,
    key_ids_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    log_total_ref: Any,
    *,
    block: Block,
    window: int | None,
    interpret: bool,
) -> None:
    i, b = pl.program_id(0), pl.program_id(2)
    width = q_ref.shape[-1]
    q, query_ids = q_ref[...], query_ids_ref[...]
    slot = offset_ref[0] + i * block.queries

    def step(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, peak, total = carry
        part = pl.ds(j * block.keys, block.keys)
        scores = dot(q, k_ref[part, :], (1, 1), interpret) * (width**-0.5 * BASE_2)
        seen = visible(query_ids, key_ids_ref[part], slot, j * block.keys, window)
        scores = jnp.where(seen, scores, MASKED)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - rows(new_peak, block.keys))
        shrink = jnp.exp2(peak - new_peak)
        v = v_ref[part, :]
        out = out * rows(shrink, width) + dot(weights.astype(v.dtype), v, (1, 0), interpret)
        return out, new_peak, total * shrink + jnp.sum(weights, axis=1)

    zeros = jnp.zeros((block.queries, width), jnp.float32)
    start = (zeros, jnp.full((block.queries,), MASKED, jnp.float32), jnp.zeros((block.queries,), jnp.float32))
    out, peak, total = lax.fori_loop(first_ref[b, i], stop_ref[b, i], step, start)
    total = jnp.maximum(total, LEAST)
    out_ref[...] = (out / rows(total, width)).astype(out_ref.dtype)
    log_total_ref[...] = peak + jnp.log2(total)


def query_kernel(
    first_ref: Any,
    stop_ref: Any,
    offset_ref: Any,
    query_ids_ref: Any,
    key_ids_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dout_ref: Any,
    log_total_ref: Any,
    inner_ref: Any,
    dq_ref: Any,
    *,
    block: Block,
    window: int | None,
    interpret: bool,
) -> None:
    """The gradient to one block of queries."""
    i, b = pl.program_id(0), pl.program_id(2)
    width = q_ref.shape[-1]
    q, dout, query_ids = q_ref[...], dout_ref[...], query_ids_ref[...]
    log_total, inner = rows(log_total_ref[...], block.keys), rows(inner_ref[...], block.keys)
    slot = offset_ref[0] + i * block.queries

    def step(j: jax.Array, dq: jax.Array) -> jax.Array:
        part = pl.ds(j * block.keys, block.keys)
        k = k_ref[part, :]
        scores = dot(q, k, (1, 1), interpret) * (width**-0.5 * BASE_2)
        seen = visible(query_ids, key_ids_ref[part], slot, j * block.keys, window)
        weights = jnp.where(seen, jnp.exp2(scores - log_total), 0.0)
        dscores = weights * (dot(dout, v_ref[part, :], (1, 1), interpret) - inner)
        return dq + dot(dscores.astype(k.dtype), k, (1, 0), interpret)

    zeros = jnp.zeros((block.queries, width), jnp.float32)
    dq = lax.fori_loop(first_ref[b, i], stop_ref[b, i], step, zeros)
    dq_ref[...] = (dq * width**-0.5).astype(dq_ref.dtype)


def key_kernel(
    first_ref: Any,
    stop_ref: Any,
    offset_ref: Any,
    query_ids_ref: Any,
    key_ids_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dout_ref: Any,
    log_total_ref: Any,
    inner_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    block: Block,
    window: int | None,
    interpret: bool,
) -> None:
    """The gradients to one block of keys and values, summed over all queries of the heads that share them."""
    j, b = pl.program_id(0), pl.program_id(2)
    shared, width = q_ref.shape[1:]
    k, v, key_ids = k_ref[...], v_ref[...], key_ids_ref[...]
    first, stop = first_ref[b, j], stop_ref[b, j]

    def step(n: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dk, dv = carry
        head, start = lax.rem(n, shared), (first + lax.div(n, shared)) * block.queries
        part = pl.ds(start, block.queries)
        q, dout = q_ref[part, head, :], dout_ref[part, head, :]
        scores = dot(k, q, (1, 1), interpret) * (width**-0.5 * BASE_2)  # [keys, queries]
        slot = offset_ref[0] + start
        seen = visible(query_ids_ref[part], key_ids, slot, j * block.keys, window).T
        across = functools.partial(lax.broadcast_in_dim, shape=scores.shape, broadcast_dimensions=(1,))
        weights = jnp.where(seen, jnp.exp2(scores - across(log_total_ref[head, part])), 0.0)
        dv += dot(weights.astype(dout.dtype), dout, (1, 0), interpret)
        dscores = weights * (dot(v, dout, (1, 1), interpret) - across(inner_ref[head, part]))
        return dk + dot(dscores.astype(q.dtype), q, (1, 0), interpret), dv

    zeros = jnp.zeros((block.keys, width), jnp.float32)
    dk, dv = lax.fori_loop(0, (stop - first) * shared, step, (zeros, zeros))
    dk_ref[...] = (dk * width**-0.5).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


class Operands(NamedTuple):
    """Operands of all kernels, padded to whole blocks."""

    offset: jax.Array
    query_ids_BT: jax.Array
    key_ids_BS: jax.Array
    q_BTQH: jax.Array
    k_BSGH: jax.Array
    v_BSGH: jax.Array


def whole(*axes: int | None) -> pl.BlockSpec:
    """A block of one example: None axes are indexed by the program, others are whole."""
    return pl.BlockSpec(axes, lambda i, h, b: (b, *(0 for _ in axes[1:])))


def specs(operands: Operands, block: Block, by_keys: bool) -> list[pl.BlockSpec]:
    """Blocks of `Operands` for a program (i, head, example). By queries, i is a block of queries and head that of q;
    by keys, i is a block of keys and head a key head with all query heads that share it."""
    _, length, heads, width = operands.q_BTQH.shape
    slots, groups = operands.k_BSGH.shape[1:3]
    shared = heads // groups
    everything = pl.BlockSpec()
    if by_keys:
        key = pl.BlockSpec((None, block.keys, None, width), lambda i, h, b: (b, i, h, 0))
        query = pl.BlockSpec((None, length, shared, width), lambda i, h, b: (b, 0, h, 0))
        key_ids, query_ids = pl.BlockSpec((None, block.keys), lambda i, h, b: (b, i)), whole(None, length)
    else:
        key = pl.BlockSpec((None, slots, None, width), lambda i, h, b: (b, 0, lax.div(h, shared), 0))
        query = pl.BlockSpec((None, block.queries, None, width), lambda i, h, b: (b, i, h, 0))
        query_ids, key_ids = pl.BlockSpec((None, block.queries), lambda i, h, b: (b, i)), whole(None, slots)
    return [everything, everything, everything, query_ids, key_ids, query, key, key]


def launch(
    kernel: Any,
    name: str,
    operands: Operands,
    more: tuple[jax.Array, ...],
    block: Block,
    window: int | None,
    out: list[tuple[tuple[int, ...], Any, pl.BlockSpec]],
    extra: list[pl.BlockSpec],
    by_keys: bool = False,
) -> Any:
    """pallas_call named after the kernel and its block; `out` has shape, dtype and block of each result."""
    interpret = backends.platform() == "cpu"
    batch, length, heads, _ = operands.q_BTQH.shape
    slots, groups = operands.k_BSGH.shape[1:3]
    seen_BIJ = overlap(operands.query_ids_BT, operands.key_ids_BS, operands.offset[0], window, block[:2])
    bounds = ranges(seen_BIJ.swapaxes(1, 2) if by_keys else seen_BIJ)
    grid = (slots // block.keys, groups, batch) if by_keys else (length // block.queries, heads, batch)
    kind = ManualAxisType(varying=varying(operands, more))
    return pl.pallas_call(
        functools.partial(kernel, block=block, window=window, interpret=interpret),
        [jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind) for shape, dtype, _ in out],
        grid=grid,
        in_specs=[*specs(operands, block, by_keys), *extra],
        out_specs=[spec for *_, spec in out],
        compiler_params=plt.CompilerParams(num_warps=block.warps, num_stages=block.stages),
        interpret=interpret,
        name=f"{name}_{block.queries}x{block.keys}x{operands.q_BTQH.shape[-1]}",
    )(*bounds, *operands, *more)


def prepared(operands: Operands, block: Block) -> Operands:
    """Whole blocks."""
    q, k = block.queries, block.keys
    sizes = (1, q, k, q, k, k)
    return Operands(*(x if i == 0 else padded(x, sizes[i], 1) for i, x in enumerate(operands)))


def forward(operands: Operands, window: int | None) -> tuple[jax.Array, jax.Array]:
    """(output [B, T, Q, H], base-2 logarithm of the softmax's denominator [B, Q, T])."""
    length = operands.q_BTQH.shape[1]
    block = blocks_for(length, operands.k_BSGH.shape[1], *kind(operands)).forward
    whole_operands = prepared(operands, block)
    batch, rounded, heads, width = whole_operands.q_BTQH.shape
    results = [
        (
            (batch, rounded, heads, width),
            operands.q_BTQH.dtype,
            pl.BlockSpec((None, block.queries, None, width), lambda i, h, b: (b, i, h, 0)),
        ),
        (
            (batch, heads, rounded),
            jnp.float32,
            pl.BlockSpec((None, None, block.queries), lambda i, h, b: (b, h, i)),
        ),
    ]
    out, log_total = launch(forward_kernel, "attention_forward", whole_operands, (), block, window, results, [])
    return out[:, :length], log_total[:, :, :length]


def kind(operands: Operands) -> tuple[int, int]:
    return operands.q_BTQH.shape[-1], operands.q_BTQH.dtype.itemsize


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attend(operands: Operands, window: int | None) -> jax.Array:
    return forward(operands, window)[0]


def attend_forward(operands: Operands, window: int | None):
    out, log_total = (checkpoint_name(x, SAVED) for x in forward(operands, window))
    return out, (operands, out, log_total)


def attend_backward(window: int | None, residuals: tuple, dout: jax.Array):
    operands, out, log_total = residuals
    inner = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    length, (slots, groups) = out.shape[1], operands.k_BSGH.shape[1:3]
    blocks = blocks_for(length, slots, *kind(operands))
    heads, width = out.shape[2:]

    def more(block: Block) -> tuple[jax.Array, ...]:
        q = block.queries  # queries that padding adds bring no gradient: zeros
        zeros = functools.partial(padded, block=q, mode="constant")
        return zeros(dout, axis=1), padded(log_total, q, 2), zeros(inner, axis=2)

    block, by_queries = blocks.queries, prepared(operands, blocks.queries)
    query = pl.BlockSpec((None, block.queries, None, width), lambda i, h, b: (b, i, h, 0))
    row = pl.BlockSpec((None, None, block.queries), lambda i, h, b: (b, h, i))
    results = [(by_queries.q_BTQH.shape, out.dtype, query)]
    [dq] = launch(query_kernel, "attention_queries", by_queries, more(block), block, window, results, [query, row, row])
    block, by_keys = blocks.keys, prepared(operands, blocks.keys)
    rounded, shared = by_keys.q_BTQH.shape[1], heads // groups
    key = pl.BlockSpec((None, block.keys, None, width), lambda i, h, b: (b, i, h, 0))
    query = pl.BlockSpec((None, rounded, shared, width), lambda i, h, b: (b, 0, h, 0))
    row = pl.BlockSpec((None, shared, rounded), lambda i, h, b: (b, h, 0))
    results = [(x.shape, x.dtype, key) for x in (by_keys.k_BSGH, by_keys.v_BSGH)]
    dk, dv = launch(
        key_kernel, "attention_keys", by_keys, more(block), block, window, results, [query, row, row], by_keys=True
    )
    none: list[Any] = [zero_cotangent(x) for x in operands[:3]]
    return (Operands(none[0], none[1], none[2], dq[:, :length], dk[:, :slots], dv[:, :slots]),)


attend.defvjp(attend_forward, attend_backward)


def attention(
    q_BTQH: jax.Array,
    k_BSGH: Cached,
    v_BSGH: Cached,
    query_ids_BT: jax.Array,
    key_ids_BS: jax.Array,
    offset: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """As `api.attention`."""
    k, v = ((x.array() if isinstance(x, HeadMajor) else x).astype(q_BTQH.dtype) for x in (k_BSGH, v_BSGH))
    slot = jnp.zeros((1,), jnp.int32) if offset is None else jnp.asarray(offset, jnp.int32).reshape(1)
    ids = (x.astype(jnp.int32) for x in (query_ids_BT, key_ids_BS))
    return attend(Operands(*vary_alike(slot, *ids, q_BTQH, k, v)), window)
