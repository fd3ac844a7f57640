"""Trains the smoke model for 2,000 steps with a save every 20: do memory, open files or the time of a step grow?

    python scripts/measure_soak.py --json                   # one to two minutes on two idle cores
    python scripts/measure_soak.py --steps 400 --warm-up 100

The run is a process of its own, whose resident memory and open files are read ten times a second. Times of steps are
those of metrics.jsonl, without saves. The mean of the last fifth of the steps is compared with that of the fifth after
the warm-up. Of the times of steps, the fastest quarter of each fifth counts, since other programs only slow steps down.

`growth`: last over first, minus 1, of each. `within`: whether each is below 2 %.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bimedix_jax.errors import natural, positive, run_script
from bimedix_jax.training.metrics_file import read_metrics

LIMIT = 0.02
PAUSE = 0.1


def sample(pid: int, metrics: Path) -> dict[str, int] | None:
    """Steps, resident bytes and open files of a process; None if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        handles = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except (OSError, IndexError):
        return None
    steps = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
    return {"step": steps, "memory": pages * os.sysconf("SC_PAGE_SIZE"), "handles": handles}


def watched(out: Path, steps: int, every: int) -> list[dict[str, int]]:
    """Runs to the end, and returns the samples."""
    words = ["train", "smoke", "--out", str(out), "--steps", str(steps), "--checkpoint-every", str(every)]
    log = out.with_name("log")
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "bimedix_jax", *words],
            stdout=file,
            stderr=file,
            env={"JAX_PLATFORMS": "cpu", **os.environ},
        )
    samples = []
    while process.poll() is None:
        found = sample(process.pid, out / "metrics.jsonl")
        samples += [found] if found else []
        time.sleep(PAUSE)
    if process.returncode:
        sys.exit(f"the run failed:\n{log.read_text('utf-8')[-2000:]}")
    return samples


def fastest(times: list[float]) -> float:
    """Mean of the fastest quarter."""
    return statistics.fmean(sorted(times)[: max(len(times) // 4, 1)])


def compared(first: float, last: float) -> dict[str, float]:
    return {"first": first, "last": last, "growth": round(last / first - 1, 4)}


def measure(steps: int, warm_up: int, every: int, folder: Path) -> dict[str, Any]:
    out = folder / "run"
    began = time.monotonic()
    samples = watched(out, steps, every)
    fifth = (steps - warm_up) // 5
    early, late = range(warm_up + 1, warm_up + fifth + 1), range(steps - fifth + 1, steps + 1)

    def mean(name: str, part: range) -> float:
        return statistics.fmean(one[name] for one in samples if one["step"] in part)

    lines = read_metrics(out)
    times = {line["step"]: line["seconds"] for line in lines}
    rows = {name: compared(mean(name, early), mean(name, late)) for name in ("memory", "handles")}
    rows["seconds"] = compared(*(fastest([times[step] for step in part]) for part in (early, late)))
    stalls = [line["save_stall_seconds"] for line in lines if "save_stall_seconds" in line]
    return {
        "steps": steps,
        "saves": steps // every,
        "warm_up": warm_up,
        "samples": len(samples),
        **rows,
        "peak_memory": max(one["memory"] for one in samples),
        "stall_median": statistics.median(stalls),
        "stall_max": max(stalls),
        "within": all(row["growth"] < LIMIT for row in rows.values()),
        "duration": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=2000)
    parser.add_argument("--warm-up", type=natural, default=500, help="steps that are left out at the start")
    parser.add_argument("--every", type=positive, default=20, help="steps between saves")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.steps, options.warm_up, options.every, Path(folder))
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name}: {value}")
    if not result["within"]:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
