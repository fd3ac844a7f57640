"""Expert load: how often the router of each layer chooses each expert, by language and kind of record.

Records run through the model in packed batches, and only sums are kept: memory does not grow with the data.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from bimedix_jax.data.encoding import encode_chat
from bimedix_jax.data.records import Record
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.data.vocabulary import require_ids
from bimedix_jax.errors import BimedixError
from bimedix_jax.inference.padding import packed, packed_places
from bimedix_jax.inference.planning import AnyPlan, Planner, Plans, Tokens, of_sequences, source_of
from bimedix_jax.inference.scoring import target_logprobs
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.router_sums import RouterSums
from bimedix_jax.models.routers import RoutingPlan, checked_plan


@dataclasses.dataclass(frozen=True)
class ExpertLoad:
    """Sums over tokens (prompts and answers, padding excluded), by group: "en", "ar", "en/qa", ...

    Attributes:
      counts: [L, E] int64, how often each expert was chosen.
      entropy: [L], mean entropy in nats of the router's probabilities over all experts; log(E) if they are uniform.
      top_weight: [L], mean of the largest weight that a token gives to an expert; 1 / top_k if its weights are equal.
      tokens: number of tokens.
      too_long: records longer than the maximum, which were not run.
    """

    counts: dict[str, np.ndarray]
    entropy: dict[str, np.ndarray]
    top_weight: dict[str, np.ndarray]
    tokens: dict[str, int]
    too_long: int

    def share(self, group: str) -> np.ndarray:
        """[L, E]: each expert's share of its layer's choices; rows sum to 1."""
        counts_LE = self.counts[group]
        return counts_LE / counts_LE.sum(axis=1, keepdims=True)

    def to_dict(self) -> dict[str, Any]:
        """The load for JSON."""
        return {
            "counts": {group: counts.tolist() for group, counts in self.counts.items()},
            "entropy": {group: values.tolist() for group, values in self.entropy.items()},
            "top_weight": {group: values.tolist() for group, values in self.top_weight.items()},
            "tokens": self.tokens,
            "too_long": self.too_long,
        }


def expert_load(
    model: Mixtral,
    tokenizer: Tokenizer,
    records: Iterable[Record],
    max_length: int | None = None,
    batch_tokens: int = 4096,
    plan: AnyPlan = None,
) -> ExpertLoad:
    """Runs the model on records and counts the routers' choices.

    Args:
      max_length: longest record in tokens, by default the model's context; longer ones are counted and not run.
      batch_tokens: tokens run at a time; it affects speed, memory and rounding only.
      plan: what the routers are told to do. Its B is 1 or the number of records, its T is 1 or the tokens of the
        longest one that is run. Or rules.

    Raises:
      BimedixError: there is no record, none fits, or one has a token id that the model lacks.
      ValueError: a plan that does not fit.
    """
    longest = min(max_length or model.config.max_position_embeddings, model.config.max_position_embeddings)
    records = list(records)
    rows, kinds, numbers, too_long = [], [], [], 0
    for number, record in enumerate(records):
        ids, _ = encode_chat(tokenizer, record.conversations)
        if len(ids) > longest:
            too_long += 1
            continue
        rows.append(ids)
        kinds.append(f"{record.language}/{record.kind}")
        numbers.append(number)
    if not rows:
        raise BimedixError(f"there is no record of at most {longest} tokens; give others or a longer max_length")
    require_ids(rows, model.config.vocab_size)
    lengths, names = list(map(len, rows)), sorted(set(kinds))
    plan = of_sequences(plan, model.config, lambda: [source_of(record, tokenizer) for record in records])
    if not isinstance(plan, Planner):
        plan = checked_plan(plan, model.config, len(records), max(lengths))
    plans = Plans(plan, model)
    kind_R = np.array([names.index(kind) for kind in kinds], np.int32)
    sums = None
    graph, weights = nnx.split(model)
    with tqdm(total=len(rows), desc="expert load", unit="record", delay=2, disable=None) as bar:
        for places, tokens_BT, ids_BT in packed(rows, batch_tokens, longest):
            items_BT, positions_BT = packed_places(tokens_BT.shape, places, lengths)
            batch = (tokens_BT, ids_BT, np.zeros(ids_BT.shape, bool))
            own = plans.of(
                Tokens(tokens_BT, np.asarray(numbers, np.int32)[items_BT], np.where(ids_BT != 0, positions_BT, -1)),
                lambda _, graph, weights, free, batch=batch: target_logprobs(graph, weights, *batch, free, "choices")[
                    1
                ],
            )
            found = _sums(graph, weights, tokens_BT, ids_BT, kind_R[items_BT], own, len(names))
            found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
            sums = found if sums is None else jax.tree.map(np.add, sums, found)
            bar.update(len(places))
    assert sums is not None  # there is at least one row
    arrays = (sums.chosen_LXE, sums.entropy_LX, sums.top_weight_LX, sums.tokens_LX)
    return by_group(names, *(np.asarray(array) for array in arrays), too_long=too_long)


def by_group(
    names: list[str],
    chosen_LXE: np.ndarray,
    entropy_LX: np.ndarray,
    top_weight_LX: np.ndarray,
    tokens_LX: np.ndarray,
    too_long: int,
) -> ExpertLoad:
    """Means for each language, and for each of its kinds, from the sums for each kind."""
    counts, entropy, top_weight, tokens = {}, {}, {}, {}
    for group in sorted({name.split("/")[0] for name in names} | set(names)):
        own = [index for index, name in enumerate(names) if name == group or name.startswith(f"{group}/")]
        total_L = tokens_LX[:, own].sum(axis=1)
        counts[group] = chosen_LXE[:, own].sum(axis=1).round().astype(np.int64)
        entropy[group] = entropy_LX[:, own].sum(axis=1) / total_L
        top_weight[group] = top_weight_LX[:, own].sum(axis=1) / total_L
        tokens[group] = int(total_L[0])
    return ExpertLoad(counts, entropy, top_weight, tokens, too_long)


@functools.partial(jax.jit, static_argnames=("graph", "groups"))
def _sums(
    graph: nnx.GraphDef,
    weights: nnx.State,
    tokens_BT: jax.Array,
    ids_BT: jax.Array,
    group_BT: jax.Array,
    plan: RoutingPlan,
    groups: int,
) -> RouterSums:
    """The routers' sums over the tokens of each group."""
    sums = nnx.merge(graph, weights).hidden(tokens_BT, ids_BT, plan, groups=groups, group_BT=group_BT).sums
    assert sums is not None  # there is at least one group
    return sums
