"""Log-probabilities of chosen tokens, without logits of the positions and the vocabulary that nobody asks for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from bimedix_jax.models.attention import KVCache
from bimedix_jax.models.mixtral import Mixtral

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
    graph: nnx.GraphDef, weights: nnx.State, tokens_BT: np.ndarray, ids_BT: np.ndarray, learned_BT: np.ndarray
) -> np.ndarray:
    """log p of every token where `learned_BT` is True, given the tokens before it in its segment; 0 elsewhere.

    Args:
      tokens_BT, ids_BT: packed segments, ids 0 at padding.
      learned_BT: bool; False at the first token of a segment, which nothing predicts.

    Returns: [B, T] float64.
    """
    found_BT = np.zeros(tokens_BT.shape, np.float64)
    flat_M = np.flatnonzero(learned_BT)
    if flat_M.size == 0:
        return found_BT
    # in quarters of the batch: at most four shapes to compile, and no head run over prompts for nothing
    quarter = -(-tokens_BT.size // 4)
    size = quarter * -(-flat_M.size // quarter)
    # the hidden state at t - 1 predicts token t; rows are consecutive in the flat array
    before_M = np.pad(flat_M - 1, (0, size - flat_M.size)).astype(np.int32)
    targets_M = np.pad(tokens_BT.reshape(-1)[flat_M], (0, size - flat_M.size))
    logprobs_M = _logprobs_at(graph, weights, tokens_BT, ids_BT, before_M, targets_M)
    found_BT.reshape(-1)[flat_M] = np.asarray(logprobs_M, np.float64)[: flat_M.size]
    return found_BT


@functools.partial(jax.jit, static_argnames=("graph",))
def _logprobs_at(
    graph: nnx.GraphDef,
    weights: nnx.State,
    tokens_BT: jax.Array,
    ids_BT: jax.Array,
    before_M: jax.Array,
    targets_M: jax.Array,
) -> jax.Array:
    model = nnx.merge(graph, weights)
    hidden_BTD = model.hidden(tokens_BT, ids_BT).hidden_BTD
    return chosen_logprobs(model, hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[before_M], targets_M)


@functools.partial(jax.jit, static_argnames=("graph", "slots"))
def run_prompts(
    graph: nnx.GraphDef, weights: nnx.State, tokens_BT: jax.Array, ids_BT: jax.Array, slots: int
) -> tuple[KVCache, Float[Array, "B V"]]:
    """A cache of `slots` that holds left-padded prompts, and log p of every possible next token, float32."""
    model = nnx.merge(graph, weights)
    cache = KVCache.zeros(model.config, tokens_BT.shape[0], slots, model.dtype)
    out = model.hidden(tokens_BT, ids_BT, cache=cache)
    assert out.cache is not None
    return out.cache, jax.nn.log_softmax(model.head(out.hidden_BTD[:, -1]), axis=-1)


@functools.partial(jax.jit, static_argnames=("graph",))
def run_continuations(
    graph: nnx.GraphDef,
    weights: nnx.State,
    cache: KVCache,
    rows_R: jax.Array,
    tokens_RT: jax.Array,
    ids_RT: jax.Array,
) -> Float[Array, "R T"]:
    """log p of tokens 1.. of continuations, each after the prompt in row `rows_R[r]` of the cache.

    Continuations are padded on the right. Column t holds log p of token t+1; the last column, and those at padding,
    mean nothing. The cache is read, not changed: one prompt serves any number of continuations.
    """
    model = nnx.merge(graph, weights)
    own = KVCache(cache.k_LBSGH[:, rows_R], cache.v_LBSGH[:, rows_R], cache.segment_ids_BS[rows_R], cache.length)
    hidden_RTD = model.hidden(tokens_RT, ids_RT, cache=own).hidden_BTD
    following_RT = jnp.roll(tokens_RT, -1, axis=1)
    flat = chosen_logprobs(model, hidden_RTD.reshape(-1, hidden_RTD.shape[-1]), following_RT.reshape(-1))
    return flat.reshape(tokens_RT.shape)
