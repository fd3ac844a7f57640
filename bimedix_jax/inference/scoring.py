"""Log-probabilities of chosen tokens, without logits of the positions and the vocabulary that nobody asks for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from bimedix_jax.models.attention import KVCache
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import Record, Routing, RoutingPlan

ROWS_AT_ONCE = 256
"""Positions whose logits exist at the same time: 256 of a vocabulary of 49,152 are 50 MB in float32."""


def chosen_logprobs(model: Mixtral, hidden_ND: Float[Array, "N D"], targets_N: Int[Array, "N"]) -> Float[Array, "N"]:
    """log p(target) in float32 from final hidden states, ROWS_AT_ONCE positions at a time."""
    count = hidden_ND.shape[0]
    rows = min(ROWS_AT_ONCE, count)
    padding = -count % rows
    hidden_CRD = jnp.pad(hidden_ND, ((0, padding), (0, 0))).reshape(-1, rows, hidden_ND.shape[1])
    targets_CR = jnp.pad(targets_N, (0, padding)).reshape(-1, rows)

    def one_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden_RD, targets_R = chunk
        logits_RV = model.head(hidden_RD)
        chosen_R = jnp.take_along_axis(logits_RV, targets_R[:, None], axis=-1)[:, 0]
        return chosen_R - jax.nn.logsumexp(logits_RV, axis=-1)

    return jax.lax.map(one_chunk, (hidden_CRD, targets_CR)).reshape(-1)[:count]


def target_logprobs(
    graph: nnx.GraphDef,
    weights: nnx.State,
    tokens_BT: np.ndarray,
    ids_BT: np.ndarray,
    learned_BT: np.ndarray,
    plan: RoutingPlan | None = None,
    record: Record = "none",
) -> tuple[np.ndarray, Routing | None]:
    """log p of every token where `learned_BT` is True, given the tokens before it in its segment; 0 elsewhere.

    Args:
      tokens_BT, ids_BT: packed segments, ids 0 at padding.
      learned_BT: bool; False at the first token of a segment, which nothing predicts.
      plan: what the routers are told to do with these rows and columns.

    Returns: ([B, T] float64, what the routers did).
    """
    found_BT = np.zeros(tokens_BT.shape, np.float64)
    flat_M = np.flatnonzero(learned_BT)
    if flat_M.size == 0 and record == "none":
        return found_BT, None
    # in quarters of the batch: at most four shapes to compile, and no head run over prompts for nothing
    quarter = -(-tokens_BT.size // 4)
    size = quarter * max(1, -(-flat_M.size // quarter))
    # the hidden state at t - 1 predicts token t; rows are consecutive in the flat array
    before_M = np.pad(flat_M - 1, (0, size - flat_M.size)).astype(np.int32)
    targets_M = np.pad(tokens_BT.reshape(-1)[flat_M], (0, size - flat_M.size))
    plan = plan or RoutingPlan()
    logprobs_M, routing = _logprobs_at(graph, weights, tokens_BT, ids_BT, before_M, targets_M, plan, record)
    found_BT.reshape(-1)[flat_M] = np.asarray(logprobs_M, np.float64)[: flat_M.size]
    return found_BT, routing


@functools.partial(jax.jit, static_argnames=("graph", "record"))
def _logprobs_at(
    graph: nnx.GraphDef,
    weights: nnx.State,
    tokens_BT: jax.Array,
    ids_BT: jax.Array,
    before_M: jax.Array,
    targets_M: jax.Array,
    plan: RoutingPlan,
    record: Record,
) -> tuple[jax.Array, Routing | None]:
    model = nnx.merge(graph, weights)
    out = model.hidden(tokens_BT, ids_BT, plan, record=record)
    hidden_ND = out.hidden_BTD.reshape(-1, out.hidden_BTD.shape[-1])
    return chosen_logprobs(model, hidden_ND[before_M], targets_M), out.routing


@functools.partial(jax.jit, static_argnames=("graph", "slots", "record"))
def run_prompts(
    graph: nnx.GraphDef,
    weights: nnx.State,
    tokens_BT: jax.Array,
    ids_BT: jax.Array,
    plan: RoutingPlan,
    slots: int,
    record: Record = "none",
) -> tuple[KVCache, Float[Array, "B V"], Routing | None]:
    """(a cache of `slots` that holds left-padded prompts, log p of every next token in float32, the record)."""
    model = nnx.merge(graph, weights)
    cache = KVCache.zeros(model.config, tokens_BT.shape[0], slots, model.dtype)
    out = model.hidden(tokens_BT, ids_BT, plan, cache, record=record)
    assert out.cache is not None
    return out.cache, jax.nn.log_softmax(model.head(out.hidden_BTD[:, -1]), axis=-1), out.routing


@functools.partial(jax.jit, static_argnames=("graph", "record"))
def run_continuations(
    graph: nnx.GraphDef,
    weights: nnx.State,
    cache: KVCache,
    rows_R: jax.Array,
    tokens_RT: jax.Array,
    ids_RT: jax.Array,
    plan: RoutingPlan,
    record: Record = "none",
) -> tuple[Float[Array, "R T"], Routing | None]:
    """(log p of tokens 1.. of continuations, each after the prompt in row `rows_R[r]` of the cache; the record).

    Continuations are padded on the right. Column t holds log p of token t+1; the last column, and those at padding,
    mean nothing. The cache is read, not changed: one prompt serves any number of continuations.
    """
    model = nnx.merge(graph, weights)
    own = KVCache(cache.k_LBSGH[:, rows_R], cache.v_LBSGH[:, rows_R], cache.segment_ids_BS[rows_R], cache.length)
    out = model.hidden(tokens_RT, ids_RT, plan, own, record=record)
    following_RT = jnp.roll(tokens_RT, -1, axis=1)
    flat = chosen_logprobs(model, out.hidden_BTD.reshape(-1, out.hidden_BTD.shape[-1]), following_RT.reshape(-1))
    return flat.reshape(tokens_RT.shape), out.routing


def part_of(routing: Routing, line: int, start: int, length: int) -> Routing:
    """The record of one sequence out of a batch, as NumPy arrays [L, 1, length, ...]."""
    return jax.tree.map(lambda x: np.asarray(x)[:, line : line + 1, start : start + length], routing)
