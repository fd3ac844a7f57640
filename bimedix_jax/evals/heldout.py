"""Held-out loss: how surprised the model is by what the assistant says in records that it never trained on.

Per token it is what training minimises. Tokens are not comparable across languages or tokenizers (Mixtral spells Arabic
nearly letter by letter), so the same surprise is also given in bits per UTF-8 byte of the assistant's text.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from flax import nnx
from tqdm import tqdm

from bimedix_jax.data.chat_template import encode_chat
from bimedix_jax.data.records import Record
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.scoring import target_logprobs
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.padding import packed
from bimedix_jax.vocabulary import require_ids


@dataclasses.dataclass(frozen=True)
class Example:
    """A record as tokens: `learned` marks the assistant's words and end tokens, `text_bytes` counts those words."""

    groups: tuple[str, ...]
    ids: list[int]
    learned: list[bool]
    text_bytes: int


@dataclasses.dataclass(frozen=True)
class HeldoutLoss:
    """Loss by group: a language ("en") or a language and a kind ("en/qa").

    Attributes:
      nats_per_token: mean -log p over supervised tokens.
      bits_per_byte: -log2 p of all supervised tokens, ends of turns included, over UTF-8 bytes of the assistant's text.
      tokens, text_bytes, records: what the means are over.
      too_long: records left out because they exceed the longest length allowed; empty when all were scored.
    """

    nats_per_token: dict[str, float]
    bits_per_byte: dict[str, float]
    tokens: dict[str, int]
    text_bytes: dict[str, int]
    records: dict[str, int]
    too_long: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def groups_of(record: Record) -> tuple[str, str]:
    """The groups that a record counts in."""
    return record.language, f"{record.language}/{record.kind}"


def example_of(record: Record, tokenizer: Tokenizer) -> Example:
    """`record` as the model sees it."""
    ids, learned = encode_chat(tokenizer, record.conversations)
    size = sum(len(turn.value.encode()) for turn in record.conversations if turn.speaker == "gpt")
    return Example(groups_of(record), ids, [False, *learned[1:]], size)


def finite(nats: dict[str, float]) -> list[str]:
    """The groups, sorted; raises BimedixError where a loss is NaN or infinite."""
    names = sorted(nats)
    broken = [name for name in names if not math.isfinite(nats[name])]
    if broken:
        raise BimedixError(
            f"the loss of {', '.join(broken)} is no finite number: the model computes NaN or infinity; check its "
            "weights, or load it with base float32"
        )
    return names


def heldout_loss(
    model: Mixtral,
    tokenizer: Tokenizer,
    records: Iterable[Record],
    max_length: int | None = None,
    batch_tokens: int = 4096,
) -> HeldoutLoss:
    """Scores every record.

    Args:
      max_length: longest record in tokens, by default the model's context; longer ones are counted, not cut.
      batch_tokens: tokens run at a time; it changes speed and memory, not the result.

    Raises:
      BimedixError: there is no record, none fits, one has a token id that the model lacks, or a loss is no number.
    """
    longest = min(max_length or model.config.max_position_embeddings, model.config.max_position_embeddings)
    nats: dict[str, float] = defaultdict(float)
    tokens, sizes, counts, too_long = (defaultdict(int) for _ in range(4))
    examples = []
    for record in records:
        example = example_of(record, tokenizer)
        if len(example.ids) > longest:
            for group in example.groups:
                too_long[group] += 1
            continue
        examples.append(example)
    if not examples:
        raise BimedixError(
            f"there is no record of at most {longest} tokens to score; give others or a longer max_length"
        )
    require_ids((example.ids for example in examples), model.config.vocab_size)
    graph, weights = nnx.split(model)
    with tqdm(total=len(examples), desc="held-out loss", unit="record", delay=2, disable=None) as bar:
        for places, tokens_BT, ids_BT in packed([example.ids for example in examples], batch_tokens, longest):
            learned_BT = np.zeros(tokens_BT.shape, bool)
            for index, line, start in places:
                learned_BT[line, start : start + len(examples[index].ids)] = examples[index].learned
            logprobs_BT = target_logprobs(graph, weights, tokens_BT, ids_BT, learned_BT)
            for index, line, start in places:
                example = examples[index]
                loss = -float(logprobs_BT[line, start : start + len(example.ids)].sum())
                for group in example.groups:
                    nats[group] += loss
                    tokens[group] += sum(example.learned)
                    sizes[group] += example.text_bytes
                    counts[group] += 1
            bar.update(len(places))
    names = finite(nats)
    return HeldoutLoss(
        {name: nats[name] / tokens[name] for name in names},
        {name: nats[name] / math.log(2) / sizes[name] for name in names},
        {name: tokens[name] for name in names},
        {name: sizes[name] for name in names},
        {name: counts[name] for name in names},
        dict(sorted(too_long.items())),
    )
