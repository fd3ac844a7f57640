"""`bimedix checkpoints list|verify|prune`, and the script that damages checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from bimedix_jax.checkpoint import steps
from bimedix_jax.cli import main
from bimedix_jax.process import folders

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 5, 10 and 15, of which 15 has a flipped bit."""
    checkpoints = tmp_path / "run/checkpoints"
    checkpoints.mkdir(parents=True)
    for step in (5, 10, 15):
        steps.save_step(checkpoints, step, {"a": jnp.full(40, step, jnp.float32)}, {"seed": 0}, keep=9)
    path = next((steps.step_folder(checkpoints, 15) / "state/ocdbt.process_0/d").iterdir())
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    return tmp_path / "run"


def command(capsys, *words):
    """(exit code, JSON document)"""
    code = main(["checkpoints", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_list_verify_and_prune(run, capsys):
    code, found = command(capsys, "list", run)
    assert code == 0
    assert [(one["step"], one["damage"]) for one in found["checkpoints"]] == [(5, None), (10, None), (15, None)]
    assert all(one["bytes"] > 160 for one in found["checkpoints"])

    code, found = command(capsys, "verify", run)
    assert code == 1
    assert "1 of 3 checkpoints" in found["error"]
    assert "resume from step 10" in found["error"]
    assert [bool(one["damage"]) for one in found["checkpoints"]] == [False, False, True]

    code, found = command(capsys, "prune", run, "--dry-run")
    assert (code, found["kept"], [one["step"] for one in found["removed"]]) == (0, [10], [5, 15])
    assert steps.steps_in(run / "checkpoints") == [5, 10, 15]

    with folders.one_writer(run, "trains"):
        code, found = command(capsys, "prune", run)
    assert code == 1
    assert "trains in" in found["error"]
    code, found = command(capsys, "prune", run)
    assert (code, found["bytes"] > 0) == (0, True)
    assert steps.steps_in(run / "checkpoints") == [10]
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints"]
    assert command(capsys, "verify", run)[0] == 0


def test_prune_removes_nothing_where_no_checkpoint_is_intact(run, capsys):
    for step in (5, 10):
        (steps.step_folder(run / "checkpoints", step) / "position.json").unlink()
    code, found = command(capsys, "list", run)
    assert found["checkpoints"][0]["damage"] == "position.json is missing"
    code, found = command(capsys, "prune", run)
    assert code == 1
    assert "none is removed" in found["error"]
    assert steps.steps_in(run / "checkpoints") == [5, 10, 15]


def test_a_folder_without_checkpoints_is_an_error(tmp_path, capsys):
    for action in ("list", "verify", "prune"):
        code, found = command(capsys, action, tmp_path)
        assert code == 1
        assert "contains no checkpoint" in found["error"]
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_sweep_is_no_run_and_its_runs_are_named(run, capsys):
    code, found = command(capsys, "list", run.parent)
    assert code == 1
    assert found["error"].endswith(f"contains no checkpoint; name the folder of one run: {run}.")


def test_every_fault_is_detected_and_recovered_from():
    """In a process of its own, since the faults limit the size of files and change the user."""
    script = ROOT / "scripts/measure_checkpoint_faults.py"
    done = subprocess.run(
        [sys.executable, str(script), "--trials", "1", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 9
    assert all(row["tried"] == row["detected"] == row["recovered"] == 1 for row in rows), rows
