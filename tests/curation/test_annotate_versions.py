"""Paid work stays valid: request keys and the behaviour of the rules change only on purpose.

The store finds a reply by its request's key, and an outcome by the version of the rules. Comments, docstrings and moved
code must change neither. New behaviour of the rules needs a new version, or old outcomes would count as current.
"""

import asyncio
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from bimedix_jax.commands import data_chats, data_translate
from bimedix_jax.curation.annotate.chat_rules import support, unsuitable
from bimedix_jax.curation.annotate.chat_shapes import ChatStyle, draw
from bimedix_jax.curation.annotate.job import Job
from bimedix_jax.curation.annotate.task import Task, annotate_record
from bimedix_jax.curation.checks.api import check
from bimedix_jax.curation.checks.batch import Batch
from bimedix_jax.curation.llm.config import LlmConfig
from bimedix_jax.curation.llm.outcomes import Attempt, judge_attempts
from bimedix_jax.curation.llm.prompts import load_prompts
from bimedix_jax.curation.llm.request import Reply, Request
from bimedix_jax.curation.llm.scores import parse_score
from bimedix_jax.curation.structure import split_record
from bimedix_jax.data.records import Record, conversation, multiple_choice_answer, multiple_choice_question, sample

MODEL = LlmConfig(model="m")
CHOICES = ("Vitamin D", "Vitamin C", "Iron")
SCURVY = Record(
    id="r1",
    language="en",
    kind="mcqa",
    source="test",
    licence="CC0-1.0",
    specialty="nutrition",
    conversations=conversation(
        multiple_choice_question("A sailor of 40 bleeds from the gums. Which <b>vitamin</b> is missing?", CHOICES),
        multiple_choice_answer(CHOICES, 1, "en", "Scurvy follows 2-3 months without fresh fruit."),
    ),
    choices=CHOICES,
    answer=1,
)


def tasks() -> dict[str, Task[Any]]:
    options: dict[str, Any] = {"sources": ("sample",), "out": Path(), "llm": MODEL}
    return {
        "translate": data_translate.task_of(data_translate.Config(**options)),
        "chats": data_chats.task_of(data_chats.Config(**options)),
    }


class Script:
    """A client that answers from a list of replies, and checks them as the real one does."""

    def __init__(self, replies: Sequence[str]) -> None:
        self.config = MODEL
        self.replies = list(replies)
        self.keys: list[str] = []

    async def ask(self, request: Request) -> Reply:
        self.keys.append(request.key(MODEL))
        attempts = [Attempt("reply", 200, text=self.replies.pop(0))]
        while (reply := judge_attempts(attempts, request, MODEL.reasks, cached=False)) is None:
            attempts.append(attempts[0])
        return reply


def run(task: Task[Any], record: Record, replies: Sequence[Any], judgements: Sequence[Any]) -> tuple[Any, list[str]]:
    """The outcome and the keys of all requests."""
    writer, judge = (Script([json.dumps(reply) for reply in listed]) for listed in (replies, judgements))
    outcome = asyncio.run(annotate_record(task, record, writer, judge))  # type: ignore[arg-type]
    return outcome.model_dump(mode="json", by_alias=True), writer.keys + judge.keys


def arabic(sentence: str) -> dict[str, Any]:
    """A translation of SCURVY with this explanation."""
    texts = {
        "choiceA": "فيتامين D",
        "choiceB": "فيتامين C",
        "choiceC": "الحديد",
        "t1": "بحار عمره 40 عاما تنزف لثته. أي <b>فيتامين</b> ينقصه؟",
        "t2": sentence,
    }
    return {"segments": [{"id": name, "text": text} for name, text in texts.items()]}


def chat(shape: Iterable[str], concludes: str) -> dict[str, Any]:
    """A chat in English with a turn of the patient and one of the doctor for each word of `shape`."""
    turns = []
    for number, word in enumerate(shape):
        doctor = {
            "ask": "Since when is it so, and do you eat fruit ({n})?",
            "answer": concludes,
            "end": "Yes, take it.",
        }
        turns.append(
            {"speaker": "patient", "language": "en", "text": f"My gums bleed, doctor, and part {number} hurts."}
        )
        turns.append({"speaker": "doctor", "language": "en", "text": doctor[word].format(n=number)})
    return {"turns": turns}


