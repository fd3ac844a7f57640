"""Results are compared only where model, limit and protocol are the same."""

import json
import logging
from pathlib import Path

import pytest
from tiny import TINY

from bimedix_jax import cli
from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.data.records import Record, conversation
from bimedix_jax.data.tokenizer import byte_tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.comparison import HARNESS, check_weights, differing
from bimedix_jax.models.init import init_random


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(options of a first run without --out, folder, result)."""
    root = tmp_path_factory.mktemp("compare")
    for seed in (0, 1):
        export_hf(init_random(TINY, seed=seed, dtype="bfloat16"), root / f"model{seed}")
        byte_tokenizer(root / f"model{seed}")
    records(root / "records.jsonl", "A question?")
    options = ["eval", "run", "--model", str(root / "model0"), "--heldout", str(root / "records.jsonl"), "--limit", "2"]
    assert cli.main([*options, "--out", str(root / "before.json")]) == 0
    return options, root, json.loads((root / "before.json").read_text())


def records(path, question):
    turns = [conversation(question, f"Answer {i}.") for i in range(4)]
    rows = [
        Record(id=str(i), language="en", kind="qa", source="test", licence="CC0-1.0", conversations=turn)
        for i, turn in enumerate(turns)
    ]
    path.write_text("".join(row.to_json() + "\n" for row in rows), "utf-8")


def compare(evaluated, capsys, *extra, replace=None, before="before.json"):
    options, root, _ = evaluated
    options = [(replace or {}).get(word, word) for word in options]
    code = cli.main([*options, *extra, "--compare", str(root / before)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_the_same_run_is_compared(evaluated, capsys):
    code, shown = compare(evaluated, capsys)
    assert code == 0
    assert "before -> after" in shown


def test_another_model_limit_or_protocol_is_refused(evaluated, capsys, tmp_path):
    options, root, _ = evaluated
    records(tmp_path / "others.jsonl", "Another question?")
    for message, extra, replace in (
        ("the model is", [], {options[3]: str(root / "model1")}),
        ("the limit is 2 there and 3 here", [], {"2": "3"}),
        ("the records of heldout differ", [], {options[5]: str(tmp_path / "others.jsonl")}),
        ("the chat template is", ["--template", "mixtral-2023"], None),
        ("the maximum length is none there and 300 here", ["--max-length", "300"], None),
        ("none of the records and tasks", [], None),
    ):
        before = "tasks.json" if message.startswith("none") else "before.json"
        (root / "tasks.json").write_text(json.dumps({"tasks": {"medqa": {}}}))
        code, shown = compare(evaluated, capsys, *extra, replace=replace, before=before)
        shown = " ".join(shown.split())
        assert (code, message in shown, "--force" in shown) == (1, True, True), (message, shown)


def test_force_compares_anyway(evaluated, capsys, caplog):
    caplog.set_level(logging.WARNING)
    code, shown = compare(evaluated, capsys, "--force", replace={"2": "3"})
    assert code == 0
    assert "before -> after" in shown
    assert "compared although it differs: the limit is 2 there and 3 here" in caplog.text
    assert cli.main([*evaluated[0], "--force"]) == 1
    assert "--force is for --compare" in capsys.readouterr().err


def test_other_weights_in_the_same_folder_are_another_model(evaluated, capsys):
    _, root, result = evaluated
    (root / "retrained.json").write_text(json.dumps(result | {"weights": "0" * 64}))
    code, shown = compare(evaluated, capsys, before="retrained.json")
    assert code == 1
    assert "hash of the model's weights is 000000000000 there" in " ".join(shown.split())


def test_another_storage_is_explained(evaluated, capsys, caplog):
    caplog.set_level(logging.WARNING)
    code, _ = compare(evaluated, capsys, "--base", "nf4")
    assert code == 0
    assert "base bfloat16 there and nf4 here" in caplog.text


def test_older_results_are_compared_as_far_as_they_go(evaluated, capsys, caplog):
    caplog.set_level(logging.WARNING)
    _, root, result = evaluated
    older = {
        key: value for key, value in result.items() if key not in ("records", "tokenizer", "weights", "max_length")
    }
    (root / "older.json").write_text(json.dumps(older))
    assert compare(evaluated, capsys, before="older.json")[0] == 0
    assert "does not record its" in caplog.text
    (root / "older.json").write_text(json.dumps(older | {"limit": 7}))
    assert compare(evaluated, capsys, before="older.json")[0] == 1


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"harness": "bimedix eval run, protocol 0"}, "the program is bimedix eval run, protocol 0 there"),
        ({"hashes": {"prompt": "1" * 64}}, "the hash of the prompts is 111111111111 there and 222222222222 here"),
        ({"versions": {"jax": "0.1"}}, "the version of JAX is 0.1 there and 9 here"),
        ({}, None),
    ],
)
def test_another_protocol_is_refused(there, message):
    now = {"weights": "w", "harness": HARNESS, "hashes": {"model": "m", "prompt": "2" * 64}, "versions": {"jax": "9"}}
    before = {**now, "hashes": {"model": "n", "prompt": "2" * 64}, "heldout": {}, **there}
    if message is None:
        check_weights(before, now, Path("before.json"), force=False)
    else:
        with pytest.raises(BimedixError, match=message):
            check_weights(before, now, Path("before.json"), force=False)


def test_two_ways_to_write_a_folder_are_equal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    assert differing({"model": "m"}, {"model": str(tmp_path / "m")}) == []
    assert differing({"model": "m"}, {"model": "n"}) != []
