"""Multiple choice by log-likelihood: the model's choice is its most likely option, and nothing is generated.

A question is formatted as in training: the human turn in the chat template, then an assistant turn that begins with
"Answer:" or "الإجابة:". The prompt runs once, and two kinds of continuations are scored after it:

- letter: the letter of the option (" B"), for questions whose human turn lists lettered options;
- text: the text of the option, with its log-likelihood divided by its UTF-8 bytes, so that long options are not
  penalised.

The headline accuracy is by letter if options have letters. Otherwise (PubMedQA's yes, no, maybe) it is by the
log-likelihood of the text, not divided, like `acc` in lm-evaluation-harness.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from bimedix_jax.data.encoding import encode_chat
from bimedix_jax.data.records import ANSWER_PREFIX, LETTERS, Record, Turn
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.data.vocabulary import require_ids
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.accuracy import Accuracy, ties
from bimedix_jax.evals.journal import Part
from bimedix_jax.inference.padding import bucket, by_length, pad_left, pad_right, part_of
from bimedix_jax.inference.planning import AnyPlan, Plans, Rules, Tokens, source_of
from bimedix_jax.inference.scoring import prefill, score_continuations
from bimedix_jax.models.attention import KVCache
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
      batch_tokens: tokens run at a time; it affects speed and memory only.
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
    numbered = [(number, question) for number, question in enumerate(questions) if question.length <= longest]
    too_long = _count([group for question in questions if question.length > longest for group in question.groups])
    if not numbered:
        raise BimedixError(f"there is no question of at most {longest} tokens; give others or a longer max_length")
    fitting = [question for _, question in numbered]
    ids = (ids for question in fitting for ids in (question.prompt, *question.candidates))
    require_ids(ids, model.config.vocab_size)
    if isinstance(plan, Rules):
        plans = Plans(plan.planner(model.config, [source_of(one, tokenizer, asked=True) for one in records]), model)
    else:
        longest_one = max(question.length for question in fitting)
        plans = Plans(checked_plan(plan, model.config, len(questions), longest_one), model)
    scorer = _Scorer(*nnx.split(model), plans, record, longest)
    predictions, routings = dict[int, Prediction](), dict[int, QuestionRouting | None]()
    saved = saved or Part()
    with tqdm(total=len(fitting), desc="multiple choice", unit="question", delay=2, disable=None) as bar:
        for batch, rows, columns in by_length(numbered, lambda item: item[1].length, batch_tokens, longest):
            known = [saved.found.get(number) for number, _ in batch]
            scored = [(scores, None) for scores in known if scores is not None]
            if len(scored) < len(batch):
                scored = scorer.score(batch, rows, columns)
            for (number, question), (scores, routing) in zip(batch, scored, strict=True):
                predictions[number] = _predict(question, scores)
                routings[number] = routing
            if None in known:
                saved.write({number: scores for (number, _), (scores, _) in zip(batch, scored, strict=True)})
            bar.update(len(batch))
    found = [routing for number, _ in numbered if (routing := routings[number]) is not None]
    return _tally(
        fitting, [predictions[number] for number, _ in numbered], too_long, None if record == "none" else found
    )


Scored = tuple[list[float], QuestionRouting | None]
"""(log p of each candidate, what the routers did)."""


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """A model that scores questions. A prompt runs once; candidates of one token need no further run."""

    graph: nnx.GraphDef
    weights: nnx.State
    plans: Plans
    record: RecordKind
    longest: int

    def score(self, batch: Sequence[tuple[int, Question]], rows: int, columns: int) -> list[Scored]:
        """Scores each (row of the plan, question) of a batch that is padded to `rows` and about `columns`."""
        questions = [question for _, question in batch]
        width = bucket(max(len(ids) for question in questions for ids in question.candidates), smallest=4)
        columns = min(columns, self.longest - width)
        if (
            max(len(question.prompt) for question in questions) > columns
        ):  # lengths are not rounded up at the end of the context
            if len(batch) > 1:
                return [self.score([item], 1, columns)[0] for item in batch]
            columns = len(questions[0].prompt)
            width = questions[0].length - columns
        filled = [question.prompt for question in questions] + [[]] * (rows - len(batch))
        numbers_B = np.array([number for number, _ in batch] + [0] * (rows - len(batch)), np.int32)
        lengths_B = np.array([len(ids) for ids in filled], np.int32)
        prompts_BT, ids_BT = pad_left(filled, columns)
        positions_BT = np.arange(columns)[None] - (columns - lengths_B)[:, None]
        caches: dict[str, KVCache] = {}

        def read_prompts(name: str, graph: nnx.GraphDef, weights: nnx.State, free: RoutingPlan) -> Routing | None:
            caches[name], _, found = prefill(graph, weights, prompts_BT, ids_BT, free, columns + width, "choices")
            return found

        own = self.plans.of(Tokens(prompts_BT, numbers_B[:, None], positions_BT), read_prompts)
        kept = self.plans.record(self.record)
        cache, first_BV, routing = prefill(self.graph, self.weights, prompts_BT, ids_BT, own, columns + width, kept)
        first = np.asarray(first_BV, np.float64)
        scores = [[float(first[row, ids[0]]) for ids in question.candidates] for row, question in enumerate(questions)]
        routings: list[list[Routing | None]] = [[None] * len(question.candidates) for question in questions]
        longer = [
            (row, index, ids)
            for row, question in enumerate(questions)
            for index, ids in enumerate(question.candidates)
            if len(ids) > 1
        ]
        for start in range(0, len(longer), rows):
            part = longer[start : start + rows]
            rows_R = np.array([row for row, *_ in part] + [0] * (rows - len(part)), np.int32)
            tokens_RT, ids_RT = pad_right([ids for *_, ids in part] + [[]] * (rows - len(part)), width)
            logprobs_RT, read = self.continuations(cache, caches, rows_R, tokens_RT, ids_RT, numbers_B, lengths_B)
            rest = np.asarray(logprobs_RT, np.float64)
            for place, (row, index, ids) in enumerate(part):
                scores[row][index] += float(rest[place, : len(ids) - 1].sum())
                routings[row][index] = None if read is None else part_of(read, place, 0, len(ids) - 1)
        asked = None if self.record == "none" else routing
        return [(scores[i], self._routing(asked, i, columns, lengths_B, routings[i])) for i in range(len(batch))]

    def continuations(
        self,
        cache: KVCache,
        caches: dict[str, KVCache],
        rows_R: np.ndarray,
        tokens_RT: np.ndarray,
        ids_RT: np.ndarray,
        numbers_B: np.ndarray,
        lengths_B: np.ndarray,
    ) -> tuple[jax.Array, Routing | None]:
        """`score_continuations` of candidates under the plan for their tokens."""
        positions_RT = lengths_B[rows_R][:, None] + np.arange(tokens_RT.shape[1])[None]
        tokens = Tokens(tokens_RT, numbers_B[rows_R][:, None], np.where(ids_RT != 0, positions_RT, -1))
        own = self.plans.of(
            tokens,
            lambda name, graph, weights, free: score_continuations(
                graph, weights, caches[name], rows_R, tokens_RT, ids_RT, free, "choices"
            )[1],
        )
        kept = self.plans.record(self.record)
        found, read = score_continuations(self.graph, self.weights, cache, rows_R, tokens_RT, ids_RT, own, kept)
        return found, None if self.record == "none" else read

    @staticmethod
    def _routing(
        routing: Routing | None, row: int, columns: int, lengths_B: np.ndarray, candidates: list[Routing | None]
    ) -> QuestionRouting | None:
        if routing is None:
            return None
        length = int(lengths_B[row])
        return QuestionRouting(part_of(routing, row, columns - length, length), tuple(candidates))


def _predict(question: Question, scores: list[float]) -> Prediction:
    options = len(question.text_bytes)
    letters = scores[:options] if question.lettered else None
    texts = scores[-options:]
    if not np.isfinite(scores).all():  # argmax would choose NaN
        raise BimedixError(
            f"a likelihood of question {question.id} is not finite: the model computes NaN or infinity; check its "
            "weights, or load it with base float32"
        )
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
