"""The judge of open answers: both orders, ties, contradictions, unreadable replies, and what is sent."""

import json
import re

import pytest

from bimedix_jax.curation.answers_judge import Judged, Pair, judge, tally
from bimedix_jax.curation.llm.config import LlmConfig
from bimedix_jax.errors import BimedixError

TURNS = (("human", "I have a fever."), ("gpt", "Since when?"), ("human", "منذ يومين"))
PAIRS = [
    Pair("better", "en", TURNS, "good advice", "bad advice"),
    Pair("worse", "ar", TURNS, "bad advice", "good advice"),
    Pair("same", "ar", TURNS, "نصيحة", "نصيحة"),
]


def shown(body):
    """The two answers of a prompt in the order in which the judge sees them."""
    return re.findall(r"<answer [AB] [0-9a-f]{12}>\n(.*?)\n</answer", body["messages"][-1]["content"], re.DOTALL)


def fair(body):
    first, second = shown(body)
    better = "tie" if first == second else "A" if "good" in first else "B"
    return json.dumps({"reason": "because", "better": better})


def settings(server, **rest):
    return LlmConfig(model="any", base_url=server.url, api_key_env="", **rest)


def test_a_fair_judge_finds_the_better_answer_in_both_orders(serve, tmp_path):
    server = serve(respond=fair)
    judged, facts = judge(PAIRS, settings(server), tmp_path / "judge.sqlite")
    assert {one.id: one.outcome for one in judged} == {"better": "win", "worse": "loss", "same": "tie"}
    assert facts["unreadable"] == 0
    counted = tally(judged)
    assert counted["all"] == {
        "n": 3,
        "wins": 1,
        "ties": 1,
        "losses": 1,
        "score": 0.5,
        "contradictory": 0,
        "first_position": 0.5,
    }
    assert counted["ar"]["score"] == 0.25
    assert server.stats()["answered"] == 6
    assert all("منذ يومين" in body["messages"][-1]["content"] for body in server.bodies)
    again, _ = judge(PAIRS, settings(server), tmp_path / "judge.sqlite")
    assert again == judged
    assert server.stats()["answered"] == 6  # nothing is asked twice


def test_a_judge_that_prefers_the_first_answer_decides_nothing(serve, tmp_path):
    server = serve(respond=lambda body: '{"reason": "", "better": "A"}')
    judged, _ = judge(PAIRS, settings(server), tmp_path / "judge.sqlite")
    counted = tally(judged)["all"]
    assert (counted["ties"], counted["contradictory"], counted["first_position"]) == (3, 3, 1.0)


@pytest.mark.parametrize(
    ("first", "second", "outcome", "contradictory"),
    [
        ("a", "b", "win", False),
        ("b", "a", "loss", False),
        ("a", "a", "tie", True),
        ("b", "b", "tie", True),
        ("a", "tie", "tie", False),
        ("tie", "a", "tie", False),
        ("tie", "tie", "tie", False),
    ],
)
def test_only_agreeing_orders_decide(first, second, outcome, contradictory):
    one = Judged("x", "en", first, second)
    assert (one.outcome, one.contradictory) == (outcome, contradictory)


def test_replies_without_a_verdict_are_counted_and_faults_are_retried(serve, tmp_path, loopback):
    def confused(body):
        return '{"reason": "", "better": "neither"}' if "نصيحة" in body["messages"][-1]["content"] else fair(body)

    server = serve(respond=confused, fault=loopback.some_faults(0.3))
    judged, facts = judge(PAIRS, settings(server, reasks=1), tmp_path / "judge.sqlite")
    assert {one.id for one in judged} == {"better", "worse"}
    assert facts["unreadable"] == 1


def test_a_budget_stops_the_judge(serve, tmp_path):
    with pytest.raises(BimedixError, match="budget"):
        judge(PAIRS, settings(serve(respond=fair)), tmp_path / "judge.sqlite", budget_tokens=10)
