"""Held-out loss: the cross-entropy of the assistant's words in records that the model was not trained on.

Per token it is the loss that training minimises. Tokens are not comparable across languages or tokenizers (Mixtral's
splits Arabic nearly letter by letter), so the loss is also given in bits per UTF-8 byte of the assistant's text.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bimedix_jax.data.encoding import encode_chat
from bimedix_jax.data.records import Record, read_jsonl, sample
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.journal import Part
from bimedix_jax.inference.planning import AnyPlan, Planner, of_sequences, source_of
from bimedix_jax.inference.scoring import score_batches
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import Record as RecordKind
from bimedix_jax.models.routers import Routing, RoutingPlan, checked_plan


@dataclasses.dataclass(frozen=True)
class Example:
    """A record as tokens; `learned` marks the supervised tokens: the assistant's words and end tokens. `text_bytes` is
    the size of their text."""

    groups: tuple[str, ...]
    ids: list[int]
    learned: list[bool]
    text_bytes: int


@dataclasses.dataclass(frozen=True)
class HeldoutLoss:
    """Loss by group: a language ("en") or a language and a kind ("en/qa").

    Attributes:
      nats_per_token: mean -log p over supervised tokens.
      bits_per_byte: -log2 p of all supervised tokens, ends of turns included, divided by the UTF-8 bytes of the
        assistant's text.
      tokens, text_bytes, records: numbers of these in each group.
      too_long: records longer than the maximum, which were not scored; empty if there are none.
      routing: what the routers did with the tokens of each record [L, 1, T, ...], by the record's index; None unless
        recorded.
    """

    nats_per_token: dict[str, float]
    bits_per_byte: dict[str, float]
    tokens: dict[str, int]
    text_bytes: dict[str, int]
    records: dict[str, int]
    too_long: dict[str, int]
    routing: dict[int, Routing] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result for JSON, without the routing record."""
        fields = [field.name for field in dataclasses.fields(self) if field.name != "routing"]
        return {name: getattr(self, name) for name in fields}


def heldout_records(source: str, limit: int | None) -> list[Record]:
    """The held-out records of `sample` or of a JSONL file; records without a split count as held out.

    Raises:
      BimedixError: there is none, or the source is a folder.
    """
    if Path(source).is_dir():
        raise BimedixError(f"{source} is a folder; name a JSONL file of records, or `sample`")
    return held_out(sample() if source == "sample" else read_jsonl(source), source, limit)


