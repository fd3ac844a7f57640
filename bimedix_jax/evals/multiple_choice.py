"""Multiple choice by log-likelihood: the model's choice is its most likely option, and nothing is generated.

A question is formatted as in training: the human turn in the chat template, then an assistant turn that begins with
"Answer:" or "الإجابة:". Two kinds of continuations are scored after it:

- letter: the letter of the option (" B"), for questions whose human turn lists lettered options;
- text: the text of the option, with its log-likelihood divided by its UTF-8 bytes, so that long options are not
  penalised.

The headline accuracy is by letter if options have letters. Otherwise (PubMedQA's yes, no, maybe) it is by the
log-likelihood of the text, not divided, like `acc` in lm-evaluation-harness.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from bimedix_jax.data.encoding import encode_chat
from bimedix_jax.data.records import ANSWER_PREFIX, LETTERS, Record, Turn
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.accuracy import Accuracy, ties
from bimedix_jax.evals.journal import Part
from bimedix_jax.inference.continuations import Continuations, Group, Key, Routes, Scored
from bimedix_jax.inference.planning import AnyPlan, Planner, Rules, source_of
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import Record as RecordKind
from bimedix_jax.models.routers import Routing, RoutingPlan, checked_plan


@dataclasses.dataclass(frozen=True)
class Question:
    """A record ready to score.

    Attributes:
      groups: the groups it belongs to: its language, and the language with its subject or specialty.
      prompt: tokens up to and including the opening words of the answer.
      candidates: tokens of each option's letter (if it has letters), then of each option's text.
      text_bytes: UTF-8 bytes of each option's text.
      asked_bytes: UTF-8 bytes of what the human asks.
      pair: id that a question has in common with its translation.
    """

    id: str
    groups: tuple[str, ...]
    answer: int
    prompt: list[int]
    candidates: list[list[int]]
    text_bytes: list[int]
    lettered: bool
    asked_bytes: int
    pair: str

    @property
    def length(self) -> int:
        """Tokens of the prompt and its longest candidate."""
        return len(self.prompt) + max(map(len, self.candidates))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The result of one question: log p of each option, in nats.

    Attributes:
      groups: as the question's.
      letters: log p of the letters; None if options have none.
      texts: log p of the texts of the options.
      chosen, chosen_by_text: index of the option with the highest score for the headline accuracy, and by text per
        byte.
      asked_bytes, pair: as the question's.
    """

    id: str
    groups: tuple[str, ...]
    answer: int
    letters: list[float] | None
    texts: list[float]
    chosen: int
    chosen_by_text: int
    asked_bytes: int
    pair: str

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        return {
            "id": self.id,
            "language": self.groups[0],
            "groups": list(self.groups),
            "answer": self.answer,
            "chosen": self.chosen,
            "chosen_by_text": self.chosen_by_text,
            "correct": self.chosen == self.answer,
            "letter_logprobs": self.letters,
            "text_logprobs": self.texts,
            "asked_bytes": self.asked_bytes,
            "pair": self.pair,
        }


@dataclasses.dataclass(frozen=True)
class QuestionRouting:
    """What the routers did for one question, NumPy arrays [L, 1, T, ...].

    Attributes:
      prompt: with the tokens that all candidates share.
      candidates: with those of each candidate except its last token, which the model does not read; None if that is its
        only token.
    """

    prompt: Routing
    candidates: tuple[Routing | None, ...]


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
    """Accuracies by group ("en", "en/anatomy", ...).

    Attributes:
      scores: the headline accuracy.
      scores_by_text: accuracy by the option's text per byte.
      chance: expected accuracy of guessing, by group.
      too_long: by group, questions longer than the maximum, which were not scored; empty if there are none.
      routing: what the routers did, in the order of `predictions`; None unless recorded.
    """

    scores: dict[str, Accuracy]
    scores_by_text: dict[str, Accuracy]
    chance: dict[str, float]
    too_long: dict[str, int]
    predictions: list[Prediction]
    routing: list[QuestionRouting] | None = None

    @property
    def accuracy(self) -> dict[str, float]:
        """The headline accuracy as plain numbers."""
        return {group: score.value for group, score in self.scores.items()}

    def to_dict(self) -> dict[str, Any]:
        """The accuracies for JSON, without the predictions."""
        return {
            "by_group": {group: score.to_dict() for group, score in self.scores.items()},
            "by_group_text": {group: score.to_dict() for group, score in self.scores_by_text.items()},
            "chance": self.chance,
            "too_long": self.too_long,
            "ties": ties((one.groups, one.letters or one.texts) for one in self.predictions),
        }


