"""Log-probabilities of given tokens of whole sequences. inference/continuations.py has those of continuations.

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
from bimedix_jax.models.call import Start
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
      batch_tokens: tokens run at a time; it affects speed, memory and rounding only.
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


def chosen_logprobs(
    model: Mixtral,
    hidden_ND: Float[Array, "N D"],
    targets_N: Int[Array, "N"],
    wanted: Int[Array, ""] | None = None,
) -> Float[Array, "N"]:
    """log p of each target in float32 from final hidden states, POSITIONS_PER_CHUNK at a time.

    `wanted` leaves out the chunks after the first `wanted` positions, without a shape of their own and without
    gradients; their results are 0.
    """
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

    def one_more(number: jax.Array, found_CR: jax.Array) -> jax.Array:
        return found_CR.at[number].set(one_chunk((hidden_CRD[number], targets_CR[number])))

    if wanted is None:
        found_CR = jax.lax.map(one_chunk, (hidden_CRD, targets_CR))
    else:
        empty_CR = jnp.zeros(targets_CR.shape, jnp.float32)
        found_CR = jax.lax.fori_loop(0, -(-wanted // rows), one_more, empty_CR)
    return found_CR.reshape(-1)[:count]


def target_logprobs(
    graph: nnx.GraphDef,
    weights: nnx.State,
    tokens_BT: np.ndarray,
    ids_BT: np.ndarray,
    scored_BT: np.ndarray,
    plan: RoutingPlan | None = None,
    record: Record = "none",
    start: Start | None = None,
) -> tuple[np.ndarray, Routing | None]:
    """log p of every token where `scored_BT` is True, given the tokens before it in its segment; 0 elsewhere.

    Args:
      tokens_BT, ids_BT: packed segments; ids are 0 at padding.
      scored_BT: bool; False at the first token of a segment, which has no token before it.
      plan: what the routers are told to do with these rows and columns.
      start: a later layer to begin with; nothing is recorded then.

    Returns: ([B, T] float64, what the routers did).
    """
    found_BT = np.zeros(tokens_BT.shape, np.float64)
    flat_M = np.flatnonzero(scored_BT)
    if flat_M.size == 0 and record == "none":
        return found_BT, None
    # the hidden state at t - 1 predicts token t, also in the flat array, since t is never the first of its segment
    rest, wanted = tokens_BT.size - flat_M.size, np.int32(flat_M.size)
    before_M = np.pad(flat_M - 1, (0, rest)).astype(np.int32)
    targets_M = np.pad(tokens_BT.reshape(-1)[flat_M], (0, rest))
    plan = plan or RoutingPlan()
    places = (before_M, targets_M, wanted)
    logprobs_M, routing = _logprobs_at(graph, weights, tokens_BT, ids_BT, *places, plan, record, start)
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
    wanted: jax.Array,
    plan: RoutingPlan,
    record: Record,
    start: Start | None,
) -> tuple[jax.Array, Routing | None]:
    model = nnx.merge(graph, weights)
    out = model.hidden(tokens_BT, ids_BT, plan, record=record, start=start)
    hidden_ND = out.hidden_BTD.reshape(-1, out.hidden_BTD.shape[-1])
    return chosen_logprobs(model, hidden_ND[before_M], targets_M, wanted), out.routing
