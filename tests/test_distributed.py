"""Several processes on the loopback: the losses of one process, the death of a process, launchers, bad variables."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bimedix_jax.checkpoint.steps import read_arrays

pytestmark = pytest.mark.whole_process

ROOT = Path(__file__).parents[1]


def environment(devices: int, **more: str) -> dict[str, str]:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # the last one counts
    return os.environ | {"XLA_FLAGS": flags} | more


def command(folder: Path, steps: int, *more: str) -> list[str]:
    words = [sys.executable, "-m", "bimedix_jax", "train", "smoke", "--out", str(folder), "--steps", str(steps)]
    words += ["--rows", "2", "--wandb", "disabled", "--checkpoint-every", "2"]
    return [*words, "--set", 'mesh={"fsdp": 2}', "batch.accumulation=2", *more]


SHORT_HEARTBEATS = """
import sys
from bimedix_jax import cli, distributed
distributed.HEARTBEAT_SECONDS = 10
sys.exit(cli.main())
"""
MODULE = ("-m", "bimedix_jax")


def start_two(folder: Path, steps: int, *more: str, program: tuple[str, str] = MODULE) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    started = []
    for number in range(2):
        own = {"BIMEDIX_COORDINATOR": address, "BIMEDIX_PROCESSES": "2", "BIMEDIX_PROCESS": str(number)}
        with (folder.parent / f"{number}.log").open("w") as log:
            words = [sys.executable, *program, *command(folder, steps, *more)[3:], "--distributed"]
            started.append(subprocess.Popen(words, env=environment(1, **own), stderr=log))
    return started


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


TRAIN_AND_RESUME = """
import shlex, sys
from bimedix_jax import cli
sys.exit(cli.main(shlex.split(sys.argv[1])) or cli.main(["train", "--out", sys.argv[2], "--resume"]))
"""


def test_two_processes_train_as_one_and_resume(tmp_path):
    """One process trains the same experiment, and then resumes what the two have saved."""
    running = start_two(tmp_path / "two", 4)
    codes = [process.wait(timeout=300) for process in running]
    assert codes == [0, 0], (tmp_path / "0.log").read_text() + (tmp_path / "1.log").read_text()
    assert (tmp_path / "two" / "adapter" / "manifest.json").is_file()
    assert not list((tmp_path / "two").rglob("*.partial")), "no partial file is left"
    words = shlex.join(command(tmp_path / "one", 4)[3:])
    subprocess.run(
        [sys.executable, "-c", TRAIN_AND_RESUME, words, str(tmp_path / "two")],
        env=environment(2),
        check=True,
        capture_output=True,
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    ours, theirs = (read_arrays(tmp_path / name / "checkpoints", 4) for name in ("two", "one"))
    assert sum("['mu']" in name or "['nu']" in name for name in ours) == 2 * sum("['params']" in name for name in ours)
    for name, value in theirs.items():  # both moments too
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-3 * max(np.max(np.abs(value)), 1e-6))


def wait_for_steps(folder: Path, process: subprocess.Popen, count: int = 2) -> None:
    """Waits until the run has taken this many steps."""
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") >= count):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{metrics} has no {count} steps")
        assert process.poll() is None
        time.sleep(0.2)


def stop_all(running: list[subprocess.Popen]) -> None:
    for process in running:
        process.kill()
        process.wait()


def test_when_a_process_dies_the_others_stop_with_a_message(tmp_path):
    running = start_two(tmp_path / "run", 100_000, program=("-c", SHORT_HEARTBEATS))
    try:
        wait_for_steps(tmp_path / "run", running[0])
        running[1].send_signal(signal.SIGKILL)
        code = running[0].wait(timeout=120)
    finally:
        stop_all(running)
    output = (tmp_path / "0.log").read_text()
    assert code != 0
    messages = ("another process of this run has stopped", "coordination service")
    assert any(message in output.lower() for message in messages), output[-2000:]


def test_sigterm_to_one_process_stops_all(tmp_path):
    """SIGTERM to process 1: both save the step in progress and exit."""
    running = start_two(tmp_path / "run", 100_000)
    try:
        wait_for_steps(tmp_path / "run", running[0])
        running[1].send_signal(signal.SIGTERM)
        codes = [process.wait(timeout=120) for process in running]
    finally:
        stop_all(running)
    assert codes == [130, 130]
    assert "is saved; resume with `bimedix train --resume" in (tmp_path / "0.log").read_text()
    last = len(losses(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"{last:08d}" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"BIMEDIX_COORDINATOR": "127.0.0.1:1"}, "BIMEDIX_PROCESSES, BIMEDIX_PROCESS is not"),
        (
            {"BIMEDIX_COORDINATOR": "127.0.0.1:1", "BIMEDIX_PROCESSES": "2", "BIMEDIX_PROCESS": "2"},
            "There is no process 2 of 2",
        ),
    ],
)
def test_invalid_variables_raise(variables, message, monkeypatch):
    from bimedix_jax import distributed
    from bimedix_jax.errors import BimedixError

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BimedixError, match=message):
        distributed.start()


def test_the_ssh_launcher_starts_every_host(tmp_path):
    """A fake ssh logs its arguments."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\necho "$@" >> "$0.log"\n')
    ssh.chmod(0o755)
    subprocess.run(
        ["bash", str(ROOT / "scripts/launch/ssh.sh"), "alpha beta", "smoke", "--out", "a folder"],
        env=os.environ | {"BIMEDIX_SSH": str(ssh)},
        check=True,
    )
    lines = sorted((tmp_path / "ssh.log").read_text().splitlines())
    assert [line.split()[0] for line in lines] == ["alpha", "beta"]
    for number, line in enumerate(lines):
        assert "BIMEDIX_COORDINATOR=alpha:7733" in line
        assert f"BIMEDIX_PROCESS={number} " in line
        assert line.endswith(r"bimedix train smoke --out a\ folder --distributed")


@pytest.mark.parametrize("name", ["slurm", "tpu_pod", "ssh"])
def test_a_launcher_without_arguments_prints_its_usage(name):
    ran = subprocess.run(["bash", str(ROOT / f"scripts/launch/{name}.sh")], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "sbatch" in ran.stderr or f"scripts/launch/{name}.sh" in ran.stderr
