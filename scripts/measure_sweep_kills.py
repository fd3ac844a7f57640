"""Kills a sweep of six tiny runs at random moments: is the final table the same, and was anything finished repeated?

    python scripts/measure_sweep_kills.py --kills 30 --json     # about five minutes on two idle cores
    python scripts/measure_sweep_kills.py --kills 3             # a trial

One sweep is undisturbed. Another gets SIGKILL: three times in four the sweep itself, otherwise one of its runs, as the
system does when memory runs out. The moments are a random time after the start, which may be during imports or
compilation, or a random number of steps later. After `--kills` kills it runs to the end. If it finishes before that,
another sweep is killed in the same way.

`identical`: report.md, report.csv and report.html have the same bytes, and all runs the same evaluation. `repeated`:
runs that started again, or whose files changed, after they were finished. `survivors`: processes of a run that lived
ten seconds after their sweep was killed.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bimedix_jax.errors import natural, run_script
from bimedix_jax.sweeps.folder import EVALUATION, RUNS, read_incidents

STUDY = '''"""Kills: do they change the table?"""

from bimedix_jax.experiment import override
from bimedix_jax.presets import smoke
from bimedix_jax.sweeps.study import Contrast, Size

TINY = {
    "model.random.vocab_size": 64,
    "model.random.hidden_size": 16,
    "model.random.intermediate_size": 16,
    "model.random.num_layers": 1,
    "model.random.num_heads": 2,
    "model.random.num_kv_heads": 1,
    "model.random.head_dim": 8,
    "model.base": "float32",
    "model.dtype": None,
    "data.sequence_length": 16,
    "batch.accumulation": 1,
    "steps": 12,
    "checkpoint_every": 3,
    "remat": "none",
    "kernels.expert_mlp": "composed",
    "kernels.grouped_matmul": "ragged_dot",
}
ARMS = {f"rank-{rank}": override(smoke(), {**TINY, "lora.rank": rank}) for rank in (1, 2, 3)}
SEEDS = 2
PRIMARY = Contrast("nll", "rank-3", "rank-1", -1)
SIZES = {"smoke": Size()}
'''
REPORT = ("report.md", "report.csv", "report.html")
GRACE = 10.0
"""Seconds that the runs of a killed sweep may live."""


def start(study: Path, out: Path, log: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "bimedix_jax", "sweep", str(study), "--size", "smoke", "--out", str(out), "--retry"]
    with log.open("ab") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, env={"JAX_PLATFORMS": "cpu", **os.environ})


def finish(study: Path, out: Path, log: Path) -> None:
    """Runs to the end."""
    if start(study, out, log).wait() != 0:
        sys.exit(f"the sweep failed:\n{log.read_text('utf-8')[-2000:]}")


def run_folders(out: Path) -> list[Path]:
    return sorted(out.glob(f"*/{RUNS}/*"))


def steps(out: Path) -> int:
    """Steps that all runs have logged."""
    found = (folder / "training/metrics.jsonl" for folder in run_folders(out))
    return sum(path.read_bytes().count(b"\n") for path in found if path.is_file())


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of the report with its pictures, and of every evaluation."""
    pictures = sorted(out.glob("*.png"))
    paths = [*(out / name for name in REPORT), *pictures, *(folder / EVALUATION for folder in run_folders(out))]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def finished(out: Path) -> dict[str, int]:
    """Time of change of each evaluation, in nanoseconds."""
    paths = (folder / EVALUATION for folder in run_folders(out))
    return {str(path): path.stat().st_mtime_ns for path in paths if path.is_file()}


def workers(out: Path) -> list[int]:
    """Processes that run an arm of this sweep."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"sweeps.worker" in line and f"{out}/".encode() in line:
            found.append(int(path.parent.name))
    return found


def wait(process: subprocess.Popen[bytes], out: Path, draws: random.Random, scale: float) -> bool:
    """Waits for a random moment; False if the sweep ended before."""
    if draws.random() < 0.5:
        deadline, wanted = time.monotonic() + draws.uniform(0.0, scale), None
    else:
        deadline, wanted = time.monotonic() + 120.0, steps(out) + draws.randint(1, 6)
    while time.monotonic() < deadline and (wanted is None or steps(out) < wanted):
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    time.sleep(draws.uniform(0.0, 0.2))
    return process.poll() is None


def survivors(out: Path) -> int:
    """Runs that live GRACE seconds after their sweep was killed."""
    deadline = time.monotonic() + GRACE
    while (alive := workers(out)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(alive)


@dataclass
class Kills:
    """What was killed so far, over all sweeps."""

    wanted: int
    done: int = 0
    of_runs: int = 0
    survivors: int = 0
    ended_before: int = 0


def disturb(study: Path, out: Path, log: Path, draws: random.Random, scale: float, kills: Kills) -> int:
    """Runs a sweep to its end, killing until there were enough kills. Returns how many finished runs were repeated."""
    first: dict[str, int] = {}
    process = start(study, out, log)
    while kills.done < kills.wanted:
        if not wait(process, out, draws, scale):
            kills.ended_before += 1
            process.wait()
            if len(finished(out)) == len(run_folders(out)) > 0:
                break  # nothing is left to kill
            process = start(study, out, log)
            continue
        victims = workers(out)
        if victims and draws.random() < 0.25:
            kills.of_runs += 1
            os.kill(draws.choice(victims), signal.SIGKILL)
        else:
            process.kill()
            process.wait()
            kills.survivors += survivors(out)
            process = start(study, out, log)
        kills.done += 1
        first |= {path: when for path, when in finished(out).items() if path not in first}
        if sys.stderr.isatty():
            print(f"\r{kills.done} kills, {len(first)} of 6 runs of {out.name} finished", end="", file=sys.stderr)
    process.wait()
    finish(study, out, log)
    return sum(finished(out)[path] != when for path, when in first.items()) + started_again(out)


def measure(wanted: int, seed: int, folder: Path) -> dict[str, Any]:
    draws, study, log = random.Random(seed), folder / "kills.py", folder / "log"
    study.write_text(STUDY, "utf-8")
    began = time.monotonic()
    finish(study, folder / "undisturbed", log)
    scale = (time.monotonic() - began) / 4  # a run with its start takes a sixth
    expected, kills, identical, repeated, sweeps = digests(folder / "undisturbed"), Kills(wanted), True, 0, 0
    while kills.done < wanted:  # a sweep may finish before there were enough kills; then another one is killed
        sweeps += 1
        out = folder / f"killed-{sweeps}"
        repeated += disturb(study, out, log, draws, scale, kills)
        identical = identical and digests(out) == expected
    return {
        "kills": kills.done,
        "identical": identical,
        "repeated": repeated,
        "survivors": kills.survivors,
        "sweeps": sweeps,
        "kills_of_runs": kills.of_runs,
        "sweeps_that_ended_before_their_kill": kills.ended_before,
        "seconds": round(time.monotonic() - began, 1),
    }


def started_again(out: Path) -> int:
    """Starts of a run after it was finished."""
    done, found = set[str](), 0
    for line in read_incidents(next(out.glob("kills-*"))):
        found += line["event"] == "start" and line["identity"] in done
        done |= {line["identity"]} if line["event"] == "finish" else set()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=natural, default=30)
    parser.add_argument("--seed", type=natural, default=0, help="draws the moments")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.kills, arguments.seed, Path(folder))
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name}: {value}")
    if not result["identical"] or result["repeated"] or result["survivors"]:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