def translate_cases() -> list[Any]:
    good = "ينشأ الإسقربوط بعد 2-3 أشهر بدون فاكهة طازجة."
    wrong = "ينشأ الإسقربوط بعد 5 أشهر."
    scores = [{"problems": ["a term"], "score": score} for score in (70, "٨٠", "90/100", "good")]
    return [
        run(tasks()["translate"], SCURVY, [arabic(good)], [scores[2]]),
        run(tasks()["translate"], SCURVY, [arabic(wrong), arabic(good)], [scores[0], scores[2]]),
        run(tasks()["translate"], SCURVY, [arabic(good), arabic(wrong), arabic(good)], [scores[1], scores[0]]),
        run(tasks()["translate"], SCURVY, [arabic(good), {"segments": []}], [scores[3]]),
    ]


def chat_cases() -> list[Any]:
    task = tasks()["chats"]
    record = SCURVY.model_copy(update={"id": "r5"})
    shape = [turn["purpose"] for turn in task.case(record).shape.turns()[1::2]]  # type: ignore[attr-defined]
    words = ["ask" if "asks" in p else "answer" if p.startswith("gives") else "end" for p in shape]
    good, wrong = chat(words, "You lack vitamin C."), chat(words, "Option B is right, so take iron.")
    judged = [{"choice": c, "problems": ["stiff"], "score": s} for c, s in (("B", 90), ("A", 90), ("b.", 50))]
    return [
        run(task, record, [good], [judged[0]]),
        run(task, record, [wrong, good], [judged[1], judged[0]]),
        run(task, record, [{"turns": []}, good, good], [judged[2]]),
        run(task, record, [chat(words[:-1], "You lack vitamin C."), good, wrong], judged[::-1]),
    ]


