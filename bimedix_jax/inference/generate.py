"""Decoding with a key-value cache: greedy or sampled, one prompt or a batch of any lengths, complete or streamed.

The prompt runs once (prefill), then a compiled step for each token. The step's cache is donated and so updated in
place. Weights are arguments of the compiled functions, never constants in them. Lengths are rounded up
(bimedix_jax/inference/padding.py), so a growing conversation compiles only a few shapes.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bimedix_jax.data.vocabulary import require_ids
from bimedix_jax.errors import BimedixError
from bimedix_jax.inference import decoding_layout
from bimedix_jax.inference.padding import bucket, pad_left, pad_right
from bimedix_jax.inference.planning import AnyPlan, Planner, of_prompts, plan_of_rows
from bimedix_jax.models.attention import KVCache
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import NO_EXPERT, Record, Routing, RoutingPlan, checked_plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits, as scalars; None turns a filter off. Changing a value does not recompile.

    Attributes:
      temperature: divides the logits; None takes the most likely token.
      top_k: keep this many most likely tokens.
      top_p: keep the most likely tokens that together reach this probability (arXiv 1904.09751).
      min_p: keep tokens at least this fraction as likely as the most likely one (arXiv 2407.01082).
      repetition_penalty: divides positive and multiplies negative logits of tokens that occurred (arXiv 1909.05858).
    """

    temperature: jax.Array | None
    top_k: jax.Array | None
    top_p: jax.Array | None
    min_p: jax.Array | None
    repetition_penalty: jax.Array | None

    @classmethod
    def of(
        cls,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
    ) -> "Sampling":
        """From plain numbers. Temperature 0 is greedy; the filters are then off, since they would change nothing.

        Raises:
          BimedixError: a number outside its range.
        """
        _require(math.isfinite(temperature) and temperature >= 0, "temperature", temperature, "0 (greedy) or more")
        _require(top_k is None or top_k >= 1, "top_k", top_k, "at least 1")
        _require(top_p is None or 0 < top_p <= 1, "top_p", top_p, "above 0 and at most 1")
        _require(min_p is None or 0 <= min_p <= 1, "min_p", min_p, "between 0 and 1")
        penalty = repetition_penalty
        _require(penalty is None or penalty > 0, "repetition_penalty", penalty, "above 0")
        seen = None if penalty in (None, 1.0) else jnp.float32(penalty)
        if temperature == 0:
            return cls(None, None, None, None, seen)
        return cls(
            jnp.float32(temperature),
            None if top_k is None else jnp.int32(top_k),
            None if top_p in (None, 1.0) else jnp.float32(top_p),
            None if not min_p else jnp.float32(min_p),
            seen,
        )


