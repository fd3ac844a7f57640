"""Log-probabilities of given tokens: of whole sequences (score), or of continuations of a prompt that runs once.

Logits are computed for the scored positions only, and for few positions at a time, since a vocabulary is large.
"""

import functools
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from bimedix_jax.data.vocabulary import require_ids
from bimedix_jax.errors import BimedixError
from bimedix_jax.inference.padding import packed, packed_places, part_of
from bimedix_jax.inference.planning import Planner, Plans, Tokens
from bimedix_jax.models.attention import KVCache
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import Record, Routing, RoutingPlan, checked_plan

POSITIONS_PER_CHUNK = 256
"""Positions whose logits are in memory at the same time: 50 MB in float32 for a vocabulary of 49,152."""


Scored = tuple[int, np.ndarray, Routing | None]
"""(index of a sequence, log p in float64 and 0 where not scored [T], the record [L, 1, T, ...])."""


def score(
    model: Mixtral,
    rows: Sequence[Sequence[int] | np.ndarray],
    scored: Sequence[Sequence[bool] | np.ndarray] | None = None,
    plan: RoutingPlan | Planner | None = None,
    record: Record = "none",
    batch_tokens: int = 4096,
    plan_rows: Sequence[int] | None = None,
) -> Iterator[Scored]:
    """The results of `score_batches`, one by one."""
    for batch in score_batches(model, rows, scored, plan, record, batch_tokens, plan_rows):
        yield from batch


def score_batches(
    model: Mixtral,
    rows: Sequence[Sequence[int] | np.ndarray],
    scored: Sequence[Sequence[bool] | np.ndarray] | None = None,
    plan: RoutingPlan | Planner | None = None,
    record: Record = "none",
    batch_tokens: int = 4096,
    plan_rows: Sequence[int] | None = None,
    known: Collection[int] = (),
) -> Iterator[list[Scored]]:
    """log p of the tokens of sequences, each given the tokens before it. Sequences are packed into batches.

    Args:
      rows: token ids of each sequence.
      scored: for each sequence, the tokens to score; by default all. The first token never is: none comes before it.
      plan: what the routers are told to do. Its B is 1 or the number of sequences, its T is 1 or the longest one. Or a
        planner, whose sources are the sequences.
      record: "choices" or "full" also returns what the routers did.
      batch_tokens: tokens run at a time; it affects speed and memory only.
      plan_rows: the row of the plan for each sequence, by default its index; B is then not checked.
      known: sequences whose result is not needed. Batches that have no others are not run; the rest do not change.

    Yields:
      the results of each batch, and so in another order than `rows`.

    Raises:
      BimedixError: a token id that the model lacks, or a sequence longer than its context.
      ValueError: a plan that does not fit.
    """
    lengths, context = list(map(len, rows)), model.config.max_position_embeddings
    longest = max(lengths, default=0)
    if longest > context:
        raise BimedixError(f"a sequence has {longest} tokens, more than this model's context of {context}; shorten it")
    require_ids(rows, model.config.vocab_size)
    if plan_rows is None:
        plan_rows = range(len(rows))
        plan = plan if isinstance(plan, Planner) else checked_plan(plan, model.config, len(rows), longest)
    numbers, plans = np.asarray(plan_rows, np.int32), Plans(plan or RoutingPlan(), model)
    graph, weights = nnx.split(model)
    for places, tokens_BT, ids_BT in packed(rows, batch_tokens, context):
        if all(index in known for index, *_ in places):
            continue
        scored_BT = np.zeros(tokens_BT.shape, bool)
        for index, line, start in places:
            scored_BT[line, start : start + lengths[index]] = True if scored is None else scored[index]
            scored_BT[line, start : start + 1] = False
        items_BT, positions_BT = packed_places(tokens_BT.shape, places, lengths)
        batch = (tokens_BT, ids_BT, scored_BT)
        own = plans.of(
            Tokens(tokens_BT, numbers[items_BT], np.where(ids_BT != 0, positions_BT, -1)),
            lambda _, graph, weights, free, batch=batch: target_logprobs(graph, weights, *batch, free, "choices")[1],
        )
        logprobs_BT, routing = target_logprobs(graph, weights, *batch, own, plans.record(record))
        found = []
        for index, line, start in places:
            part = None if routing is None or record == "none" else part_of(routing, line, start, lengths[index])
            found.append((index, logprobs_BT[line, start : start + lengths[index]], part))
        yield found


