"""The judge of open answers: both orders, ties, contradictions, unreadable replies, and what is sent."""

import json
import re

import pytest

from bimedix_jax.commands.eval_run import Config
from bimedix_jax.commands.eval_run_open import OpenOptions, judged
from bimedix_jax.curation.answers_judge import Judged, Pair, judge, tally
from bimedix_jax.curation.llm.config import JudgeConfig, LlmConfig
from bimedix_jax.data.records import conversation
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.open_answers import Answer, Item

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


@pytest.fixture
def answers():
    """One good answer with a bad reference, one empty answer with a good reference."""
    item = Item("a", "a", "en", "qa", conversation("I cough."), "bad advice")
    other = Item("b", "b", "en", "qa", conversation("I sneeze."), "good advice")
    return [Answer(item, "good advice", 2, True), Answer(other, "", 0, True)]


def options(server, place, **rest):
    judge = JudgeConfig(model="any", base_url=server.url, api_key_env="")
    return OpenOptions.of(Config(model="m", judge=judge, heldout="sample", open=("answers",), out=place, **rest))


def test_answers_are_judged_against_the_references_or_another_model(serve, tmp_path, answers):
    server = serve(respond=fair)
    found = judged(options(server, tmp_path / "r.json"), answers, None)
    assert (found["against"], found["judge"]) == ("references", "any")
    assert {name: found["by_group"]["en"][name] for name in ("wins", "losses", "ties")} == {
        "wins": 1,
        "losses": 1,
        "ties": 0,
    }
    assert (tmp_path / "r.judge.sqlite").is_file()
    rows = [{"set": "answers", "id": "b", "answer": "bad advice"}, {"set": "behaviour", "id": "a", "answer": "x"}]
    (tmp_path / "old.answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    old = tmp_path / "old.json"
    found = judged(options(server, tmp_path / "s.json", compare=old), answers, {"open": {"answers": {}}})
    assert found["against"] == str(old)
    assert found["by_group"]["all"]["n"] == 1  # the answer that both models gave
    assert "(none)" in server.bodies[-1]["messages"][-1]["content"]


def test_a_compared_result_without_its_answers_is_refused(serve, tmp_path, answers):
    with pytest.raises(BimedixError, match=r"the answers of .*old.json are not in .*old.answers.jsonl"):
        wanted = options(serve(respond=fair), tmp_path / "r.json", compare=tmp_path / "old.json")
        judged(wanted, answers, {"open": {"answers": {}}})
