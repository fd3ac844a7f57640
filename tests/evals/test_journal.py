"""A killed evaluation continues from its journal and ends with the same bytes."""

import json

import numpy as np
import pytest

from bimedix_jax import cli
from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.data.records import write_jsonl
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.accuracy import Accuracy
from bimedix_jax.evals.journal import IDENTITY, RESULTS, Journal, folder_of, is_unfinished, journal
from bimedix_jax.process.folders import one_writer


class Killed(BaseException):
    """Stands in for SIGKILL: nothing catches it."""


def begin(out, *batches, identity=None, counters=None, overwrite=False):
    """Writes batches of part "a" and stops as if killed."""
    with pytest.raises(Killed), journal(out, identity or {"model": "m"}, overwrite, counters) as kept:
        for batch in batches:
            if counters is not None:
                counters += 1
            kept.part("a").write(batch)
        raise Killed


def test_complete_batches_are_restored_bit_for_bit(tmp_path):
    out, values = tmp_path / "r.json", [0.1 + 0.2, -1e-308, -123.456789012345678]
    counters = np.zeros(2, np.int64)
    begin(out, {3: values, 0: [1.0]}, {7: -0.5}, counters=counters)
    assert is_unfinished(out)
    restored = np.zeros(2, np.int64)
    with journal(out, {"model": "m"}, False, restored) as kept:
        assert kept.part("a").found == {3: values, 0: [1.0], 7: -0.5}
        assert kept.part("b").found == {}
        assert restored.tolist() == [2, 2]
    assert sorted(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lines", [1, 2])
@pytest.mark.parametrize("cut", [1, 20])
def test_a_cut_off_batch_is_left_out_whole(tmp_path, lines, cut):
    out = tmp_path / "r.json"
    begin(out, {0: 1.0}, {1: 1.0, 2: 1.0})
    path = folder_of(out) / RESULTS
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:lines]) + whole[lines][:-cut])
    begin(out)
    assert path.read_bytes() == whole[0]
    begin(out, {1: 2.0, 2: 2.0})
    with journal(out, {"model": "m"}, False) as kept:
        assert kept.part("a").found == {0: 1.0, 1: 2.0, 2: 2.0}


def test_another_evaluation_is_not_continued(tmp_path):
    out = tmp_path / "r.json"
    begin(out, {0: 1.0})
    other = {"model": "n", "limit": 3}
    with pytest.raises(BimedixError, match="unfinished evaluation with other values of: --limit, model; repeat its"):
        journal(out, other, False).__enter__()
    with journal(out, other, True) as kept:
        assert kept.part("a").found == {}


def test_an_evaluation_that_fails_without_a_result_does_not_block_another(tmp_path):
    out = tmp_path / "new/r.json"
    with pytest.raises(BimedixError, match="no record fits"), journal(out, {"model": "m"}, False):
        raise BimedixError("no record fits")
    assert list(tmp_path.iterdir()) == []
    begin(out)  # killed before its first result
    begin(out, {0: 1.0}, identity={"model": "n"})
    with pytest.raises(BimedixError, match="no record fits"), journal(out, {"model": "n"}, False):
        raise BimedixError("no record fits")
    assert is_unfinished(out), "results stay"


def test_only_one_process_writes(tmp_path):
    out = tmp_path / "r.json"
    begin(out, {0: 1.0})
    with one_writer(folder_of(out), "evaluates"), pytest.raises(BimedixError, match="evaluates in"):
        journal(out, {"model": "m"}, False).__enter__()


@pytest.fixture(scope="module")
def command(model, tokenizer, mixed, tmp_path_factory):
    """The words of an evaluation of several batches, with rules, without --out."""
    root = tmp_path_factory.mktemp("journal")
    export_hf(model, root / "model", tokenizer_from=tokenizer.folder)
    write_jsonl(root / "records.jsonl", mixed)
    (root / "rules.json").write_text(json.dumps([{"op": "ban", "experts": [1], "where": {"language": ["ar"]}}]))
    words = ["eval", "run", "--model", str(root / "model"), "--base", "float32", "--batch-tokens", "300"]
    words += ["--heldout", str(root / "records.jsonl"), "--intervene", str(root / "rules.json"), "--orders", "1"]
    return [*words, "--train", str(root / "records.jsonl")]


def test_a_killed_evaluation_ends_with_the_same_bytes(command, mcqa, tmp_path, monkeypatch):
    """It is killed after every batch. No result is computed again."""
    candidates = sum(2 * len(record.choices) for record in mcqa)
    assert cli.main([*command, "--out", str(tmp_path / "whole/r.json")]) == 0
    written: list[tuple[str, int]] = []
    original = Journal._write

    def write_and_die(self, name, results):
        original(self, name, results)
        written.extend((name, number) for number in results)
        raise Killed

    out, starts = tmp_path / "killed/r.json", 0
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "_write", write_and_die)
        while not out.exists():
            starts += 1
            try:
                code = cli.main([*command, "--out", str(out)])
            except Killed:
                assert (folder_of(out) / IDENTITY).exists()
                assert not out.exists()
            else:
                assert code == 0
    assert starts > 4
    assert len(written) == len(set(written)) == 7 + 2 * candidates
    for path in (tmp_path / "whole").iterdir():
        assert (out.parent / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list(out.parent.iterdir())) == 2


def test_a_kill_after_the_result_is_written_loses_nothing(command, tmp_path, monkeypatch):
    out = tmp_path / "r.json"
    with monkeypatch.context() as patched:
        patched.setattr("bimedix_jax.evals.journal.shutil.rmtree", lambda folder: None)
        assert cli.main([*command, "--out", str(out)]) == 0
    assert not is_unfinished(out)
    before = out.read_bytes()
    (folder_of(out) / IDENTITY).write_text('{"model": "other"}')
    assert cli.main([*command, "--out", str(out)]) == 1
    (folder_of(out) / IDENTITY).unlink()
    assert cli.main([*command, "--out", str(out)]) == 1  # it exists, and nothing is unfinished
    assert out.read_bytes() == before


def test_the_result_names_versions_and_hashes(command, capsys, compared_with_the_page):
    assert cli.main(["--json", *command]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["hashes"]) == {"model", "adapter", "prompt"}
    assert all(len(result["hashes"][name]) == 64 for name in ("model", "prompt"))
    assert result["hashes"]["adapter"] is None
    assert set(result["versions"]) == {"bimedix_jax", "jax", "platform"}
    assert result["harness"].startswith("bimedix eval run, protocol")
    assert len(result["records"]["heldout"]) == 64
    (own,) = result["sensitivity"].values()
    assert own["orders"]["n"] == 4
    assert len(own["orders"]["accuracies"]) == 2
    (row,) = result["contamination"]["sets"].values()
    assert row["others"] == {"n": 0}
    assert row["seen"] == Accuracy(row["seen"]["correct"], 4).to_dict()
    assert row["seen"]["low"] < row["seen"]["high"]
    for part in ("sensitivity", "contamination"):
        assert compared_with_the_page(part, result[part]) == (set(), set())
    assert row["questions"]["q1"] == ["q1", "id", 1.0]
