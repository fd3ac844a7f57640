"""Answers joined to routes: a planted association is found, a null is not, and what is lacking is named."""

import json
from pathlib import Path

import numpy as np
import pytest

from bimedix_jax.errors import BimedixError
from bimedix_jax.routing.answers import CLAIM, DIFFERENT, NAME, NO_CAUSE, SAME, answers_of, squared_distances
from bimedix_jax.routing.claims import Analysis
from bimedix_jax.routing.formats.imports import ImportOptions, import_routes
from bimedix_jax.routing.questions import analyse
from bimedix_jax.routing.recording import Recording
from bimedix_jax.routing.report.answers import read_answers
from bimedix_jax.routing.report.writing import ReportOptions, write_report
from bimedix_jax.routing.stats import holm
from bimedix_jax.routing.tables import Tables

LAYERS, EXPERTS, TOKENS = 3, 4, 40


def paired_tables(rng: np.random.Generator, pairs: int = 60, planted: float = 0.0, **changes) -> Tables:
    """Questions in two languages; in layer 0, routes of those with one right answer are `planted` further apart."""
    first_PLE = rng.dirichlet(np.full(EXPERTS, 5.0), (pairs, LAYERS))
    other_PLE = rng.dirichlet(np.full(EXPERTS, 5.0), (pairs, LAYERS))
    differ_P = rng.random(pairs) < 0.4
    moved_PL = 0.3 * np.ones((pairs, LAYERS))
    moved_PL[differ_P, 0] += planted
    second_PLE = first_PLE + moved_PL[..., None] * (other_PLE - first_PLE)
    load_RLE = np.stack([first_PLE, second_PLE], 1).reshape(2 * pairs, LAYERS, EXPERTS)
    tokens_R = rng.integers(TOKENS // 2, 2 * TOKENS, 2 * pairs)
    right_P = rng.random(pairs) < 0.5
    correct_R = np.stack([right_P, right_P ^ differ_P], 1).ravel().astype(float)
    given = {
        "counts_RLE": rng.multinomial(np.broadcast_to(tokens_R[:, None], load_RLE.shape[:2]), load_RLE),
        "tokens_R": tokens_R,
        "groups": {"language": np.array(["ar", "en"] * pairs)},
        "pair_R": np.array([f"q{number // 2}" for number in range(2 * pairs)]),
        "correct_R": correct_R,
    }
    return Tables(**(given | changes))


def found(tables: Tables, unit: str = "record") -> Analysis:
    return analyse(tables, explore=False, unit=unit)


def why(analysis: Analysis, claim: str) -> str:
    [reason] = [refusal.why for refusal in analysis.refused if refusal.claim == claim]
    return reason


def test_a_planted_association_is_found_in_its_layer_and_goes_no_further():
    analysis = found(paired_tables(np.random.default_rng(0), planted=0.7))
    question = analysis.questions[-1]
    assert (question.name, question.unit, question.family, question.level) == (NAME, "pair", LAYERS, "association")
    assert sum(question.clusters.values()) == 60
    claims = [(claim.layer, claim.expert, claim.level) for claim in analysis.claims if claim.question == NAME]
    assert claims == [(0, None, "association"), (1, None, "none"), (2, None, "none")]
    cell = question.cells[0]
    spread = 2 * EXPERTS * (1 / 4 * 3 / 4) / (EXPERTS * 5 + 1)  # mean squared distance of two draws
    assert cell.low is not None
    assert cell.high is not None
    assert cell.low < (1.0**2 - 0.3**2) * spread < cell.high
    assert "association only" in why(analysis, NO_CAUSE)


def test_without_an_association_hardly_any_is_claimed():
    levels = [found(paired_tables(np.random.default_rng(seed))).questions[-1].level for seed in range(8)]
    assert levels.count("none") >= 7


def test_the_distance_does_not_depend_on_the_number_of_tokens():
    """Two records of the same loads are 0 apart on average, however short they are, and also with two choices."""
    rng, pairs = np.random.default_rng(0), 4000
    pick_E = np.array([0.5, 0.3, 0.15, 0.05])
    for tokens in (3, 50):
        chosen = np.argsort(-(np.log(pick_E) + rng.gumbel(size=(2 * pairs, tokens, EXPERTS))), axis=2)[:, :, :2]
        counts_RLE = (chosen[..., None] == np.arange(EXPERTS)).sum((1, 2))[:, None]
        rows = np.arange(pairs)
        distance_P1 = squared_distances(counts_RLE, np.full(2 * pairs, tokens), rows, pairs + rows)
        error = distance_P1.std() / np.sqrt(pairs)
        assert abs(distance_P1.mean()) < 3 * error


def test_the_p_values_are_adjusted_together_with_the_other_questions():
    tables = paired_tables(np.random.default_rng(1), planted=0.5)
    alone = answers_of(tables, 1999, 0).test
    analysis = found(tables)
    assert alone is not None
    language = np.array([cell.p_load for cell in analysis.questions[0].cells], float)
    expected = holm([language, alone.p_X])
    for question, p_X in zip(analysis.questions, expected, strict=True):
        np.testing.assert_allclose(np.array([cell.p_adjusted for cell in question.cells], float), p_X)


def test_documents_with_pairs_of_both_kinds_are_compared_within():
    rng = np.random.default_rng(0)
    document_R = np.repeat(np.arange(30), 8)  # of 4 pairs each
    analysis = found(paired_tables(rng, pairs=120, planted=0.7, cluster_R=document_R), unit="document")
    question = analysis.questions[-1]
    assert (question.paired, question.unit, question.level) == (True, "document", "association")


def test_what_is_lacking_is_named():
    rng = np.random.default_rng(0)
    for changes, expected in [
        ({"pair_R": None}, "no record has a pair"),
        ({"correct_R": None}, "no answers were given"),
        ({"correct_R": np.ones(120)}, f"all 60 pairs have {SAME}"),
        ({"groups": {"language": np.full(120, "ar")}}, "no pair has an answer in each"),
    ]:
        analysis = found(paired_tables(rng, **changes))
        assert expected in why(analysis, CLAIM)
        assert NAME not in [question.name for question in analysis.questions]
    few = found(paired_tables(rng, pairs=16))
    assert few.questions[-1].level is None
    assert {cell.p_adjusted for cell in few.questions[-1].cells} == {None}
    assert f"clusters of pairs with {DIFFERENT}" in why(few, CLAIM)


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Recording:
    """With labels `correct`, and with files of the same and of other answers beside it."""
    folder = tmp_path_factory.mktemp("answers")
    tables, rng = paired_tables(np.random.default_rng(0), planted=0.7), np.random.default_rng(0)
    assert tables.correct_R is not None
    assert tables.pair_R is not None
    lines, answers = [], []
    for row, counts_LE in enumerate(tables.counts_RLE):
        experts = [rng.permutation(np.repeat(np.arange(EXPERTS), counts_E)) for counts_E in counts_LE]
        record = {"id": f"r{row}", "language": ("ar", "en")[row % 2], "pair": str(tables.pair_R[row])}
        record |= {"input_ids": rng.integers(0, 30, len(experts[0])).tolist()}
        record |= {"experts": [[[int(name)] for name in layer] for layer in experts]}
        record |= {"labels": {"correct": int(tables.correct_R[row])}}
        lines.append(json.dumps(record))
        answers.append(json.dumps({"set": "s", "id": f"r{row}", "correct": bool(tables.correct_R[row])}))
    (folder / "in.jsonl").write_text("\n".join(lines))
    (folder / "after.predictions.jsonl").write_text("\n".join(answers))
    (folder / "after.json").write_text(json.dumps({"model": "M", "predictions": {"file": "after.predictions.jsonl"}}))
    import_routes([folder / "in.jsonl"], "jsonl", folder / "R", ImportOptions())
    return Recording.open(folder / "R")


def test_labels_and_files_of_answers_give_the_same_report(recording, tmp_path):
    results = [None, recording.folder.parent / "after.json", recording.folder.parent / "after.predictions.jsonl"]
    questions = []
    for number, path in enumerate(results):
        claims = write_report(recording, tmp_path / str(number), ReportOptions(answers=path))
        questions.append(claims["questions"][-1])
        assert (claims["hashes"]["answers"] is None) == (path is None)
        assert any("nothing tells" in text for text in claims["warnings"]) == (path is not None)
    assert questions[0] == questions[1] == questions[2]
    assert (questions[0]["name"], questions[0]["level"]) == (NAME, "association")
    page = (tmp_path / "0" / "report.html").read_text()
    assert "Distance of the routes and answers" in page
    assert "This does not say why" in page
    assert len((tmp_path / "0" / "answers.csv").read_text().splitlines()) == 1 + LAYERS


def test_answers_that_do_not_belong_to_the_recording_are_refused(recording, tmp_path: Path):
    path = tmp_path / "x.predictions.jsonl"
    for lines, message in [
        ([{"id": "r0"}], "no id and correct"),
        ([{"id": "other", "correct": True}], "answers no record"),
        ([{"id": "r0", "correct": True}, {"id": "r0", "correct": False}], "another answer"),
    ]:
        path.write_text("\n".join(json.dumps(line) for line in lines))
        with pytest.raises(BimedixError, match=message):
            read_answers(path, recording)
