"""Tables of results on narrow terminals: no number and no name is cut."""

import io

import pytest
from rich.console import Console

from bimedix_jax.bench import report
from bimedix_jax.evals import tables

NAMES = ("mmlu_professional_medicine", "medqa")
ROW = {
    "accuracy": 0.3125,
    "low": 0.2012,
    "high": 0.4499,
    "by_text": {"accuracy": 0.287},
    "chance": 0.25,
    "n": 1273,
    "limited": True,
}
ROW |= {"too_long": 3, "available": 4183, "paper_questions": 4183, "rejected": 12}
GROUPS = ("ar", "en", "all", "en/mcqa/specialty-with-a-long-name")


def at(width: int, table: object) -> str:
    screen = io.StringIO()
    Console(file=screen, width=width).print(table)
    return screen.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("before", [None, 0.1])
def test_tables_of_results_cut_nothing(width, before):
    old = None if before is None else {name: ROW | {"accuracy": before} for name in NAMES}
    tasks = at(width, tables.task_table(dict.fromkeys(NAMES, ROW), 0.3125, old))
    change = "31.2" if before is None else "10.0 -> 31.2 (+21.2)"
    assert all(whole in tasks for whole in (*NAMES, change, "20.1 - 45.0", "28.7", "1,273", "4,183", "AVG"))
    scores = {"by_group": dict.fromkeys(GROUPS, ROW), "by_group_text": dict.fromkeys(GROUPS, ROW)}
    scores |= {"chance": dict.fromkeys(GROUPS, 0.25), "too_long": {}}
    choice = at(width, tables.accuracy_table(scores, None))
    assert all(whole in choice for whole in (*GROUPS, "31.2", "20.1 - 45.0", "25.0", "1,273"))
    numbers = ("nats_per_token", "bits_per_byte", "tokens", "text_bytes", "records")
    loss = {name: dict.fromkeys(GROUPS, 1234567) for name in numbers} | {"too_long": {"all": 3}}
    shown = at(width, tables.loss_table(loss, loss if before else None))
    assert all(whole in shown for whole in (*GROUPS, "1,234,567", "1234567.0000"))
    assert "…" not in tasks + choice + shown
    assert "3 records exceed" in shown


def test_sets_of_ones_own_are_not_compared_with_the_paper():
    own = ROW | {"paper_questions": None}
    alone = at(120, tables.task_table({"mine": own}, None))
    assert "paper" not in alone
    assert "of 9 tasks" not in alone
    both = at(120, tables.task_table({"mine": own, "medqa": ROW}, None))
    assert "of the paper's" in both
    assert "1 of 9 tasks, so there is no average" in both


@pytest.mark.parametrize(("width", "blocks"), [(60, True), (80, False)])
def test_the_table_of_a_benchmark_fits_80_columns(width, blocks):
    row = {"name": "decode_b8", "ours_tokens_per_s": 1234567.0, "peer_tokens_per_s": 7654321.0, "ratio": 12.34}
    row |= {"bound_tokens_per_s": 9876543.0, "ours_over_bound": 0.97, "compile_seconds": 1234.5}
    shown = at(width, report.table([row]))
    wholes = ("decode_b8", "1,234,567", "7,654,321", "12.34", "9,876,543", "0.97", "1234.5 s")
    assert all(whole in shown for whole in wholes)
    assert ("  ours         1,234,567" in shown.splitlines()) == blocks
