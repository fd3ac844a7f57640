"""Other orders and wordings of a question, and what is made of their answers. No model runs."""

import dataclasses
from typing import Any

import pytest

from bimedix_jax.data.records import multiple_choice_answer, multiple_choice_question, question_of
from bimedix_jax.evals import variants
from bimedix_jax.evals.multiple_choice import Prediction


@pytest.fixture
def yes_or_no(make_record):
    return make_record("y", "en", "qa", "Abstract: ...\nIs it?", "Answer: no", ("yes", "no"), 1)


def reordered(record, order) -> Any:
    return variants.reordered(record, order)


def answered(record: Any, chosen, letters=True):
    """The prediction of a model that prefers an option, by its text."""
    index = record.choices.index(chosen)
    scores = [0.0 if place == index else -1.0 - place for place in range(len(record.choices))]
    known = (record.id, (record.language,), record.answer)
    return Prediction(*known, scores if letters else None, scores, index, index, 9, record.id)


def test_a_reordered_question_asks_the_same(mcqa):
    record = mcqa[0]
    new = reordered(record, [2, 0, 3, 1])
    assert new.choices == ("vitamin C", "A", "D", "B12")
    assert new.choices[new.answer] == record.choices[record.answer]
    assert question_of(new) == question_of(record)
    assert new.conversations[0].value == multiple_choice_question(question_of(record), new.choices)
    assert variants.reordered(record, [0, 1, 2, 3]) == record
    assert record.conversations[1].value == multiple_choice_answer(record.choices, record.answer, "en")


def test_options_without_letters_have_no_order(yes_or_no, mcqa):
    assert variants.reordered(yes_or_no, [1, 0]) is None
    assert [kind for kind, _ in variants.variants([yes_or_no], 2, True, 0)] == ["wordings"] * 3
    (_, mixed), *_ = variants.variants([yes_or_no, mcqa[0]], 1, False, 0)
    assert mixed.records[0] == yes_or_no
    assert mixed.orders[0] == [0, 1]


def test_orders_depend_on_seed_and_question_only(mcqa):
    first, again = ([one.orders for _, one in variants.variants(mcqa, 3, False, 5)] for _ in range(2))
    assert first == again
    assert first != [one.orders for _, one in variants.variants(mcqa, 3, False, 6)]
    alone = [one.orders[0] for _, one in variants.variants(mcqa[2:], 3, False, 5)]
    assert alone == [orders[2] for orders in first]
    assert first[0] != first[1]


def test_a_wording_is_in_the_language_of_the_question(mcqa):
    found = [one.records for kind, one in variants.variants(mcqa, 0, True, 0) if kind == "wordings"]
    assert len(found) == len(variants.WORDINGS["ar"]) == len(variants.WORDINGS["en"])
    for number, records in enumerate(found):
        for old, new in zip(mcqa, records, strict=True):
            sentence = variants.WORDINGS[old.language][number]
            assert new.conversations[0].value == f"{sentence}\n{old.conversations[0].value}"
            assert (new.choices, new.answer, new.id) == (old.choices, old.answer, old.id)


def test_predictions_are_numbered_as_in_the_original(mcqa):
    record, order = mcqa[0], [2, 0, 3, 1]
    new = answered(reordered(record, order), "B12")
    old = variants.original(new, order)
    assert old.letters is not None
    assert new.letters is not None
    assert (old.chosen, old.chosen_by_text, old.answer) == (1, 1, 2)
    assert old.letters == [new.letters[1], new.letters[3], new.letters[0], new.letters[2]]


def test_a_model_that_reads_is_not_sensitive_and_one_that_says_a_is(mcqa):
    right = {record.id: record.choices[record.answer] for record in mcqa}

    def reads(_, records):
        return [answered(record, right[record.id]) for record in records]

    def says_a(_, records):
        return [answered(record, record.choices[0]) for record in records]

    result, found = variants.sensitivity("set", mcqa, reads("", mcqa), reads, 4, True, 0)
    for kind in ("orders", "wordings"):
        assert result[kind]["accuracies"] == [1.0] * (5 if kind == "orders" else 4)
        assert (result[kind]["same"], result[kind]["sd"]) == (1.0, 0.0)
    assert list(found) == [f"set@orders-{n}" for n in (1, 2, 3, 4)] + [f"set@wordings-{n}" for n in (1, 2, 3)]
    assert result["orders"]["places"]["chosen"] == result["orders"]["places"]["right"]
    result, found = variants.sensitivity("set", mcqa, says_a("", mcqa), says_a, 4, False, 0)
    assert list(result) == ["orders"]
    assert result["orders"]["places"]["chosen"] == [1.0, 0.0, 0.0, 0.0]
    assert result["orders"]["same"] < 1
    assert result["orders"]["lowest"] == min(result["orders"]["accuracies"])
    changed = [one.chosen for one in found["set@orders-1"]]
    expected = [variants.order_of(record, 1, 0)[0] for record in mcqa]
    assert changed == expected


def test_spread_by_hand(mcqa):
    forms = [[answered(record, record.choices[index]) for record in mcqa[:2]] for index in (0, 1)]
    forms.append([dataclasses.replace(forms[0][0], chosen=2), forms[0][1]])
    found = variants.spread(forms)  # right answers 2 and 0
    assert found["accuracies"] == [0.5, 0.0, 1.0]
    assert (found["lowest"], found["highest"], found["same"]) == (0.0, 1.0, 0.0)
    assert found["sd"] == pytest.approx(0.5)


def test_questions_that_are_too_long_in_a_form_are_left_out_of_all(mcqa):
    def score(label, records):
        kept = records[1:] if label.endswith("-2") else records
        return [answered(record, record.choices[0]) for record in kept]

    result, found = variants.sensitivity("set", mcqa, score("", mcqa), score, 2, False, 0)
    assert result["orders"]["n"] == len(mcqa) - 1
    assert len(found["set@orders-1"]) == len(mcqa)
