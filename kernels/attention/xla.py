"""Backend in XLA's operations, tuned for CPUs: chunks of queries, whose scores the backward pass recomputes.

FlashAttention recomputes them too (arXiv 2205.14135). Query heads that share a key head become rows of one matrix
product per (batch, key head): on a CPU this is several times faster than a product with the shared heads as a batch
axis. Without a cache, a chunk reads only the keys that causality and the window allow, so about half of the products
are never computed. On an accelerator the scores of a chunk are written to memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.attention.cache import Cached, heads_of
from bimedix_jax.kernels.products import dot, dot_rows, from_bits, to_bits

MASKED = -1e30
"""Score of a key that a query may not attend to; finite, so that a row without any visible key gives no NaN."""
MIN_CHUNK, MAX_CHUNKS = 256, 8
"""Minimum of queries in a chunk and maximum of chunks; each chunk is compiled separately."""
CPU_SCORES = 1 << 22
"""Scores that a CPU computes at a time: 16 MiB, half of the cache that two cores share."""
ACCELERATOR_SCORES = 1 << 28
"""Scores that an accelerator computes at a time: 1 GiB. At 4,096 tokens these are all heads, at 32,768 a single one."""


def each_head(function: Callable[..., Any], scores: int, *operands: jax.Array) -> Any:
    """`function` on each slice of the leading axis (batch * key heads); each call computes `scores` scores.

    Groups of heads run one after another, so that the scores of a group stay in a CPU's cache or fit in memory.
    """
    heads = operands[0].shape[0]
    most = CPU_SCORES if backends.platform() == "cpu" else ACCELERATOR_SCORES
    size = max((size for size in range(1, heads + 1) if heads % size == 0 and size * scores <= most), default=1)
    if size == heads:
        return jax.vmap(function)(*operands)
    like = jax.eval_shape(jax.vmap(function), *operands)

    def on_group(bits: list[jax.Array]) -> Any:
        group = [from_bits(part, whole.dtype) for part, whole in zip(bits, operands, strict=True)]
        return jax.tree.map(to_bits, jax.vmap(function)(*group))

    grouped = [to_bits(x).reshape(heads // size, size, *x.shape[1:]) for x in operands]
    return jax.tree.map(lambda x, out: from_bits(x.reshape(out.shape), out.dtype), lax.map(on_group, grouped), like)


def head_scores(q: jax.Array, k: jax.Array, visible_CS: jax.Array) -> jax.Array:
    """float32 [R*C, S] scores of one key head's queries, masked."""
    scores = dot(q, k, 1)
    by_head = scores.reshape(-1, *visible_CS.shape)
    return jnp.where(visible_CS[None], by_head, MASKED).reshape(scores.shape)


def head_forward(q: jax.Array, k: jax.Array, v: jax.Array, visible_CS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(output [R*C, H], logarithm of the softmax's denominator [R*C, 1])."""
    scores = head_scores(q, k, visible_CS)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return (dot(weights.astype(v.dtype), v) / total).astype(q.dtype), peak + jnp.log(total)


def head_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible_CS: jax.Array,
    out: jax.Array,
    log_total: jax.Array,
    dout: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients to q, k and v, from recomputed weights."""
    weights = jnp.exp(head_scores(q, k, visible_CS) - log_total)
    dv = dot_rows(weights.astype(dout.dtype), dout)
    inner = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    # without the barrier, XLA:CPU's matrix library would fuse the operations that follow, and run slower than a loop
    dweights = lax.optimization_barrier(dot(dout, v, 1))
    dscores = (weights * (dweights - inner)).astype(q.dtype)
    dq, dk = dot(dscores, k), dot_rows(dscores, q)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


@jax.custom_vjp
def chunk_attention(q: jax.Array, k: jax.Array, v: jax.Array, visible_ZCS: jax.Array) -> jax.Array:
    """One chunk of queries: q [Z, R*C, H] already scaled, k and v [Z, S, H], with Z = B * G; result like q."""
    return chunk_forward(q, k, v, visible_ZCS)[0]


def chunk_forward(q: jax.Array, k: jax.Array, v: jax.Array, visible_ZCS: jax.Array):
    out, log_total = each_head(head_forward, q.shape[1] * k.shape[1], q, k, v, visible_ZCS)
    return out, (q, k, v, visible_ZCS, out, log_total)


def chunk_backward(residuals: tuple[jax.Array, ...], dout: jax.Array):
    q, k, *_ = residuals
    return (*each_head(head_backward, q.shape[1] * k.shape[1], *residuals, dout), None)


chunk_attention.defvjp(chunk_forward, chunk_backward)


def visible(
    query_ids_BC: Int[Array, "B C"],
    key_ids_BS: Int[Array, "B S"],
    query_slot: Int[Array, ""] | int,
    key_slot: int,
    window: int | None,
    ancestor_ids_BCA: Int[Array, "B C A"] | None = None,
) -> Bool[Array, "B C S"]:
    """Which keys each query attends to. The slots are those of the first query and of the first key."""
    query = query_slot + jnp.arange(query_ids_BC.shape[1])[:, None]
    key = key_slot + jnp.arange(key_ids_BS.shape[1])[None]
    near = key <= query if window is None else (key <= query) & (key > query - window)
    same = query_ids_BC[:, :, None] == key_ids_BS[:, None]
    if ancestor_ids_BCA is not None:
        same |= jnp.any(ancestor_ids_BCA[:, :, None] == key_ids_BS[:, None, :, None], axis=-1)
    return near[None] & same


def attention(
    q_BTQH: jax.Array,
    k_BSGH: Cached,
    v_BSGH: Cached,
    query_ids_BT: jax.Array,
    key_ids_BS: jax.Array,
    offset: jax.Array | None,
    window: int | None,
    ancestor_ids_BTA: jax.Array | None = None,
) -> jax.Array:
    """As `api.attention`; takes all operands."""
    batch, length, heads, width = q_BTQH.shape
    slots, groups = k_BSGH.shape[1:3]
    k, v = (heads_of(x, q_BTQH.dtype) for x in (k_BSGH, v_BSGH))
    q_BGRTH = (q_BTQH * width**-0.5).reshape(batch, length, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    chunk = length if offset is not None else max(MIN_CHUNK, -(-length // MAX_CHUNKS))
    parts = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        low, high = (0, slots) if offset is not None else (0 if window is None else max(0, start - window + 1), stop)
        parents = None if ancestor_ids_BTA is None else ancestor_ids_BTA[:, start:stop]
        first = start if offset is None else offset
        seen_BCS = visible(query_ids_BT[:, start:stop], key_ids_BS[:, low:high], first, low, window, parents)
        q = q_BGRTH[:, :, :, start:stop].reshape(batch * groups, -1, width)
        out = chunk_attention(q, k[:, low:high], v[:, low:high], jnp.repeat(seen_BCS, groups, axis=0))
        parts.append(out.reshape(batch, heads, stop - start, width))
    return jnp.concatenate(parts, axis=2).swapaxes(1, 2)
