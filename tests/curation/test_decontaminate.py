"""Evaluation text is found in training records, whatever form it has there."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bimedix_jax.curation import fingerprints
from bimedix_jax.curation.mix import decontaminate
from bimedix_jax.curation.mix.decontaminate import BENCHMARKS, EvaluationIndex, Hit, build_index, families
from bimedix_jax.data.records import Record, conversation, multiple_choice_answer, multiple_choice_question
from bimedix_jax.errors import BimedixError

LONG = (
    "A 45-year-old woman comes to the physician because of a six month history of fatigue, weight gain and intolerance "
    "to cold; on examination her skin is dry and the thyroid gland is diffusely enlarged"
)
ARABIC = (
    "امرأة تبلغ من العمر خمسة وأربعين عامًا تشكو من التعب وزيادة الوزن وعدم تحمل البرد منذ ستة أشهر "
    "وعند الفحص كان جلدها جافًا وغدتها الدرقية متضخمة"
)
SHORT = "What causes scurvy?"
MIDDLE = "Which of the following is the most common cause of liver cirrhosis worldwide?"


def record(name: str, asked: str, said: str = "It depends.", kind: Any = "qa", **more: Any) -> Record:
    language = "ar" if any("\u0600" <= letter <= "\u06ff" for letter in asked) else "en"
    return Record(
        id=name,
        language=language,
        kind=kind,
        source="s",
        licence="l",
        conversations=conversation(asked, said),
        **more,
    )


def mcqa(name: str, question: str, choices: tuple[str, ...] = ("one", "two"), **more: Any) -> Record:
    asked, said = multiple_choice_question(question, choices), multiple_choice_answer(choices, 0, "en")
    return record(name, asked, said, "mcqa", choices=choices, answer=0, **more)


EVALUATION = [mcqa("e/0", LONG), mcqa("e/1", SHORT), mcqa("e/2", MIDDLE), mcqa("e/3", ARABIC)]


@pytest.fixture(scope="module")
def index() -> EvaluationIndex:
    return build_index(EVALUATION, ngram=8, share=0.5)


def find(index: EvaluationIndex, one: Record) -> Hit | None:
    said = "\n".join(turn.value for turn in one.conversations)
    return index.find(7, one, fingerprints.words(said))


def test_a_copied_question_is_found_in_any_position_and_spelling(index: EvaluationIndex) -> None:
    """In a question, in an answer, with other choices, in upper case, and in another Arabic spelling."""
    for asked, said in ((LONG, "Yes."), ("Tell me a case.", f"Here is one: {LONG}!"), (LONG.upper(), "No.")):
        hit = find(index, record("r", asked, said))
        assert hit is not None
        assert (hit.row, hit.evaluation) == (7, 0)
    hit = find(index, mcqa("r", LONG, ("other", "choices")))
    assert hit == Hit(7, 0, "question", 1.0)
    hit = find(index, record("r", "سؤال: " + ARABIC.replace("أ", "ا") + " ما التشخيص؟"))
    assert hit == Hit(7, 3, "words", 1.0)


def test_half_of_a_long_question_is_contamination_and_a_third_is_not(index: EvaluationIndex) -> None:
    words = LONG.split()
    hit = find(index, record("r", "Case: " + " ".join(words[: len(words) * 2 // 3])))
    assert hit is not None
    assert (hit.evaluation, hit.by) == (0, "words")
    assert 0.5 <= hit.share < 1
    assert find(index, record("r", "Case: " + " ".join(words[: len(words) // 3]))) is None


def test_a_short_question_must_be_contained_completely(index: EvaluationIndex) -> None:
    """Short questions begin alike: nine of the twelve words of MIDDLE are common to many questions."""
    other = MIDDLE.replace("liver cirrhosis", "acute pancreatitis")
    assert find(index, mcqa("r", other)) is None
    assert find(index, record("r", f"{MIDDLE} Explain.")) == Hit(7, 2, "words", 1.0)
    assert find(index, mcqa("r", SHORT)) == Hit(7, 1, "question", 1.0)
    assert find(index, record("r", f"{SHORT} And what cures it?")) is None


def test_ids_and_records_made_from_evaluation_are_found(index: EvaluationIndex) -> None:
    assert find(index, record("e/2", "Something else?")) == Hit(7, 2, "id", 1.0)
    for key in decontaminate.MADE_FROM:
        assert find(index, record("r", "Something else?", provenance={key: "e/0"})) == Hit(7, 0, "id", 1.0)
    abstract = build_index([record("p/1", "Is it so?", provenance={"pmid": "123"})], 8, 0.5)
    assert find(abstract, record("r", "Something?", provenance={"pmid": "123"})) == Hit(7, 0, "id", 1.0)


def test_the_text_that_a_question_is_about_is_compared() -> None:
    evaluation = record("p/1", f"Abstract: {LONG}.\nQuestion: Is it so?", provenance={"question": "Is it so?"})
    hit = find(build_index([evaluation], 8, 0.5), record("r", f"Abstract: {LONG}.\nQuestion: Was it otherwise?"))
    assert hit is not None
    assert hit.by == "words"


def test_unrelated_records_are_kept(index: EvaluationIndex) -> None:
    assert (
        find(index, record("r", "How is asthma treated?", "With inhaled corticosteroids and bronchodilators.")) is None
    )
    assert find(index, record("r", "...", "!!!")) is None
    nothing = build_index([], 8, 0.5)
    assert find(nothing, record("r", LONG)) is None


def digests(names: list[str]) -> np.ndarray:
    return np.array([fingerprints.digest(name) if name else 0 for name in names], np.uint64)


def removed(rows: list[tuple[str, str, str]], direct: set[str], known: list[str]) -> set[str]:
    """Rows are (id, source_id, translation_of)."""
    names, *parents = (list(column) for column in zip(*rows, strict=True))
    hit = np.array([name in direct for name in names])
    found = families(digests(names), np.stack([digests(column) for column in parents]), hit, digests(known))
    return {name for name, gone in zip(names, found.tolist(), strict=True) if gone}


def test_families_are_removed_together() -> None:
    rows = [
        ("q1", "", ""),
        ("q1/ar", "", "q1"),
        ("chat1", "q1", ""),
        ("chat1/ar", "q1", "chat1"),
        ("q2", "", ""),
        ("q2/ar", "", "q2"),
    ]
    family = {"q1", "q1/ar", "chat1", "chat1/ar"}
    for direct in family:
        assert removed(rows, {direct}, []) == family
    assert removed(rows, set(), []) == set()
    assert removed(rows, set(), ["q2"]) == {"q2", "q2/ar"}, "a translation of an evaluation question"
    assert removed([("a/ar", "", "gone"), ("b/ar", "", "gone"), ("c", "", "")], {"a/ar"}, []) == {"a/ar", "b/ar"}


@given(links=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12), start=st.integers(0, 9))
def test_a_family_is_a_connected_component(links: list[tuple[int, int]], start: int) -> None:
    parent = {f"n{child}": f"n{origin}" for child, origin in links if child != origin}
    rows = [(f"n{i}", parent.get(f"n{i}", ""), "") for i in range(10)]
    connected, fresh = set(), {f"n{start}"}
    while fresh:
        connected |= fresh
        fresh = {b for a in fresh for b, origin in parent.items() if origin == a} | {
            parent[a] for a in fresh & set(parent)
        }
        fresh -= connected
    assert removed(rows, {f"n{start}"}, []) == connected


def test_benchmarks_match_the_nine_tasks(tmp_path: Path) -> None:
    """Reads the table of tasks as text, since its module imports JAX."""
    table = (Path(decontaminate.__file__).parents[2] / "evals" / "tasks.py").read_text()
    readers = re.findall(r'^    "\w+": Task\("\w+", "(\w+)"', table, re.MULTILINE)
    assert len(readers) == 9
    assert set(BENCHMARKS) == set(readers)
    with pytest.raises(BimedixError, match="lacks the folder mmlu_medical_en"):
        decontaminate.benchmark_sources(tmp_path)
    for name in BENCHMARKS:
        (tmp_path / name).mkdir()
    assert decontaminate.benchmark_sources(tmp_path)[0] == f"mmlu_medical_en={tmp_path}/mmlu_medical_en"
