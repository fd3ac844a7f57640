"""Evaluation questions that a training set contains, question by question."""

import pytest

from bimedix_jax.curation.contamination import Seen, seen
from bimedix_jax.data.records import Record, conversation, multiple_choice_answer, multiple_choice_question

LONG = (
    "A 45-year-old woman comes to the physician because of a six month history of fatigue, weight gain and intolerance "
    "to cold; on examination her skin is dry and the thyroid gland is diffusely enlarged"
)
HALF = " ".join(LONG.split()[:24])


def question(name, text, choices=("one", "two")):
    asked, said = multiple_choice_question(text, choices), multiple_choice_answer(choices, 0, "en")
    about = {"id": name, "language": "en", "kind": "mcqa", "source": "s", "licence": "l"}
    return Record(**about, conversations=conversation(asked, said), choices=choices, answer=0)


def text(name, asked, said="It depends.", **provenance):
    about = {"id": name, "language": "en", "kind": "qa", "source": "s", "licence": "l", "provenance": provenance}
    return Record(**about, conversations=conversation(asked, said))


QUESTIONS = [question("q0", LONG), question("q1", "What causes scurvy?"), question("q2", LONG, ("x", "y"))]


def test_nothing_is_seen_in_other_texts():
    assert seen(QUESTIONS, [text("t", "What causes gout?"), text("u", "Why?", LONG.split(";")[1])]) == {}


def test_the_same_question_with_other_options_is_seen():
    found = seen(QUESTIONS, [text("t0", "Hello?"), text("t1", LONG.upper())])
    assert found == {0: Seen("question", 1.0, "t1"), 2: Seen("question", 1.0, "t1")}


def test_a_question_inside_an_answer_is_seen_by_its_words():
    found = seen(QUESTIONS, [text("t", "Tell me a case.", f"Here is one. {HALF} and so on.")])
    assert set(found) == {0, 2}
    assert found[0].by == "words"
    assert found[0].share == pytest.approx((24 - 7) / (len(LONG.split()) - 7), abs=0.05)


def test_what_was_made_from_a_question_is_seen():
    assert seen(QUESTIONS, [text("t", "Doctor?", translation_of="q1")]) == {1: Seen("id", 1.0, "t")}


def test_the_strongest_overlap_counts():
    texts = [text("weak", "Tell me a case.", HALF), text("strong", LONG), text("weak", "Another case?", HALF)]
    assert seen(QUESTIONS, texts)[0] == Seen("question", 1.0, "strong")
