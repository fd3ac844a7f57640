"""Expert load: how often each layer's router chooses each expert, by language and kind of record.

Records run through the model in packed batches and only sums are kept, so that memory does not grow with the data.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from bimedix_jax.data.chat_template import encode_chat
from bimedix_jax.data.records import Record
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.padding import packed
from bimedix_jax.vocabulary import require_ids


@dataclasses.dataclass(frozen=True)
class ExpertLoad:
    """Sums over tokens (prompts and answers, padding excluded), by group: "en", "ar", "en/qa", ...

    Attributes:
      counts: [L, E] int64, times each expert was chosen.
      entropy: [L], mean entropy in nats of the router's probabilities over all experts; log(E) is undecided.
      top_weight: [L], mean of the largest weight that a token gives to an expert; 1 / top_k is undecided.
      tokens: tokens summed over.
      too_long: records left out because they exceed the longest length allowed.
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
        """For JSON."""
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
) -> ExpertLoad:
    """Runs the model over records and counts.

    Args:
      max_length: longest record in tokens, by default the model's context; longer ones are counted, not cut.
      batch_tokens: tokens run at a time; it changes speed and memory, not the result.

    Raises:
      BimedixError: there is no record, none fits, or one has a token id that the model lacks.
    """
    longest = min(max_length or model.config.max_position_embeddings, model.config.max_position_embeddings)
    rows, kinds, too_long = [], [], 0
    for record in records:
        ids, _ = encode_chat(tokenizer, record.conversations)
        if len(ids) > longest:
            too_long += 1
            continue
        rows.append(ids)
        kinds.append(f"{record.language}/{record.kind}")
    if not rows:
        raise BimedixError(f"there is no record of at most {longest} tokens; give others or a longer max_length")
    require_ids(rows, model.config.vocab_size)
    names = sorted(set(kinds))
    sums = None
    graph, weights = nnx.split(model)
    with tqdm(total=len(rows), desc="expert load", unit="record", delay=2, disable=None) as bar:
        for places, tokens_BT, ids_BT in packed(rows, batch_tokens, longest):
            group_BT = np.full(tokens_BT.shape, -1, np.int32)
            for index, line, start in places:
                group_BT[line, start : start + len(rows[index])] = names.index(kinds[index])
            found = _sums(graph, weights, tokens_BT, ids_BT, group_BT, len(names))
            found = [np.asarray(value, np.float64) for value in found]
            sums = found if sums is None else [total + value for total, value in zip(sums, found, strict=True)]
            bar.update(len(places))
    assert sums is not None  # there is at least one row
    return _by_group(names, *sums, too_long=too_long)


def _by_group(
    names: list[str],
    counts_GLE: np.ndarray,
    entropy_GL: np.ndarray,
    top_GL: np.ndarray,
    tokens_G: np.ndarray,
    too_long: int,
) -> ExpertLoad:
    """Means for each language and each of its kinds from the sums for each kind."""
    counts, entropy, top_weight, tokens = {}, {}, {}, {}
    for group in sorted({name.split("/")[0] for name in names} | set(names)):
        own = [index for index, name in enumerate(names) if name == group or name.startswith(f"{group}/")]
        total = tokens_G[own].sum()
        counts[group] = counts_GLE[own].sum(axis=0).astype(np.int64)
        entropy[group] = entropy_GL[own].sum(axis=0) / total
        top_weight[group] = top_GL[own].sum(axis=0) / total
        tokens[group] = int(total)
    return ExpertLoad(counts, entropy, top_weight, tokens, too_long)


@functools.partial(jax.jit, static_argnames=("graph", "groups"))
def _sums(
    graph: nnx.GraphDef,
    weights: nnx.State,
    tokens_BT: jax.Array,
    ids_BT: jax.Array,
    group_BT: jax.Array,
    groups: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(choices [G, L, E], entropy [G, L], largest weight [G, L], tokens [G]) summed over the tokens of each group."""
    model = nnx.merge(graph, weights)
    routing = model.hidden(tokens_BT, ids_BT).routing
    experts = routing.logits_LBTE.shape[-1]
    member_GBT = (group_BT[None] == jnp.arange(groups)[:, None, None]).astype(jnp.float32)
    chosen_LBTE = jnp.sum(jax.nn.one_hot(routing.experts_LBTK, experts, dtype=jnp.float32), axis=-2)
    logp_LBTE = jax.nn.log_softmax(routing.logits_LBTE, axis=-1)
    entropy_LBT = -jnp.sum(jnp.exp(logp_LBTE) * logp_LBTE, axis=-1)
    return (
        jnp.einsum("gbt,lbte->gle", member_GBT, chosen_LBTE),
        jnp.einsum("gbt,lbt->gl", member_GBT, entropy_LBT),
        jnp.einsum("gbt,lbt->gl", member_GBT, jnp.max(routing.weights_LBTK, axis=-1)),
        jnp.sum(member_GBT, axis=(1, 2)),
    )