def question_of(record: Record, tokenizer: Tokenizer) -> Question:
    """`record` as a question.

    Raises:
      BimedixError: the record has no choices.
    """
    if record.choices is None or record.answer is None:
        raise BimedixError(f"record {record.id} has no choices; give multiple-choice records only")
    opening = ANSWER_PREFIX[record.language].rstrip()
    lettered = record.kind == "mcqa"
    letters = list(LETTERS[: len(record.choices)]) if lettered else []
    asked = record.conversations[:-1]
    begun = begin_answer(tokenizer, asked, opening)
    full = [begin_answer(tokenizer, asked, f"{opening} {text}") for text in (*letters, *record.choices)]
    # a tokenizer may merge the end of the opening with what follows, so the prompt is the prefix that all share
    shared = min(_common_prefix(begun, ids) for ids in full)
    subject = record.provenance.get("subject") or record.specialty
    return Question(
        record.id,
        (record.language, *([f"{record.language}/{subject}"] if subject else [])),
        record.answer,
        begun[:shared],
        [ids[shared:] for ids in full],
        [len(choice.encode()) for choice in record.choices],
        lettered,
        sum(len(turn.value.encode()) for turn in asked if turn.speaker == "human"),
        str(record.provenance.get("pair") or record.provenance.get("translation_of") or record.id),
    )


def begin_answer(tokenizer: Tokenizer, asked: Sequence[Turn], words: str) -> list[int]:
    """Tokens of a conversation that ends in an unfinished assistant turn, which begins with `words`."""
    ids, learned = encode_chat(tokenizer, (*asked, Turn(speaker="gpt", value=words)))
    while ids and (not learned[-1] or ids[-1] in tokenizer.special_ids):  # the end of the turn
        ids, learned = ids[:-1], learned[:-1]
    return ids


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def multiple_choice(
    model: Mixtral,
    tokenizer: Tokenizer,
    records: Iterable[Record],
    max_length: int | None = None,
    batch_tokens: int = 4096,
    plan: AnyPlan = None,
    record: RecordKind = "none",
    saved: Part | None = None,
) -> MultipleChoice:
    """Chooses an option for every question and counts the correct ones.

    Args:
      records: records with choices.
      max_length: longest question in tokens, by default the model's context; longer ones are counted and not scored.
      batch_tokens: tokens run at a time; it affects speed, memory and rounding only.
      plan: what the routers are told to do. Its B is 1 or the number of records; its T is 1 or the tokens of the
        longest question with its longest candidate. Or rules; each candidate belongs to the answer.
      record: "choices" or "full" keeps what the routers did, in `routing`.
      saved: likelihoods of an earlier start, and where to save more of them; without a record of routes.

    Raises:
      BimedixError: a record without choices, no question, none that fits, a token id that the model lacks, or a
        likelihood that is not finite.
      ValueError: a plan that does not fit.
    """
    longest = min(max_length or model.config.max_position_embeddings, model.config.max_position_embeddings)
    records = list(records)
    questions = [question_of(one, tokenizer) for one in records]
    fitting = {number: question for number, question in enumerate(questions) if question.length <= longest}
    too_long = _count([group for question in questions if question.length > longest for group in question.groups])
    if not fitting:
        raise BimedixError(f"there is no question of at most {longest} tokens; give others or a longer max_length")
    plans: RoutingPlan | Planner
    if isinstance(plan, Rules):
        plans = plan.planner(model.config, [source_of(one, tokenizer, asked=True) for one in records])
    else:
        longest_one = max(question.length for question in fitting.values())
        plans = checked_plan(plan, model.config, len(questions), longest_one)
    groups = [Group(tuple(one.prompt), tuple(map(tuple, one.candidates))) for one in fitting.values()]
    scorer = Continuations(model, groups, plans, batch_tokens, items=list(fitting), record=record)
    scores, routes = _run(scorer, list(fitting.values()), saved or Part())
    found = list(enumerate(fitting.values()))
    routings = [
        QuestionRouting(prompt, tuple(routes[index, number] for number in range(len(question.candidates))))
        for index, question in found
        if (prompt := routes.get((index, None))) is not None
    ]
    predictions = [
        _predict(question, [scores[index, number] for number in range(len(question.candidates))])
        for index, question in found
    ]
    return _tally(list(fitting.values()), predictions, too_long, None if record == "none" else routings)


