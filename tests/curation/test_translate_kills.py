"""`bimedix data translate` as a process that is interrupted and killed."""

import importlib.util
import json
import signal
import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bimedix_jax.data.records import sample, write_jsonl

pytestmark = pytest.mark.whole_process


@pytest.fixture
def script(loopback: ModuleType) -> Any:
    """scripts/measure_translation_kills.py, which imports the server beside it."""
    path = Path(loopback.__file__ or "").with_name("measure_translation_kills.py")
    spec = importlib.util.spec_from_file_location("measure_translation_kills", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_killed_runs_write_the_same_bytes_and_pay_twice_only_for_requests_in_flight(script, tmp_path):
    result = script.measure(records=4, kills=2, seed=1, folder=tmp_path)
    assert result["kills"] == 2
    assert result["identical"]
    assert result["resent"] <= result["in_flight"] <= result["at_most"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_waits_for_requests_in_flight_and_resumes(script, serve, tmp_path, number):
    server = serve(latency=0.1)
    records = tmp_path / "in.jsonl"
    write_jsonl(records, [record for record in sample() if record.language == "en"][:6])
    words = script.command(records, tmp_path / "out", server)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while server.stats()["answered"] < 3 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert f"{number.name}: replies are kept, run the same command again to resume" in json.loads(out)["error"]
    assert "Traceback" not in err
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert server.stats()["twice"] == 0
    assert json.loads(done.stdout)["records"] == 6
