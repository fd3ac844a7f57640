"""All checks that need one GPU, the cheapest first, each in a separate process and within a budget of seconds.

    scripts/gpu_check.sh                                   # installs, then runs this
    python scripts/gpu_check.py --budget 480 --out gpu_check.json

| check | what it runs |
|---|---|
| kernels | the parity suite of the kernels, compiled for this GPU |
| step | optimiser steps of Mixtral-8x7B in full size with random weights; peak memory against the planner's |
| train | an optimiser step at full width and two layers against transformers + peft + bitsandbytes |
| decode | prefill and decoding at full width and two layers against transformers + bitsandbytes |

The document on stdout has a result for each check: `passed`, `failed`, `cut off` or `not started`, its seconds, and its
own JSON or the end of its output. If the script is interrupted or terminated, it prints the results so far; `--out` has
them after each check. The exit code is 1 if a check failed.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TAIL = 4000
"""Characters of a check's output that are kept where it is no JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """A command and the seconds that it may take."""

    command: tuple[str, ...]
    seconds: int
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


PYTHON = sys.executable
BENCH = (PYTHON, "-m", "bimedix_jax", "bench")
FULL_WIDTH = ("--against", "transformers", "--size", "full_width", "--base", "nf4", "--repetitions", "3", "--json")

CHECKS = {
    "kernels": Check(
        command=(
            *(PYTHON, "-m", "pytest", "-q", "-n", str(max(1, min(10, os.cpu_count() or 1))), "tests/kernels"),
            *("-k", "attention or grouped or nf4_matmul or transformations", "-p", "no:cacheprovider"),
        ),
        seconds=120,
        # every worker has its own client: none may take all memory
        environment={"BIMEDIX_TEST_PLATFORM": "gpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    ),
    "step": Check(
        command=(PYTHON, "scripts/measure_full_size.py", "--steps", "1", "--kernels", "30", "--json"), seconds=180
    ),
    "train": Check(command=(*BENCH, "train", *FULL_WIDTH), seconds=120),
    "decode": Check(command=(*BENCH, "decode", *FULL_WIDTH, "--decode-batches", "1", "8"), seconds=120),
}


def run_check(check: Check, seconds: float) -> dict[str, Any]:
    """Runs a check for at most `seconds`, then stops it and every process that it started."""
    began = time.perf_counter()
    process = subprocess.Popen(
        check.command,
        cwd=ROOT,
        env=os.environ | check.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    status = "cut off"
    try:
        stdout, stderr = process.communicate(timeout=seconds)
        status = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        stop(process)
        stdout, stderr = process.communicate()
    except BaseException:
        stop(process)
        raise
    found: dict[str, Any] = {"status": status, "seconds": round(time.perf_counter() - began, 1)}
    with contextlib.suppress(json.JSONDecodeError):
        return found | {"result": json.loads(stdout)}
    return found | {"output": stdout[-TAIL:], "errors": "" if status == "passed" else stderr[-TAIL:]}


def stop(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def gpu() -> dict[str, str] | None:
    """Name, memory and driver of the first GPU; None where there is none."""
    fields = ("name", "memory.total", "driver_version")
    try:
        shown = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    values = [value.strip() for value in shown.splitlines()[0].split(",")] if shown.strip() else []
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None


def check_all(names: list[str], budget: float, document: dict[str, Any], out: Path | None) -> Iterator[str]:
    """Fills `document["checks"]`, in order; yields each name when its result is there."""
    began = time.perf_counter()
    for name in names:
        left = budget - (time.perf_counter() - began)
        if left > 10:
            document["checks"][name] = run_check(CHECKS[name], min(left, CHECKS[name].seconds))
        document["seconds"] = round(time.perf_counter() - began, 1)
        if out is not None:
            temporary = out.with_name(f"{out.name}.partial")
            temporary.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
            temporary.rename(out)
        yield name


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=480, help="seconds for all checks together")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), help="these checks, in this order")
    parser.add_argument("--out", type=Path, help="file that holds the document after each check")
    options = parser.parse_args()
    device = gpu()
    if device is None:
        print("No NVIDIA GPU was found (nvidia-smi does not answer): nothing to check.", file=sys.stderr)
        return 0
    names = options.only or list(CHECKS)
    document: dict[str, Any] = {"gpu": device, "seconds": 0.0, "checks": {n: {"status": "not started"} for n in names}}

    def terminate(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        for name in check_all(names, options.budget, document, options.out):
            print(f"{name}: {document['checks'][name]['status']}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted: the document holds what was finished", file=sys.stderr)
    print(json.dumps(document, indent=2), flush=True)
    return int(any(check["status"] == "failed" for check in document["checks"].values()))


if __name__ == "__main__":
    sys.exit(main())