def _require(good: bool, name: str, value: float | None, expected: str) -> None:
    if not good:
        raise BimedixError(f"{name} is {value}; give a number that is {expected}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """State of decoding between two steps.

    Attributes:
      cache: keys and values of the prompt and of all tokens chosen so far except the last; None while it is donated.
      token_B: the last token chosen, for each prompt.
      seen_BV: which tokens occurred in prompt or answer; None without a repetition penalty.
      step: int32, number of tokens chosen so far.
      lengths_B: int32, tokens of each prompt.
    """

    cache: KVCache | None
    token_B: jax.Array
    seen_BV: jax.Array | None
    step: jax.Array
    lengths_B: jax.Array


def generate(
    model: Mixtral,
    prompt_tokens: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop_tokens: Collection[int] = (),
    seed: int = 0,
    segment_ids: Any = None,
    plan: AnyPlan | Planner = None,
    record: Record = "none",
) -> Any:
    """The tokens that follow one prompt, or each prompt of a batch: new tokens only, without the stop token.

    Args:
      model: is not changed. A GPU or TPU casts the factors of adapters once for each call, into a copy of two bytes a
        parameter. Packed weights are not stored by rows: a TPU copies a layer's for each token, unlike `bimedix chat`.
      prompt_tokens: token ids of one prompt, or a sequence of prompts that may differ in length; lists or arrays.
      temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`; 0 is greedy, but batches round differently.
      stop_tokens: ids that end a sequence.
      seed: seed of the sampling; a draw depends on seed, row and step.
      segment_ids: for prompts in one padded array, an array of its shape that is 0 at padding.
      plan: what the routers are told to do. Its B is 1 or the number of prompts. Its T is 1 or the length of the
        longest prompt + max_new_tokens; index 0 is the first token of each prompt, after its padding. Or rules, or
        their planner if more is known of the prompts than their tokens.
      record: "choices" or "full" also returns what the routers did.

    Returns:
      A list of token ids for one prompt, a list of such lists for a batch. With a record, (these ids, Routing): NumPy
      arrays over prompt and answer with the axes of a plan. Where a row has no token, the expert is -1 and its weight
      0.

    Raises:
      BimedixError: an empty prompt, an id outside the vocabulary, a number out of range, or more tokens than fit the
        model's context.
      ValueError: a plan that does not fit.
    """
    prompts, single = as_prompts(prompt_tokens, segment_ids)
    sampling = Sampling.of(temperature, top_k, top_p, min_p, repetition_penalty)
    answers: list[list[int]] = [[] for _ in prompts]
    unfinished, stop = set(range(len(prompts))), frozenset(map(int, stop_tokens))
    read: list[Routing] = []
    for tokens, routing in decode(model, prompts, max_new_tokens, sampling, seed, plan, record, read_last=True):
        if routing is not None:
            read.append(routing)
        for row in sorted(unfinished) if tokens else ():
            if tokens[row] in stop:
                unfinished.remove(row)
            else:
                answers[row].append(tokens[row])
        if not unfinished:
            break
    found = answers[0] if single else answers
    if record == "none":
        return found
    length = max(map(len, prompts)) + max_new_tokens
    return found, aligned(read, list(map(len, prompts)), list(map(len, answers)), length)


def aligned(read: Sequence[Routing], prompts: Sequence[int], answers: Sequence[int], length: int) -> Routing:
    """Joins the records of left-padded prompts and of each later token, and shifts every row to begin at index 0.

    Args:
      read: the record of the prompts [L, B, T, ...], then one record for each later token [L, B, 1, ...].
      prompts, answers: number of tokens of each row.
      length: T of the result.
    """

    def join(name: str, empty: float) -> np.ndarray | None:
        parts = [getattr(routing, name) for routing in read]
        if parts[0] is None:
            return None
        whole = np.concatenate([np.asarray(part) for part in parts], axis=2)
        layers, batch, _, width = whole.shape
        columns = np.asarray(parts[0]).shape[2]
        out = np.full((layers, batch, length, width), empty, whole.dtype)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            out[:, row, : prompt + answer] = whole[:, row, columns - prompt : columns + answer]
        return out

    experts = join("experts_LBTK", NO_EXPERT)
    return Routing(experts, join("weights_LBTK", 0), join("logits_LBTE", 0))  # pyright: ignore[reportArgumentType]


def stream(
    model: Mixtral,
    prompt_tokens: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop_tokens: Collection[int] = (),
    seed: int = 0,
    plan: AnyPlan | Planner = None,
    record: Record = "none",
) -> Iterator[Any]:
    """The tokens of `generate` for one prompt, each as soon as it is chosen.

    With a record, each item is (token, Routing). Its record covers the tokens that the model read to choose this token:
    the prompt for the first token, and the previous token for each later one. A stop token ends the stream and yields
    no record.
    """
    prompts, single = as_prompts(prompt_tokens)
    if not single:
        raise BimedixError("stream takes one prompt; call generate for a batch")
    sampling = Sampling.of(temperature, top_k, top_p, min_p, repetition_penalty)
    stop = frozenset(map(int, stop_tokens))
    for tokens, routing in decode(model, prompts, max_new_tokens, sampling, seed, plan, record):
        if tokens[0] in stop:
            return
        if routing is None:
            yield tokens[0]
        else:
            columns = len(prompts[0]) if routing.experts_LBTK.shape[2] > 1 else 1
            yield tokens[0], jax.tree.map(lambda x, columns=columns: np.asarray(x)[:, :, -columns:], routing)


def as_prompts(prompt_tokens: Any, segment_ids: Any = None) -> tuple[list[np.ndarray], bool]:
    """(prompts as integer arrays without padding, whether it was a single prompt without a batch axis)."""
    first = prompt_tokens[0] if len(prompt_tokens) else None
    single = first is None or np.ndim(first) == 0
    rows = [np.asarray(row) for row in ([prompt_tokens] if single else prompt_tokens)]
    if segment_ids is not None:
        valid = [np.asarray(row) != 0 for row in ([segment_ids] if single else segment_ids)]
        if [row.shape for row in rows] != [row.shape for row in valid]:
            raise BimedixError("segment_ids and prompt_tokens differ in shape; give one id for each token")
        rows = [row[keep] for row, keep in zip(rows, valid, strict=True)]
    for index, row in enumerate(rows):
        if row.size == 0:
            raise BimedixError(f"prompt {index} is empty; give it at least one token, such as the tokenizer's bos_id")
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
            raise BimedixError(
                f"prompt {index} is not a sequence of integers (shape {row.shape}, {row.dtype}); tokenise it"
            )
    return rows, single


def decode(
    model: Mixtral,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    plan: AnyPlan | Planner = None,
    record: Record = "none",
    read_last: bool = False,
) -> Iterator[tuple[list[int], Routing | None]]:
    """For each step, (a token for each prompt, the record of the tokens that the model read to choose them).

    It runs to `max_new_tokens` unless the caller stops. With `read_last` and a record, the model also reads the tokens
    chosen last, and there is one more item that has no tokens.

    Raises:
      BimedixError: an id outside the vocabulary, or more tokens than fit the model's context.
      ValueError: a plan that does not fit.
    """
    config = model.config
    longest, context = max(map(len, prompts)), config.max_position_embeddings
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise BimedixError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
    if longest + max_new_tokens > context:
        raise BimedixError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed this model's context of {context}; "
            "shorten the prompt or ask for fewer new tokens"
        )
    require_ids(prompts, config.vocab_size)
    plan = of_prompts(plan, model, len(prompts))
    if not isinstance(plan, Planner):
        plan = checked_plan(plan, config, len(prompts), longest + max_new_tokens)
    length = min(bucket(longest), context - max_new_tokens)
    slots = min(bucket(length + max_new_tokens), context)
    tokens_BT, segment_ids_BT = pad_left(prompts, length)
    (graph, weights), own = nnx.split(model), plan
    key, lengths_B = jax.random.key(seed), np.array(list(map(len, prompts)), np.int32)
    if isinstance(plan, Planner):
        ids_BT, valid_BT = pad_right(prompts, length)
        own = plan_of_rows(plan, ids_BT, np.where(valid_BT != 0, np.arange(length)[None], -1))
    state, routing = _prefill(graph, weights, tokens_BT, segment_ids_BT, sampling, key, own, slots, record)
    steps = max_new_tokens - (not (read_last and record != "none"))
    for number in range(steps):
        token_B, read = state.token_B, routing
        if number == 0:
            yield token_B.tolist(), read  # before the step is traced and compiled, which can take seconds
            if max_new_tokens > 1:
                stored, cache = decoding_layout.for_steps(model, state.cache, len(prompts), steps)
                (graph, weights), state = nnx.split(stored), dataclasses.replace(state, cache=cache)
        rest = dataclasses.replace(state, cache=None, seen_BV=None)
        if isinstance(plan, Planner) and plan.by_token:  # such rules need the token before the next step is launched
            own = plan_of_rows(plan, np.asarray(token_B)[:, None], (lengths_B + number)[:, None])
        state, routing = _step(graph, weights, rest, (state.cache, state.seen_BV), sampling, key, own, record)
        if number > 0:
            yield token_B.tolist(), read  # the next step is already running
    yield ([], routing) if steps == max_new_tokens else (state.token_B.tolist(), routing)


@functools.partial(jax.jit, static_argnames=("graph", "slots", "record"))
def _prefill(
    graph: nnx.GraphDef,
    weights: nnx.State,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    sampling: Sampling,
    key: jax.Array,
    plan: RoutingPlan,
    slots: int,
    record: Record,
) -> tuple[State, Routing | None]:
    """Runs left-padded prompts and chooses the first new token of each."""
    model = nnx.merge(graph, weights)
    batch, length = tokens_BT.shape
    cache = KVCache.zeros(model.config, batch, slots, model.dtype)
    lengths_B = jnp.sum(segment_ids_BT != 0, axis=1, dtype=jnp.int32)
    positions_BT = jnp.arange(length)[None] - (length - lengths_B)[:, None]
    own = plan.at(jnp.arange(batch)[:, None], positions_BT)
    out = model.hidden(tokens_BT, segment_ids_BT, own, cache, record=record)
    assert out.cache is not None
    seen_BV = None
    if sampling.repetition_penalty is not None:
        seen_BV = jnp.zeros((batch, model.config.vocab_size), bool)
        seen_BV = seen_BV.at[jnp.arange(batch)[:, None], tokens_BT].max(segment_ids_BT != 0)
    logits_BV = model.head(out.hidden_BTD[:, -1])
    start = State(out.cache, tokens_BT[:, -1], seen_BV, jnp.zeros((), jnp.int32), lengths_B)
    return _choose(logits_BV, start, sampling, key), out.routing


@functools.partial(jax.jit, static_argnames=("graph", "record"), donate_argnames=("donated",))
def _step(
    graph: Any,
    weights: Any,
    state: State,
    donated: tuple[KVCache, jax.Array | None],
    sampling: Sampling,
    key: jax.Array,
    plan: RoutingPlan,
    record: Record,
) -> tuple[State, Routing | None]:
    """Runs the tokens chosen last and chooses the next ones.

    `donated` is the rest of the state, cache and seen tokens; the new state reuses their memory.
    """
    model, (cache, seen_BV) = nnx.merge(graph, weights), donated
    rows_B = jnp.arange(state.token_B.shape[0])
    own = plan.at(rows_B[:, None], (state.lengths_B + state.step - 1)[:, None])
    out = model.hidden(state.token_B[:, None], None, own, cache, record=record)
    assert out.cache is not None
    logits_BV = model.head(out.hidden_BTD[:, -1])
    return _choose(logits_BV, dataclasses.replace(state, cache=out.cache, seen_BV=seen_BV), sampling, key), out.routing


def _choose(logits_BV: jax.Array, state: State, sampling: Sampling, key: jax.Array) -> State:
    token_B = sample(logits_BV, state.seen_BV, sampling, jax.random.fold_in(key, state.step))
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(seen_BV.shape[0]), token_B].set(True)
    return State(state.cache, token_B, seen_BV, state.step + 1, state.lengths_B)


def sample(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"] | None, sampling: Sampling, key: jax.Array
) -> Int[Array, "B"]:
    """One token for each row, int32. Filters run in Hugging Face's order: penalty, temperature, top-k, top-p, min-p."""
    if sampling.repetition_penalty is not None and seen_BV is not None:
        penalty = sampling.repetition_penalty
        penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    if sampling.temperature is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = keep_likely(logits_BV / sampling.temperature, sampling)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits_BV.shape[0]))
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def keep_likely(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits with -inf where top-k, top-p or min-p drops a token. Ties with the last kept token are kept."""
    if sampling.top_k is not None or sampling.top_p is not None:
        ordered_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        kept_BV = jnp.ones_like(ordered_BV, bool)
        if sampling.top_k is not None:
            kept_BV = jnp.broadcast_to((jnp.arange(ordered_BV.shape[1]) < sampling.top_k)[None], ordered_BV.shape)
        if sampling.top_p is not None:
            probability_BV = jax.nn.softmax(jnp.where(kept_BV, ordered_BV, -jnp.inf), axis=-1)
            # a token is kept if the more likely ones do not reach top_p; the first is always kept
            before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
            kept_BV = kept_BV & (before_BV < sampling.top_p)
        least_B1 = jnp.min(jnp.where(kept_BV, ordered_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if sampling.min_p is not None:
        floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits_BV = jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)
    return logits_BV
