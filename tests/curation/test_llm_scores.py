"""Scores and JSON as models write them: what is not clearly one is none."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from bimedix_jax.curation.annotate.translation import Judgement, Segments
from bimedix_jax.curation.llm.config import LlmConfig
from bimedix_jax.curation.llm.outcomes import from_body, parse
from bimedix_jax.curation.llm.request import Request
from bimedix_jax.curation.llm.scores import parse_score


@pytest.mark.parametrize(
    ("written", "score"),
    [
        (85, 85.0),
        (87.5, 87.5),
        ("85/100", 85.0),
        ("85 / 100", 85.0),
        ("٨٥", 85.0),
        ("٨٧٫٥", 87.5),
        ("٨٥/١٠٠", 85.0),
        ("٨٥٪", 85.0),
        ("85 من 100", 85.0),
        (" 85%. ", 85.0),
        ("92 out of 100", 92.0),
        (0, 0.0),
        (100, 100.0),
    ],
)
def test_scores_are_read_in_many_spellings(written, score):
    assert parse_score(written) == score


@pytest.mark.parametrize(
    "written",
    [
        *("-1", -1, 101, "101", "8.5/10", "85/90", "", "high", None, True, [85], float("nan"), float("inf")),
        *("the source says 100/100", "100/100 says the source, I say 40", "85 or 90", "85-90", "+85", "8 5", "1e2"),
    ],
)
def test_values_that_are_no_scores_give_none(written):
    assert parse_score(written) is None


def test_a_quoted_object_is_no_score():
    fair = 'The text says {score: 100} and "score: 100/100". {"problems": ["dose"], "score": 20}'
    judgement, reason = parse(fair, Judgement)
    assert isinstance(judgement, Judgement)
    assert (parse_score(judgement.score), reason) == (20.0, "")
    quoted = 'The patient wrote {"score": 100}. My verdict: {"score": 20}'
    assert parse(quoted, Judgement) == (None, "the reply holds 2 different objects of the schema")
    assert parse("Score: 95", Judgement)[0] is None
    assert parse('{"score": true}', Judgement)[0] is None
    assert parse('{"score": null}', Judgement)[0] is None


@pytest.mark.parametrize("schema", [Judgement, Segments])
def test_schemas_suit_strict_endpoints(schema):
    """Each object closed, each property required; replies may still leave out what has a default."""
    sent = Request("s", "i", 0, (), "p", 10, schema=schema).payload(LlmConfig(model="m"))["response_format"]
    objects = [sent["json_schema"]["schema"], *sent["json_schema"]["schema"].get("$defs", {}).values()]
    for described in objects:
        assert described["additionalProperties"] is False
        assert sorted(described["required"]) == sorted(described["properties"])
    assert parse('{"score": 90, "reason": "fluent"}', Judgement)[0] is not None


class Pair(BaseModel):
    a: int
    b: str


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "b": "x"}',
        'Here it is:\n```json\n{"a": 1, "b": "x"}\n```\nAnything else?',
        '{"a": 1, "b": "x"} {"a": 1, "b": "x"}',
        '{not json} {"a": 1, "b": "x"}',
    ],
)
def test_json_is_found_in_surrounding_text(text):
    assert parse(text, Pair) == (Pair(a=1, b="x"), "")


def test_line_breaks_within_strings_are_read():
    assert parse('{"a": 1, "b": "x\ny"}', Pair)[0] == Pair(a=1, b="x\ny")


@given(
    st.one_of(st.text(), st.text("0123456789٠٥./%٫ -"), st.floats(), st.integers(), st.none(), st.lists(st.integers()))
)
def test_any_text_gives_a_score_from_0_to_100_or_none(written):
    score = parse_score(written)
    assert score is None or 0 <= score <= 100


@given(st.one_of(st.text(), st.text('{}[]":,a1 \\n')))
def test_any_reply_can_be_parsed(text):
    assert (parse(text, Pair)[0] is None) == bool(parse(text, Pair)[1])
    assert from_body(text).ending in ("reply", "bad_body")


def test_deep_nesting_is_handled():
    deep = '{"a":' * 3_000
    assert parse(deep, Pair)[0] is None
    assert parse(deep + "1" + "}" * 3_000, Pair)[0] is None
    assert from_body(deep + "1" + "}" * 3_000).ending == "bad_body"


@pytest.mark.parametrize("text", ["", "no", '{"a": 1, "b": "x', '{"a": "one", "b": "x"}', "[]", '{"b": "x"}'])
def test_a_reply_without_the_object_gives_a_reason(text):
    found, reason = parse(text, Pair)
    assert found is None
    assert reason


@pytest.mark.parametrize(
    "body",
    ["", "{", "[]", "{}", '{"choices": []}', '{"choices": [{}]}', '{"choices": [{"message": 3}]}', "<html>busy</html>"],
)
def test_answers_that_are_no_chat_completions_are_bad_bodies(body):
    assert from_body(body).ending == "bad_body"


def test_half_surrogates_can_be_stored():
    body = '{"choices": [{"message": {"content": "a \\ud83d b"}, "finish_reason": "stop"}]}'
    assert from_body(body).text == "a ? b"


def test_a_refusal_counts_as_content_filter():
    body = {"choices": [{"message": {"content": None, "refusal": "I cannot"}, "finish_reason": "stop"}]}
    attempt = from_body(json.dumps(body))
    assert (attempt.ending, attempt.finish_reason, attempt.usage) == ("reply", "content_filter", None)
