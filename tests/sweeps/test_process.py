"""One real run: its sweep is killed after the first checkpoint, and the same command finishes it."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bimedix_jax.training.metrics_file import read_metrics

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/measure_sweep_kills.py"


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("measure_sweep_kills", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.whole_process
def test_a_killed_sweep_is_finished_by_the_same_command(tmp_path):
    script = load_script()
    study, out = tmp_path / "kills.py", tmp_path / "out"
    study.write_text(script.STUDY, "utf-8")
    words = [sys.executable, "-m", "bimedix_jax", "sweep", str(study), "--size", "smoke", "--out", str(out), "--json"]
    words += ["--only", "rank-1", "--seed", "0"]
    killed = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    deadline = time.monotonic() + 300
    while not list(out.glob("*/runs/*/training/checkpoints/0*")):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert script.survivors(out) == 0
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["arm"], row["seed"], row["state"], row["steps"]) == ("rank-1", 0, "finished", 12)
    assert row["trainable_parameters"] > 0
    training = Path(row["folder"]) / "training"
    assert [line["step"] for line in read_metrics(training)] == list(range(1, 13))
    starts = json.loads((training / "run.json").read_text("utf-8"))["starts"]
    assert starts[-1]["step"] >= 3
    assert (training / "adapter/adapter.safetensors").is_file()
