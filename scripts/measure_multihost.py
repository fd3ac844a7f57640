"""Compares training in several processes with one process, and kills one process to see when the others stop.

    python scripts/measure_multihost.py --processes 4 --json

Runs `bimedix train smoke` on four CPU devices in total, in one process and in `--processes` processes on the loopback.
Then it starts the latter again, kills one process with SIGKILL after two steps, and waits for the others.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bimedix_jax.errors import positive, run_script

DEVICES = 4
STEPS = 6
LIMIT = 600.0
"""Time limit of a run in seconds."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folder: Path, processes: int, steps: int) -> list[subprocess.Popen[str]]:
    """Starts the processes of a run with DEVICES CPU devices in total. Logs are written beside `folder`."""
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "bimedix_jax", "train", "smoke", "--out", str(folder), "--steps", str(steps)]
    command += ["--rows", "4", "--accumulation", "2", "--aux-scope", "global", "--wandb", "disabled"]
    command += ["--checkpoint-every", "3", "--set", 'mesh={"fsdp": 2, "expert": 2}']
    started = []
    for number in range(processes):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes}",
        }
        if processes > 1:
            environment |= {
                "BIMEDIX_COORDINATOR": address,
                "BIMEDIX_PROCESSES": str(processes),
                "BIMEDIX_PROCESS": str(number),
            }
        output = (folder.parent / f"{folder.name}.{number}.log").open("w")
        more = ["--distributed"] if processes > 1 else []
        started.append(
            subprocess.Popen(command + more, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)
        )
    return started


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def train(folder: Path, processes: int) -> list[float]:
    """Runs to the end and returns the losses."""
    running = start(folder, processes, STEPS)
    codes = [process.wait(LIMIT) for process in running]
    if any(codes):
        logs = "\n".join(path.read_text("utf-8")[-2000:] for path in folder.parent.glob(f"{folder.name}.*.log"))
        raise SystemExit(f"exit codes {codes} with {processes} processes:\n{logs}")
    return losses(folder)


def kill_one(folder: Path, processes: int) -> dict[str, Any]:
    """Kills the last process. Returns the time until the others exit, their exit codes and their last messages."""
    running = start(folder, processes, steps=100_000)
    try:
        began = time.monotonic()
        metrics = folder / "metrics.jsonl"
        while not (metrics.exists() and len(metrics.read_text("utf-8").splitlines()) >= 2):
            if time.monotonic() - began > LIMIT or any(process.poll() is not None for process in running):
                raise SystemExit(f"the run did not start; see {folder.parent}")
            time.sleep(0.2)
        running[-1].send_signal(signal.SIGKILL)
        began = time.monotonic()
        codes = [process.wait(LIMIT) for process in running[:-1]]
        seconds = time.monotonic() - began
    finally:
        for process in running:
            process.kill()
    logs = [
        (folder.parent / f"{folder.name}.{number}.log").read_text("utf-8").strip().splitlines()
        for number in range(processes - 1)
    ]
    messages = [
        next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")
        for lines in logs
    ]
    return {"seconds_to_stop": round(seconds, 1), "exit_codes": codes, "messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=positive, default=2, choices=(2, 4))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        one = train(place / "one", 1)
        many = train(place / "many", options.processes)
        result = {
            "processes": options.processes,
            "devices": DEVICES,
            "steps": STEPS,
            "losses": many,
            "loss_diff": max(abs(a - b) for a, b in zip(one, many, strict=True)),
            **kill_one(place / "killed", options.processes),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run_script(main)
