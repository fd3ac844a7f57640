"""scripts/gpu_check.py reports whatever happens; the checks themselves need a GPU."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/gpu_check.py"


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def check(script: dict[str, Any], code: str, seconds: int = 60) -> Any:
    return script["Check"](command=(sys.executable, "-c", code), seconds=seconds)


def test_without_a_gpu_the_script_reports_it_and_succeeds(tmp_path: Path) -> None:
    for command in ([sys.executable, str(SCRIPT)], ["/bin/bash", str(SCRIPT.with_suffix(".sh"))]):
        done = subprocess.run(command, capture_output=True, text=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("\n") == 1
        assert "No NVIDIA GPU" in done.stderr
        assert not done.stdout


def test_each_outcome_is_named(script: dict[str, Any]) -> None:
    run = script["run_check"]
    assert run(check(script, "print('{\"a\": 1}')"), 60)["result"] == {"a": 1}
    failed = run(check(script, "import sys; sys.exit('broken')"), 60)
    assert (failed["status"], failed["errors"]) == ("failed", "broken\n")
    late = run(check(script, "import time; print('begun', flush=True); time.sleep(60)"), 2)
    assert (late["status"], late["output"]) == ("cut off", "begun\n")


def test_a_terminated_run_prints_what_it_has(tmp_path: Path) -> None:
    """A stand-in for nvidia-smi makes the script believe in a GPU; its checks fail at once or are stopped."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'Stand-in, 80 GiB, 1.0'\n")
    smi.chmod(0o755)
    code = f"""
import runpy, sys
script = runpy.run_path({str(SCRIPT)!r})
main = script["main"]
Check = script["Check"]
main.__globals__["CHECKS"] = {{
    "first": Check(command=(sys.executable, "-c", "print(1)"), seconds=60),
    "second": Check(command=(sys.executable, "-c", "import time; time.sleep(300)"), seconds=300),
}}
sys.argv = ["gpu_check.py", "--out", {str(tmp_path / "out.json")!r}]
sys.exit(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    while not (tmp_path / "out.json").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    statuses = {name: found["status"] for name, found in json.loads(stdout)["checks"].items()}
    assert statuses == {"first": "passed", "second": "not started"}
    assert json.loads((tmp_path / "out.json").read_text())["gpu"]["name"] == "Stand-in"
