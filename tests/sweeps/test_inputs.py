"""Inputs are made once, by one process, and a run is known by their content and not by their place."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest

from bimedix_jax import files
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment, override
from bimedix_jax.presets import smoke
from bimedix_jax.process import folders
from bimedix_jax.sweeps import inputs as made
from bimedix_jax.sweeps.folder import identity
from bimedix_jax.sweeps.inputs import TINY, Fingerprints, Inputs, prepare


def test_inputs_are_made_once_and_by_commands_of_ours(tmp_path):
    from bimedix_jax.cli import COMMANDS

    inputs, seen = Inputs(dense=TINY), []
    folder = inputs.folder(tmp_path, 64)

    def command(words, log):
        assert log.parent == folder
        assert any(" ".join(words).startswith(name) for name in COMMANDS)
        Path(words[words.index("--out") + 1]).mkdir()
        seen.append(words[0])

    for _ in range(2):
        prepare(inputs, folder, 64, command)
    assert seen == ["upcycle", "data"]
    assert (folder / "dense/model.safetensors").is_file()
    assert folder != Inputs(dense=TINY, noise=0.2).folder(tmp_path, 64) != inputs.folder(tmp_path, 32)
    assert set(inputs.changes(folder)) == {"model.path", "data.path"}


def test_a_second_process_waits_for_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(made, "WAIT_SECONDS", 0.01)
    inputs, waits = Inputs(dense="somewhere"), []
    for name in ("base", "rows"):
        (tmp_path / name).mkdir()
    (tmp_path / "rows").rmdir()

    def other() -> None:
        with folders.one_writer(tmp_path, "makes the inputs"):
            held.set()
            while not waits:
                time.sleep(0.01)
            (tmp_path / "rows").mkdir()

    held, thread = threading.Event(), threading.Thread(target=other)
    thread.start()
    held.wait()
    prepare(inputs, tmp_path, 64, lambda *_: pytest.fail("made twice"), lambda: waits.append(1))
    thread.join()
    assert waits == [1]


@pytest.fixture
def placed(tmp_path) -> Experiment:
    """An experiment with a base and rows on disk."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    (tmp_path / "base/model.safetensors").write_bytes(b"weights")
    (tmp_path / "rows").mkdir()
    manifest = {"files": {name: {"bytes": 1, "sha256": name} for name in ("rows.array_record", "index.json")}}
    (tmp_path / "rows/manifest.json").write_text(json.dumps(manifest))
    changes = {"model.random": None, "data.synthetic_rows": 0, "data.path": str(tmp_path / "rows")}
    return override(smoke(), {**changes, "model.path": str(tmp_path / "base")})


def test_identity_is_of_content_and_not_of_place(placed, tmp_path):
    store = tmp_path / "fingerprints.json"

    def known(experiment: Experiment, heldout: str | None = None) -> str:
        prints = Fingerprints(store)
        found = identity(experiment, prints, heldout, None)
        prints.save()
        return found

    first = known(placed)
    assert len(files.peek_json(store)) == 2
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    moved = override(placed, {"model.path": str(tmp_path / "copy"), "name": "x", "tracking.mode": "offline"})
    assert known(moved) == first
    others = {known(override(placed, {"seed": 1})), known(override(placed, {"steps": 11})), known(placed, "sample")}
    (tmp_path / "copy/model.safetensors").write_bytes(b"other weights")
    others.add(known(moved))
    (tmp_path / "rows/manifest.json").write_text(json.dumps({"files": {"rows.array_record": {"sha256": "x"}}}))
    others.add(known(placed))
    for rules in ("[]", "[1]"):
        (tmp_path / "rules.json").write_text(rules)
        others.add(known(override(placed, {"intervene": str(tmp_path / "rules.json")})))
    assert len(others | {first}) == 8
    assert known(override(placed, {"model.path": "owner/name"})) != first
    (tmp_path / "base/model.safetensors").unlink()
    with pytest.raises(BimedixError, match="has no weights"):
        known(placed)


def test_a_run_resumes_where_its_sweep_was_moved_to(placed, tmp_path):
    from bimedix_jax.experiment import read
    from bimedix_jax.sweeps.worker import follow_moves

    began = override(placed, {"steps": 7})
    (tmp_path / "config.json").write_text(began.to_json())
    moved = override(began, {"model.path": "/elsewhere/base", "steps": None, "epochs": 2})
    follow_moves(moved, tmp_path / "config.json")
    now = read(tmp_path / "config.json")
    assert (now.model.path, now.steps, now.epochs) == ("/elsewhere/base", 7, 2)
