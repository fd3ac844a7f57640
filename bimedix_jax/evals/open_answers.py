"""Generated answers to held-out questions and in held-out chats, compared with the references.

Every answer of a record is generated after the reference turns before it, so that one bad answer does not spoil the
rest of a chat. Decoding is greedy. An answer is in the right language if most of its letters have the script of the
turn that it answers, so a patient who switches languages is answered in the new one.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from bimedix_jax.data.encoding import encode_chat, roles_of_chat
from bimedix_jax.data.records import Record, Turn
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.multiple_choice import Accuracy
from bimedix_jax.evals.text_metrics import arabic_share, chrf, is_in, mean_interval, rouge_l
from bimedix_jax.inference.generate import generate
from bimedix_jax.inference.padding import by_length
from bimedix_jax.inference.planning import AnyPlan, Rules, Source
from bimedix_jax.models.mixtral import Mixtral


@dataclasses.dataclass(frozen=True)
class Item:
    """A conversation to continue.

    Attributes:
      id: of the record, with the number of the answer in it ("r1#2") if it has several.
      record: id of the record.
      language: of the turn that is answered.
      kind: kind of the record, or what the item tests.
      turns: the conversation before the answer.
      reference: the answer of the record; None if there is none.
    """

    id: str
    record: str
    language: str
    kind: str
    turns: tuple[Turn, ...]
    reference: str | None = None

    @property
    def groups(self) -> tuple[str, str]:
        return self.language, f"{self.language}/{self.kind}"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model answered; `finished` is False where max_new_tokens cut it off."""

    item: Item
    text: str
    tokens: int
    finished: bool

    @property
    def faithful(self) -> bool:
        """Whether it is in the language of the turn that it answers."""
        return is_in(self.text, self.item.language)

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON, with its scores."""
        row = {
            "id": self.item.id,
            "record": self.item.record,
            "language": self.item.language,
            "kind": self.item.kind,
            "answer": self.text,
            "tokens": self.tokens,
            "finished": self.finished,
            "arabic_share": arabic_share(self.text),
            "in_language": self.faithful,
        }
        if self.item.reference is not None:
            reference = self.item.reference
            scores = {"chrf": chrf([self.text], [reference]), "rouge_l": 100 * rouge_l(self.text, reference)}
            row |= {"reference": reference, **scores}
        return row


def items_of(records: Iterable[Record]) -> list[Item]:
    """An item for every answer of questions and chats; multiple choice is scored by likelihood and left out."""
    found = []
    for record in records:
        if record.kind == "mcqa":
            continue
        turns = record.conversations
        places = [index for index, turn in enumerate(turns) if turn.speaker == "gpt" and turn.learned]
        for number, place in enumerate(places, 1):
            name = record.id if len(places) == 1 else f"{record.id}#{number}"
            language = turns[place - 1].language or record.language
            found.append(Item(name, record.id, language, record.kind, turns[:place], turns[place].value))
    return found


def answer_all(
    model: Mixtral,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    max_new_tokens: int,
    batch_tokens: int = 4096,
    plan: AnyPlan = None,
    known: Mapping[int, Sequence[Any]] | None = None,
    keep: Callable[[Mapping[int, Sequence[Any]]], None] | None = None,
) -> list[Answer]:
    """Greedy answers, in the order of `items`. Items of similar length run together.

    Args:
      batch_tokens: tokens of a batch with its answers; it affects speed, memory and rounding only.
      plan: what the routers are told to do: rules, or a plan with B and T of 1.
      known: (text, tokens) of an earlier start by the item's number; a batch that is all known does not run.
      keep: called with the same of each new batch.

    Raises:
      BimedixError: there is no item, or a conversation and its answer exceed the model's context.
    """
    if not items:
        raise BimedixError("there is no open question or chat among the held-out records; name a file that has some")
    context = model.config.max_position_embeddings
    prompts = [encode_chat(tokenizer, item.turns, add_generation_prompt=True)[0] for item in items]
    check_lengths(items, prompts, max_new_tokens, context)
    found: dict[int, Sequence[Any]] = {}
    with tqdm(total=len(items), desc="answers", unit="answer", delay=2, disable=None) as bar:
        for batch, rows, _ in by_length(
            range(len(items)), lambda index: len(prompts[index]) + max_new_tokens, batch_tokens, context
        ):
            if known and all(index in known for index in batch):
                found |= {index: known[index] for index in batch}
            else:
                filled = [*batch, *batch[:1] * (rows - len(batch))]  # a batch of few rows would be another program
                ids = generate(
                    model,
                    [prompts[index] for index in filled],
                    max_new_tokens,
                    stop_tokens=tokenizer.stop_ids,
                    plan=plan_of(plan, model, tokenizer, [items[index] for index in filled]),
                )
                texts = [tokenizer.decode(row, skip_special=True).strip() for row in ids]
                new = {index: (texts[row], len(ids[row])) for row, index in enumerate(batch)}
                found |= new
                if keep is not None:
                    keep(new)
            bar.update(len(batch))
    return [
        Answer(item, found[index][0], found[index][1], found[index][1] < max_new_tokens)
        for index, item in enumerate(items)
    ]


def check_lengths(items: Sequence[Item], prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int) -> None:
    """Raises BimedixError if a conversation leaves no room for its answer."""
    longest = max(range(len(items)), key=lambda index: len(prompts[index]))
    if len(prompts[longest]) > context - max_new_tokens:
        raise BimedixError(
            f"{items[longest].id} has {len(prompts[longest])} tokens, and the model's context of {context} has room "
            f"for {max(context - max_new_tokens, 0)} besides an answer of {max_new_tokens}; lower --max-new-tokens or "
            "leave the record out"
        )


def plan_of(plan: AnyPlan, model: Mixtral, tokenizer: Tokenizer, batch: Sequence[Item]) -> Any:
    """The plan of a batch; rules know the language, kind and roles of its conversations."""
    if not isinstance(plan, Rules):
        return plan
    sources = [
        Source(
            item.id,
            item.language,
            item.kind,
            roles_of_chat(tokenizer, item.turns, add_generation_prompt=True),
            where="these conversations",
        )
        for item in batch
    ]
    return plan.planner(model.config, sources)


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Scores by group: chrF and ROUGE-L where there are references, and the share of answers in the right language."""
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        for group in answer.item.groups:
            groups.setdefault(group, []).append(answer)
    return {name: scores_of(found) for name, found in sorted(groups.items())}


def scores_of(answers: Sequence[Answer]) -> dict[str, Any]:
    """The scores of one group; chrF is that of the corpus, ROUGE-L a mean with a 95 % interval over records, whose
    ends are None for few records."""
    row: dict[str, Any] = {
        "n": len(answers),
        "records": len({answer.item.record for answer in answers}),
        "finished": sum(answer.finished for answer in answers) / len(answers),
        "tokens": sum(answer.tokens for answer in answers) / len(answers),
        "in_language": Accuracy(sum(answer.faithful for answer in answers), len(answers)).to_dict(),
    }
    scored = [(answer, answer.item.reference) for answer in answers if answer.item.reference is not None]
    if scored:
        rouge = [100 * rouge_l(answer.text, reference) for answer, reference in scored]
        ends = mean_interval(rouge, [answer.item.record for answer, _ in scored])
        low, high = ends or (None, None)
        row["chrf"] = chrf([answer.text for answer, _ in scored], [reference for _, reference in scored])
        row["rouge_l"] = {"mean": sum(rouge) / len(rouge), "low": low, "high": high}
    return row
