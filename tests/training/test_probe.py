"""Routes of a fixed set over training: recorded at powers of two, without an effect on the run, also after a kill."""

import csv
import shutil
from typing import Any

import numpy as np
import pytest

from bimedix_jax.data import pack
from bimedix_jax.errors import BimedixError
from bimedix_jax.routing.recording import Recording
from bimedix_jax.training import loop
from bimedix_jax.training.loop import train
from bimedix_jax.training.metrics_file import read_metrics
from bimedix_jax.training.probe import Probe, curves, recorded_steps
from bimedix_jax.training.run_folder import PROBE


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Two rows of three records."""
    folder, rng, rows = tmp_path_factory.mktemp("packed"), np.random.default_rng(0), []
    for row in range(2):
        sizes = (9, 7) if row == 0 else (12,)
        segments = tuple(
            pack.Segment(number + 1, f"r{row}{number}", "en", "qa", "test", size, 2)
            for number, size in enumerate(sizes)
        )
        ids = np.zeros(16, np.int32)
        ids[: sum(sizes)] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        rows.append(pack.Row(rng.integers(0, 300, 16).astype(np.int32), ids, ids % 2 == 1, segments))
    pack.write(folder, iter(rows), pack.PackReport(rows=2, examples=3), 16, {"pad_id": 0})
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory, experiment, packed):
    folder = tmp_path_factory.mktemp("run") / "whole"
    train(experiment(probe=packed), folder)
    return folder


def recordings(folder):
    return {
        step: {path.name: path.read_bytes() for path in recorded.iterdir()} for step, recorded in recorded_steps(folder)
    }


def test_powers_of_two_and_the_last_step_are_recorded(run, packed):
    assert list(recordings(run)) == [0, 1, 2, 4, 6]
    for step, folder in recorded_steps(run):
        recording = Recording.open(folder, verify=True)
        assert recording.records["id"] == ["r00", "r01", "r10"]
        assert recording.manifest.options["step"] == step
    unused: Any = None
    due = [step for step in range(12) if Probe(packed, run, unused, {}, 11).is_due(step)]
    assert due == [0, 1, 2, 4, 8, 11]


def test_curves_end_at_full_saturation(run):
    rows = curves(run)
    first, last = [[row for row in rows if row["step"] == step] for step in (0, 6)]
    assert all(row["saturation"] == 1 for row in last)
    assert all(np.isnan(row["changed"]) for row in first)
    steps = dict(recorded_steps(run))
    before, after = (Recording.open(steps[step]).tokens("record", "role", "experts") for step in (4, 6))
    kept = before["role"] != 0
    changed = (np.sort(before["experts"], -1) != np.sort(after["experts"], -1)).any(-1)[kept]
    by_record = [changed[before["record"][kept] == number].mean(0) for number in range(3)]
    np.testing.assert_allclose([row["changed"] for row in last], np.mean(by_record, axis=0))
    with (run / PROBE / "curves.csv").open() as file:
        assert [float(row["saturation"]) for row in csv.DictReader(file)] == [row["saturation"] for row in rows]


def test_a_probe_changes_no_loss_and_a_resumed_run_records_the_same(run, experiment, packed, tmp_path, monkeypatch):
    train(experiment(), tmp_path / "without")
    losses = [[line["loss"] for line in read_metrics(folder)] for folder in (run, tmp_path / "without")]
    assert losses[0] == losses[1]
    original = loop.checked

    def killed(batch, vocab_size, step):
        if step == 5:
            raise BimedixError("killed")
        return original(batch, vocab_size, step)

    monkeypatch.setattr(loop, "checked", killed)
    with pytest.raises(BimedixError, match="killed"):
        train(experiment(probe=packed), tmp_path / "killed")
    monkeypatch.undo()
    shutil.copytree(run / PROBE / "step-00000006", tmp_path / "killed" / PROBE / "step-00000005")  # of a lost step
    train(experiment(probe=packed), tmp_path / "killed", resume=True)
    assert recordings(tmp_path / "killed") == recordings(run)


def test_a_probe_that_does_not_exist_is_an_error_before_training(experiment, tmp_path):
    with pytest.raises(BimedixError, match="nowhere"):
        train(experiment(probe=str(tmp_path / "nowhere")), tmp_path / "run")
