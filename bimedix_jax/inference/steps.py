"""The compiled steps of continuations.py: a shared prefix, lines of rows, and log p of given tokens."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from bimedix_jax.models.attention import KVCache
from bimedix_jax.models.routers import Record, Routing, RoutingPlan

POSITIONS_PER_CHUNK = 64
"""Positions whose logits are in memory at the same time."""


@functools.partial(jax.jit, static_argnames="graph")
def read_prefix(
    graph: nnx.GraphDef, weights: nnx.State, tokens_1T: jax.Array, ids_1T: jax.Array, plan: RoutingPlan
) -> KVCache:
    """Keys and values of a prefix [1, P], with as many slots."""
    model = nnx.merge(graph, weights)
    empty = KVCache.zeros(model.config, 1, tokens_1T.shape[1], model.dtype)
    cache = model.hidden(tokens_1T, ids_1T, plan, empty).cache
    assert cache is not None
    return cache


def after(prefix: KVCache, rows: int, slots: int) -> KVCache:
    """The cache of rows that all begin with the prefix, with this many slots."""

    def of(x: jax.Array, axis: int) -> jax.Array:
        wide = jnp.broadcast_to(x, (*x.shape[:axis], rows, *x.shape[axis + 1 :]))
        padding = [(0, 0)] * x.ndim
        padding[axis + 1] = (0, slots - x.shape[axis + 1])
        return jnp.pad(wide, padding)

    return KVCache(of(prefix.k_LBSGH, 1), of(prefix.v_LBSGH, 1), of(prefix.segment_ids_BS, 0), prefix.length)


@functools.partial(jax.jit, static_argnames=("graph", "record"))
def read_lines(
    graph: nnx.GraphDef,
    weights: nnx.State,
    tokens_BT: jax.Array,
    ids_BT: jax.Array,
    ancestor_ids_BTA: jax.Array | None,
    plan: RoutingPlan,
    record: Record,
    prefix: KVCache | None = None,
) -> tuple[Float[Array, "B T D"], Routing | None]:
    """(final hidden states of lines, the record). Every line continues `prefix`, if there is one; its segment is 1."""
    model, (rows, columns) = nnx.merge(graph, weights), tokens_BT.shape
    cache = prefix and after(prefix, rows, prefix.segment_ids_BS.shape[1] + columns)
    out = model.hidden(tokens_BT, ids_BT, plan, cache, record=record, ancestor_ids_BTA=ancestor_ids_BTA)
    return out.hidden_BTD, out.routing


def first_max(logits_RV: Float[Array, "R V"]) -> Int[Array, "R"]:
    """The first of the largest logits of each row; two vectorised reductions, which argmax is not on a CPU."""
    top_R1 = jnp.max(logits_RV, axis=-1, keepdims=True)
    places_RV = lax.broadcasted_iota(jnp.int32, logits_RV.shape, 1)
    return jnp.min(jnp.where(logits_RV >= top_R1, places_RV, logits_RV.shape[-1]), axis=-1)


@functools.partial(jax.jit, static_argnames=("graph",))
def tokens_at(
    graph: nnx.GraphDef,
    weights: nnx.State,
    hidden_BTD: jax.Array,
    positions_P: Int[Array, "P"],
    targets_PK: Int[Array, "P K"],
    count: Int[Array, ""],
) -> tuple[Float[Array, "P K"], Int[Array, "P"]]:
    """(float32 log p of the targets after the tokens at flat positions, the most likely token there); 0 from `count`
    on, at the latest after the chunk of POSITIONS_PER_CHUNK that has it."""
    head, rows = nnx.merge(graph, weights).head, POSITIONS_PER_CHUNK
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])

    def one_chunk(number: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = number * rows
        logits_RV = head(hidden_ND[lax.dynamic_slice_in_dim(positions_P, start, rows)])
        chosen_RK = jnp.take_along_axis(logits_RV, lax.dynamic_slice_in_dim(targets_PK, start, rows), axis=-1)
        logprobs_RK = chosen_RK - jax.nn.logsumexp(logits_RV, axis=-1, keepdims=True)
        best_R = first_max(logits_RV)
        return (
            lax.dynamic_update_slice_in_dim(found[0], logprobs_RK, start, 0),
            lax.dynamic_update_slice_in_dim(found[1], best_R, start, 0),
        )

    empty = jnp.zeros(targets_PK.shape, jnp.float32), jnp.zeros(positions_P.shape, jnp.int32)
    return lax.fori_loop(0, -(-count // rows), one_chunk, empty)