def _run(scorer: Continuations, questions: Sequence[Question], saved: Part) -> tuple[dict[Key, float], Routes]:
    """log p of each candidate, by (index of its question, its index), and the record.

    Results are saved under the number that a candidate has among those of all questions.
    """
    first = np.cumsum([0, *(len(question.candidates) for question in questions)]).tolist()
    scores: dict[Key, float] = {}
    routes: Routes = {}
    with tqdm(total=first[-1], desc="multiple choice", unit="candidate", delay=2, disable=None) as bar:
        for batch in scorer.batches:
            numbers = {key: first[key[0]] + key[1] for key in batch.keys}
            if all(number in saved.found for number in numbers.values()):
                scores |= {key: saved.found[number] for key, number in numbers.items()}
            else:
                scored, more = scorer.score_and_record(batch)
                _require_finite(scored, questions)
                scores |= {key: logprob for key, (logprob, _) in scored.items()}
                routes |= more
                saved.write({number: scores[key] for key, number in numbers.items()})
            bar.update(len(numbers))
    return scores, routes


def _require_finite(scored: Mapping[Key, Scored], questions: Sequence[Question]) -> None:
    for (index, _), (logprob, _) in scored.items():
        if not math.isfinite(logprob):  # argmax would choose NaN
            raise BimedixError(
                f"a likelihood of question {questions[index].id} is not finite: the model computes NaN or infinity; "
                "check its weights, or load it with base float32"
            )


def _predict(question: Question, scores: list[float]) -> Prediction:
    options = len(question.text_bytes)
    letters = scores[:options] if question.lettered else None
    texts = scores[-options:]
    per_byte = np.array(texts) / np.array(question.text_bytes)
    chosen = int(np.argmax(texts if letters is None else letters))
    by_text = int(np.argmax(per_byte))
    known = (question.id, question.groups, question.answer)
    return Prediction(*known, letters, texts, chosen, by_text, question.asked_bytes, question.pair)


def _tally(
    questions: Sequence[Question],
    predictions: list[Prediction],
    too_long: dict[str, int],
    routing: list[QuestionRouting] | None,
) -> MultipleChoice:
    totals = _count([group for question in questions for group in question.groups])
    correct, correct_by_text, guesses = dict.fromkeys(totals, 0), dict.fromkeys(totals, 0), dict.fromkeys(totals, 0.0)
    for question, prediction in zip(questions, predictions, strict=True):
        for group in question.groups:
            correct[group] += prediction.chosen == prediction.answer
            correct_by_text[group] += prediction.chosen_by_text == prediction.answer
            guesses[group] += 1 / len(question.text_bytes)
    return MultipleChoice(
        {group: Accuracy(correct[group], total) for group, total in totals.items()},
        {group: Accuracy(correct_by_text[group], total) for group, total in totals.items()},
        {group: guesses[group] / total for group, total in totals.items()},
        too_long,
        predictions,
        routing,
    )


def _count(groups: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for group in groups:
        counts[group] = counts.get(group, 0) + 1
    return dict(sorted(counts.items()))