def digest(value: Any) -> str:
    def plain(item: Any) -> Any:
        if isinstance(item, BaseModel):
            return item.model_dump(mode="json", by_alias=True)
        return dataclasses.asdict(item)

    text = json.dumps(value, default=plain, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def behaviour() -> dict[str, dict[str, str]]:
    """What the rules of each task do with fixed cases, as digests."""
    english = [record for record in sample() if record.language == "en"]
    frames = [split_record(record) for record in english]
    upper = [frame.rebuild({part.id: part.text.upper() for part in frame.segments}, {}) for frame in frames]
    pairs = [(frame.record, record) for frame, record in zip(frames, upper, strict=True)]
    answers = [str(turn.value) for record in english for turn in record.conversations if turn.speaker == "gpt"]
    batch = Batch((text, text[:40]) for text in answers)
    exams = [record for record in sample() if record.kind == "mcqa"]
    spelled = [85, 87.5, "85/100", "٨٥", "٨٧٫٥ %", "8.5/10", "good", None, True, -1, 101]
    shared = {"scores": digest([parse_score(value) for value in spelled])}
    return {
        "translate": {
            **shared,
            "segments": digest([[frame.segments, frame.turns, frame.choices] for frame in frames]),
            "records": digest(upper),
            "flags": digest([list(check(*pair)) for pair in pairs]),
            "same text": digest([batch.check(text, text[:40]) for text in answers]),
            "outcomes": digest([outcome for outcome, _ in translate_cases()]),
        },
        "chats": {
            **shared,
            "unsuitable": digest([unsuitable(record) for record in exams]),
            "support": digest([support(choice, text) for text in answers[:40] for choice in (exams[0].choices or ())]),
            "shapes": digest([draw(record, ChatStyle()).turns() for record in exams]),
            "outcomes": digest([outcome for outcome, _ in chat_cases()]),
        },
    }


BEHAVIOUR: dict[tuple[str, int], dict[str, str]] = {
    ("translate", 1): {
        "scores": "574a805fa11bea29",
        "segments": "b3e088e1d83c825d",
        "records": "b9cd186fafc78b18",
        "flags": "d1b50fd243c032ec",
        "same text": "80403c1f44b9e267",
        "outcomes": "37cdf0fcff3037c7",
    },
    ("translate", 2): {  # question and choices are checked one by one; symbols, Latin words, unrelated texts, order
        "scores": "574a805fa11bea29",
        "segments": "b3e088e1d83c825d",
        "records": "b9cd186fafc78b18",
        "flags": "7238e4f36534148b",
        "same text": "80403c1f44b9e267",
        "outcomes": "37cdf0fcff3037c7",
    },
    ("chats", 1): {
        "scores": "574a805fa11bea29",
        "unsuitable": "649a093c2f329a4b",
        "support": "bf1ad4ed99bfd1b4",
        "shapes": "860d0b21cf920c7c",
        "outcomes": "59e6af231e868b0d",
    },
}
"""Task and version of its rules -> digests of `behaviour`. Add a line for a new version; never change an old one."""

KEYS = {
    "translate": [
        "54a16a468b2f266b",
        "3d0e59c4ac2b7e0b",
        "54a16a468b2f266b",
        "5e47ae258471f51c",
        "e1a2fbd332d49b27",
        "ef4ac60319343956",
        "54a16a468b2f266b",
        "9fdc1b6348aed287",
        "a60c75f64b2790d6",
        "3d0e59c4ac2b7e0b",
        "e3fd49228260abd2",
        "54a16a468b2f266b",
        "363f2c878b8c04c8",
        "3d0e59c4ac2b7e0b",
    ],
    "chats": [
        "64f60a6c25795a8a",
        "679818be749c9fa3",
        "64f60a6c25795a8a",
        "a57fc5d4c6fa0aab",
        "87e23bf386a1b0ef",
        "8fd586e3603f0ca5",
        "64f60a6c25795a8a",
        "9a7634f804ea1611",
        "d3a4b6e65dd2db57",
        "8fd586e3603f0ca5",
        "64f60a6c25795a8a",
        "aff150299683d77c",
        "e4b2bf2e5a4f9b73",
        "58965d7eb07200ab",
        "8fd586e3603f0ca5",
        "6ed938b6ee8a788c",
    ],
}
"""The keys under which stores hold the replies to the fixed cases.

A refinement names the flags of its draft. Another wording of a flag therefore changes the keys of such refinements.
"""


@pytest.mark.parametrize("name", ["translate", "chats"])
def test_the_behaviour_of_the_rules_changes_only_with_their_version(name):
    version = tasks()[name].version
    assert behaviour()[name] == BEHAVIOUR.get((name, version)), (
        f"the rules of `{name}` give other outcomes: raise `version` of its task in curation/annotate (now {version}) "
        "and add the new digests to BEHAVIOUR"
    )


def test_replies_of_older_stores_are_found():
    """A changed key would ask and pay again for every reply."""
    found = {"translate": translate_cases(), "chats": chat_cases()}
    assert {name: [key[:16] for _, keys in cases for key in keys] for name, cases in found.items()} == KEYS


def test_a_new_version_computes_outcomes_anew_and_keeps_replies(monkeypatch):
    for task in tasks().values():
        job = Job(records=lambda: iter([SCURVY]), task=task, writer=MODEL, judge=MODEL)
        outcome, request = job.result_key(SCURVY), task.case(SCURVY).write_request(0, (), None).key(MODEL)
        monkeypatch.setattr(type(task), "version", task.version + 1)
        new = Job(records=job.records, task=task, writer=MODEL, judge=MODEL)
        assert new.result_key(SCURVY) != outcome
        assert task.case(SCURVY).write_request(0, (), None).key(MODEL) == request


def test_a_comment_in_a_prompt_changes_no_key(tmp_path):
    shipped = load_prompts("judge")
    (tmp_path / "judge").mkdir()
    text = dict(shipped.templates)["judge"]
    (tmp_path / "judge" / "judge.txt").write_text("{# why this order #}\n" + text, encoding="utf-8")
    own = load_prompts("judge", tmp_path)
    assert own.own == ("judge",)
    assert own.hash == shipped.hash
    assert own.render("judge", pairs="x") == shipped.render("judge", pairs="x")