def held_out(found: Iterable[Record], source: str, limit: int | None) -> list[Record]:
    """The records that are not for training, at most `limit` of them, spread over all.

    Raises:
      BimedixError: there is none.
    """
    kept = [record for record in found if record.split != "train"]
    if not kept:
        raise BimedixError(f"{source} has no held-out record; name a file that does")
    if limit is None or limit >= len(kept):
        return kept
    # spread, because files are sorted by source and kind
    return [kept[i * len(kept) // limit] for i in range(limit)]


def groups_of(record: Record) -> tuple[str, str]:
    """The groups that a record belongs to."""
    return record.language, f"{record.language}/{record.kind}"


def example_of(record: Record, tokenizer: Tokenizer) -> Example:
    """`record` as tokens."""
    ids, learned = encode_chat(tokenizer, record.conversations)
    size = sum(len(turn.value.encode()) for turn in record.conversations if turn.speaker == "gpt" and turn.learned)
    return Example(groups_of(record), ids, [False, *learned[1:]], size)


def total(losses: list[float]) -> float:
    """The sum, rounded once, so that it does not depend on the order; NaN if a loss is not finite."""
    return math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan


def finite(nats: dict[str, float]) -> list[str]:
    """The groups, sorted; raises BimedixError if a loss is NaN or infinite."""
    names = sorted(nats)
    broken = [name for name in names if not math.isfinite(nats[name])]
    if broken:
        raise BimedixError(
            f"the loss of {', '.join(broken)} is not finite: the model computes NaN or infinity; check its weights, or "
            "load it with base float32"
        )
    return names


def heldout_loss(
    model: Mixtral,
    tokenizer: Tokenizer,
    records: Iterable[Record],
    max_length: int | None = None,
    batch_tokens: int = 4096,
    plan: AnyPlan = None,
    record: RecordKind = "none",
    saved: Part | None = None,
) -> HeldoutLoss:
    """Scores every record.

    Args:
      max_length: longest record in tokens, by default the model's context; longer ones are counted and not scored.
      batch_tokens: tokens run at a time; it affects speed, memory and rounding only.
      plan: what the routers are told to do. Its B is 1 or the number of records, its T is 1 or the tokens of the
        longest one that is scored. Or rules.
      record: "choices" or "full" keeps what the routers did with every token, in `routing`.
      saved: losses of an earlier start, and where to save more of them; without a record of routes.

    Raises:
      BimedixError: there is no record, none fits, one has a token id that the model lacks, or a loss is not finite.
      ValueError: a plan that does not fit.
    """
    longest = min(max_length or model.config.max_position_embeddings, model.config.max_position_embeddings)
    records = list(records)
    examples = [example_of(one, tokenizer) for one in records]
    fitting = {number: example for number, example in enumerate(examples) if len(example.ids) <= longest}
    too_long: dict[str, int] = defaultdict(int)
    for example in examples:
        for group in example.groups if len(example.ids) > longest else ():
            too_long[group] += 1
    if not fitting:
        raise BimedixError(
            f"there is no record of at most {longest} tokens to score; give others or a longer max_length"
        )
    plan = of_sequences(plan, model.config, lambda: [source_of(one, tokenizer) for one in records])
    if not isinstance(plan, Planner):
        plan = checked_plan(plan, model.config, len(examples), max(len(example.ids) for example in fitting.values()))
    found: dict[str, list[float]] = defaultdict(list)
    tokens, sizes, counts = (defaultdict(int) for _ in range(3))
    routings: dict[int, Routing | None] = {}
    for number, loss, routing in losses(model, fitting, batch_tokens, plan, record, saved):
        routings[number] = routing
        for group in fitting[number].groups:
            found[group].append(loss)
            tokens[group] += sum(fitting[number].learned)
            sizes[group] += fitting[number].text_bytes
            counts[group] += 1
    nats = {group: total(own) for group, own in found.items()}
    names = finite(nats)
    return HeldoutLoss(
        {name: nats[name] / tokens[name] for name in names},
        {name: nats[name] / math.log(2) / sizes[name] for name in names},
        {name: tokens[name] for name in names},
        {name: sizes[name] for name in names},
        {name: counts[name] for name in names},
        dict(sorted(too_long.items())),
        None if record == "none" else {number: part for number, part in sorted(routings.items()) if part is not None},
    )


def losses(
    model: Mixtral,
    examples: dict[int, Example],
    batch_tokens: int,
    plan: RoutingPlan | Planner,
    record: RecordKind,
    saved: Part | None = None,
) -> Iterator[tuple[int, float, Routing | None]]:
    """(key of an example, its summed negative log-likelihood in nats, record); the keys are rows of the plan."""
    saved = saved or Part()
    numbers, rows = list(examples), [example.ids for example in examples.values()]
    learned = [example.learned for example in examples.values()]
    known = {index for index, number in enumerate(numbers) if number in saved.found}
    with tqdm(total=len(rows), desc="held-out loss", unit="record", delay=2, disable=None) as bar:
        for index in sorted(known):
            yield numbers[index], saved.found[numbers[index]], None
            bar.update()
        for batch in score_batches(model, rows, learned, plan, record, batch_tokens, numbers, known):
            found = [(numbers[index], -float(logprobs_T.sum()), routing) for index, logprobs_T, routing in batch]
            if all(math.isfinite(loss) for _, loss, _ in found):
                saved.write({number: loss for number, loss, _ in found})
            yield from found
            bar.update(len(found))
