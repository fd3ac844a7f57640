"""Time and memory of the test suite: seconds by folder and by test, and the most memory that all its processes held.

    python scripts/measure_tests.py --json                      # the whole suite, as scripts/test.sh runs it
    python scripts/measure_tests.py tests/kernels --json        # arguments without dashes go to pytest

Memory is the sum of the proportional set sizes of pytest, its workers and the programs that tests start, sampled every
six seconds: a page that several processes share counts once. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bimedix_jax.errors import BimedixError, run_script

ROOT = Path(__file__).resolve().parents[1]
SAMPLED = 6.0
"""Seconds between two samples of memory. To read the pages of some GiB takes a few hundredths of a second each time."""


def descendants(root: int) -> list[int]:
    """Process `root` and every process below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue  # it has ended
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        found.append(waiting.pop())
        waiting += children.get(found[-1], [])
    return found


def memory_of(processes: list[int]) -> int:
    """Bytes of their proportional set sizes."""
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has ended
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def watch(process: int, ended: threading.Event, peaks: list[int]) -> None:
    while not ended.wait(SAMPLED):
        peaks[0] = max(peaks[0], memory_of(descendants(process)))


def durations(report: Path) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
    """(seconds by folder, seconds by test, number of tests by outcome) of a JUnit report."""
    folders: defaultdict[str, float] = defaultdict(float)
    tests: defaultdict[str, float] = defaultdict(float)
    outcomes = Counter[str]()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        parts, seconds = case.attrib["classname"].split("."), float(case.attrib["time"])
        folders[parts[1] if len(parts) > 2 else "."] += seconds
        tests[f"{'/'.join(parts)}.py::{case.attrib['name']}"] += seconds
        outcomes[next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")] += 1
    return longest(folders), longest(tests, 25), dict(outcomes)


def longest(seconds: dict[str, float], count: int | None = None) -> dict[str, float]:
    return {name: round(seconds[name], 1) for name in sorted(seconds, key=seconds.__getitem__, reverse=True)[:count]}


def measure(arguments: list[str], workers: str) -> dict[str, Any]:
    if not Path("/proc/self/smaps_rollup").exists():
        raise BimedixError("This needs Linux, whose /proc has the memory of each process.")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "--dist", "worksteal", f"--junitxml={report}"]
        began, before = time.perf_counter(), os.times()
        process = subprocess.Popen([*command, *arguments], cwd=ROOT, stdout=sys.stderr)
        ended, peaks = threading.Event(), [0]
        sampler = threading.Thread(target=watch, args=(process.pid, ended, peaks))
        sampler.start()
        code = process.wait()
        ended.set()
        sampler.join()
        after = os.times()
        if not report.exists():
            raise BimedixError(f"pytest ended with exit code {code} before it wrote its report; its output is above.")
        folders, tests, outcomes = durations(report)
    return {
        "exit_code": code,
        "cores": len(os.sched_getaffinity(0)),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(sum(after[2:4]) - sum(before[2:4]), 1),
        "peak_bytes": peaks[0],
        "outcomes": outcomes,
        "seconds_by_folder": folders,
        "slowest": tests,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tests", nargs="*", help="tests to run, all by default")
    parser.add_argument("--workers", default="auto", help="workers of pytest-xdist")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    found = measure(options.tests, options.workers)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['seconds']:.0f} s, {found['cpu_seconds']:.0f} s of CPU, peak {found['peak_bytes'] / 2**30:.1f} GiB")
    for name, seconds in (found["seconds_by_folder"] | found["slowest"]).items():
        print(f"{seconds:8.1f} s  {name}")


if __name__ == "__main__":
    run_script(main)