def chosen_logprobs(model: Mixtral, hidden_ND: Float[Array, "N D"], targets_N: Int[Array, "N"]) -> Float[Array, "N"]:
    """log p of each target in float32 from final hidden states, POSITIONS_PER_CHUNK at a time."""
    count = hidden_ND.shape[0]
    rows = min(POSITIONS_PER_CHUNK, count)
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
    scored_BT: np.ndarray,
    plan: RoutingPlan | None = None,
    record: Record = "none",
) -> tuple[np.ndarray, Routing | None]:
    """log p of every token where `scored_BT` is True, given the tokens before it in its segment; 0 elsewhere.

    Args:
      tokens_BT, ids_BT: packed segments; ids are 0 at padding.
      scored_BT: bool; False at the first token of a segment, which has no token before it.
      plan: what the routers are told to do with these rows and columns.

    Returns: ([B, T] float64, what the routers did).
    """
    found_BT = np.zeros(tokens_BT.shape, np.float64)
    flat_M = np.flatnonzero(scored_BT)
    if flat_M.size == 0 and record == "none":
        return found_BT, None
    # rounded up to quarters of the batch: at most four shapes are compiled, and few positions are scored in vain
    quarter = -(-tokens_BT.size // 4)
    size = quarter * max(1, -(-flat_M.size // quarter))
    # the hidden state at t - 1 predicts token t, also in the flat array, since t is never the first of its segment
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
def prefill(
    graph: nnx.GraphDef,
    weights: nnx.State,
    tokens_BT: jax.Array,
    ids_BT: jax.Array,
    plan: RoutingPlan,
    slots: int,
    record: Record = "none",
) -> tuple[KVCache, Float[Array, "B V"], Routing | None]:
    """Runs left-padded prompts: (their cache with `slots` slots, log p of every next token in float32, the record)."""
    model = nnx.merge(graph, weights)
    cache = KVCache.zeros(model.config, tokens_BT.shape[0], slots, model.dtype)
    out = model.hidden(tokens_BT, ids_BT, plan, cache, record=record)
    assert out.cache is not None
    return out.cache, jax.nn.log_softmax(model.head(out.hidden_BTD[:, -1]), axis=-1), out.routing


@functools.partial(jax.jit, static_argnames=("graph", "record"))
def score_continuations(
    graph: nnx.GraphDef,
    weights: nnx.State,
    cache: KVCache,
    rows_R: jax.Array,
    tokens_RT: jax.Array,
    ids_RT: jax.Array,
    plan: RoutingPlan,
    record: Record = "none",
) -> tuple[Float[Array, "R T"], Routing | None]:
    """(log p of the tokens of continuations except the first, the record).

    Continuation r, padded on the right, follows the prompt in row `rows_R[r]` of the cache. Column t of the result is
    log p of its token t + 1; ignore the last column and those at padding. The cache is not changed, so one prompt can
    have any number of continuations.
    """
    model = nnx.merge(graph, weights)
    own = KVCache(cache.k_LBSGH[:, rows_R], cache.v_LBSGH[:, rows_R], cache.segment_ids_BS[rows_R], cache.length)
    out = model.hidden(tokens_RT, ids_RT, plan, own, record=record)
    following_RT = jnp.roll(tokens_RT, -1, axis=1)
    flat = chosen_logprobs(model, out.hidden_BTD.reshape(-1, out.hidden_BTD.shape[-1]), following_RT.reshape(-1))
    return flat.reshape(tokens_RT.shape), out.routing
