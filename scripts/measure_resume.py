"""Kills a training run at random moments: is it, after its restarts, bit by bit the run that nobody disturbed?

    python scripts/measure_resume.py --kills 100 --json     # about 20 minutes on two idle cores
    python scripts/measure_resume.py --kills 5 --no-seek    # a trial

The run is the smoke preset with packed rows of two languages, two micro-batches a step, dropout, routers that learn a
balancing bias without a gradient, held-out measurements, and a checkpoint every third step. One run is undisturbed.
Others get SIGKILL at random moments of five kinds, and are resumed by the same command: in the first seconds, during
compilation (every fifth start finds an empty compilation cache), during steps, while a checkpoint is written, and
during a held-out measurement. A run that ends is compared, and the next one is started, until there were enough kills.

`identical`: parameters, both moments, the routers' biases, the step (which determines the random numbers) and the
position in the data are bitwise those of the undisturbed run, in the last checkpoints and in the adapter, and
metrics.jsonl is the same apart from timings. `steps_lost`: steps that were done again, over all restarts.
`superseded_equal`: these gave the same numbers again. `schedule_shift`: steps by which the learning rate is off.
`seek`: milliseconds to open 1.3 million packed rows, and then to read the batch of a random step, with its CPU time.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bimedix_jax.checkpoint.integrity import MANIFEST
from bimedix_jax.checkpoint.steps import read_arrays
from bimedix_jax.data import loader, pack
from bimedix_jax.errors import natural, run_script
from bimedix_jax.training.metrics import TIMINGS
from bimedix_jax.training.metrics_file import readable

STEPS, SAVE_EVERY, EVALUATE_EVERY, KEEP = 24, 3, 4, 4
LENGTH, ROWS, HELDOUT_ROWS, VOCABULARY = 64, 20, 160, 256
SEEK_ROWS, SEEKS, SEEK_BATCH = 1_300_000, 50, 16
MOMENTS = ("first seconds", "compilation", "step", "save", "evaluation")
RESTORED, COMPILED = ("restored the state", "has no checkpoint yet"), "compiled in"


def packed(folder: Path, rows: int, seed: int) -> Path:
    """Rows with several documents each, half of them Arabic by their label."""
    draws = np.random.default_rng(seed)
    examples = []
    for number in range(3 * rows):
        tokens = draws.integers(1, VOCABULARY, draws.integers(8, LENGTH // 2), dtype=np.int32)
        learned = np.arange(len(tokens)) >= 4
        examples.append(pack.Example(f"{seed}.{number}", ("en", "ar")[number % 2], "qa", "kills", tokens, learned))
    folder.mkdir()
    report = pack.PackReport()
    pack.write(folder, pack.pack(examples, LENGTH, report=report), report, LENGTH, {"pad_id": 0})
    return folder


@dataclasses.dataclass
class Place:
    """Where everything is, and how long the parts of the undisturbed run took.

    Attributes:
      start, compile: seconds from a start to the compilation, and of a compilation without a cache.
    """

    folder: Path
    start: float = 4.0
    compile: float = 4.0
    starts: int = 0

    def launch(self, out: Path, cached: bool = True) -> subprocess.Popen[bytes]:
        """Starts the run in `out`, or resumes it."""
        self.starts += 1
        command = [sys.executable, "-m", "bimedix_jax", "train", "--out", str(out)]
        if (out / "config.json").is_file():
            command += ["--resume"]
        else:
            command += ["smoke", "--data", str(self.folder / "rows"), "--heldout", str(self.folder / "heldout")]
            command += ["--steps", str(STEPS), "--eval-every", str(EVALUATE_EVERY)]
            command += [
                "--checkpoint-every",
                str(SAVE_EVERY),
                "--set",
                f"keep={KEEP}",
                "lora.dropout=0.2",
                "data.synthetic_rows=0",
            ]
            command += ["router.variant=sigmoid_bias", "router.bias_rate=0.01", 'router.languages=["en", "ar"]']
        cache = self.folder / ("cache" if cached else f"cache-{self.starts}")
        more = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        with log_of(out).open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env={"JAX_PLATFORMS": "cpu", **os.environ, **more})


def log_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.log")


def said(out: Path, *texts: str) -> bool:
    """Whether the last start has printed one of these."""
    output = log_of(out).read_text("utf-8", "replace")
    return any(text in output for text in texts)


def lines(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def saving(out: Path) -> bool:
    return any((out / "checkpoints").glob(".*.partial"))


def before_evaluation(out: Path) -> bool:
    """Whether the last line is that of the step before a measurement. The line of that step is written after it."""
    return lines(out) % EVALUATE_EVERY == EVALUATE_EVERY - 1


def complete_steps(out: Path) -> list[int]:
    return sorted(int(path.parent.name) for path in (out / "checkpoints").glob(f"[0-9]*/{MANIFEST}"))


def undisturbed(place: Place) -> Path:
    """Runs to the end twice, without and with a compilation cache, and measures the first."""
    out = place.folder / "undisturbed"
    began = time.monotonic()
    process = place.launch(out)
    while process.poll() is None and not said(out, *RESTORED) and not (out / "config.json").is_file():
        time.sleep(0.02)
    place.start = time.monotonic() - began
    while process.poll() is None and not said(out, COMPILED):
        time.sleep(0.02)
    place.compile = time.monotonic() - began - place.start
    finish(process, out)
    return out


def finish(process: subprocess.Popen[bytes], out: Path) -> None:
    if process.wait() != 0:
        sys.exit(f"the run failed:\n{log_of(out).read_text('utf-8')[-3000:]}")


def wait(process: subprocess.Popen[bytes], out: Path, moment: str, place: Place, draws: random.Random) -> bool:
    """Waits for a random moment of a kind; False if the run ended before."""
    more, wanted = 0.0, lines(out) + draws.randint(1, 6)
    if moment == "first seconds":
        reached, more = (lambda: True), draws.uniform(0.0, place.start)
    elif moment == "compilation":
        reached, more = (lambda: said(out, *RESTORED, COMPILED)), draws.uniform(0.0, place.compile)
    elif moment == "step":
        reached, more = (lambda: said(out, COMPILED) and lines(out) >= wanted), draws.uniform(0.0, 0.05)
    elif moment == "save":
        chance, seen = draws.randint(1, 3), set[str]()

        def reached() -> bool:
            seen.update(path.name for path in (out / "checkpoints").glob(".*.partial"))
            return len(seen) >= chance

        more = draws.uniform(0.0, 0.2)
    else:
        reached, more = (lambda: said(out, COMPILED) and before_evaluation(out)), draws.uniform(0.0, 0.3)
    deadline = time.monotonic() + 120.0
    while not reached():
        if process.poll() is not None or time.monotonic() > deadline:
            return process.poll() is None
        time.sleep(0.001)
    time.sleep(more)
    return process.poll() is None


def landed(out: Path, before: tuple[bool, bool]) -> str:
    """The kind of moment at which a kill hit, from what the run had printed and written. `before`: see `kill`."""
    if not said(out, COMPILED):
        return "compilation" if said(out, *RESTORED) else "first seconds"
    partial, evaluating = before
    return "save" if partial else "evaluation" if evaluating else "step"


@dataclasses.dataclass
class Kills:
    """What was killed so far, over all runs."""

    wanted: int
    done: int = 0
    lost: list[int] = dataclasses.field(default_factory=list)
    landed: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(MOMENTS, 0))
    ended_before: int = 0


def disturb(out: Path, place: Place, draws: random.Random, kills: Kills) -> None:
    """Runs to the end, killing on the way until there were enough kills."""
    process = place.launch(out)
    while kills.done < kills.wanted:
        if not wait(process, out, draws.choice(MOMENTS), place, draws):
            kills.ended_before += 1
            break
        before = saving(out), before_evaluation(out)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            kills.ended_before += 1
            break
        kills.done += 1
        kills.landed[landed(out, before)] += 1
        kills.lost.append(lines(out) - max(complete_steps(out), default=0))
        if sys.stderr.isatty():
            print(f"\r{kills.done} kills, {out.name} has {lines(out)} of {STEPS} steps", end="", file=sys.stderr)
        process = place.launch(out, cached=draws.random() > 0.2)
    finish(process, out)


def numbers(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics without timings."""
    return [{name: x for name, x in value.items() if name not in TIMINGS} for _, value in readable(path)]


def content(out: Path) -> dict[str, Any]:
    """Everything of a finished run that has to be the same: arrays as bytes, positions, metrics, adapter."""
    found: dict[str, Any] = {"metrics": numbers(out / "metrics.jsonl"), "steps": complete_steps(out)}
    for step in found["steps"]:
        folder = out / f"checkpoints/{step:08d}"
        found[f"{step} position"] = (folder / "position.json").read_bytes()
        for name, array in read_arrays(out / "checkpoints", step).items():
            found[f"{step} {name}"] = (str(array.dtype), array.shape, array.tobytes())
    return found | {path.name: path.read_bytes() for path in (out / "adapter").glob("*.safetensors")}


def different(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def repeated_equal(out: Path) -> bool:
    """Whether the steps that were done again gave the numbers of the first time."""
    final = {line["step"]: line for line in numbers(out / "metrics.jsonl")}
    first = [line for path in out.glob("metrics.superseded-*.jsonl") for line in numbers(path)]
    return all(final[line["step"]] == line for line in first)


def schedule_shift(out: Path) -> float:
    """Largest number of steps by which the learning rate is off, judged by its formula in double precision."""
    from bimedix_jax.experiment import read

    config = read(out / "config.json").optimiser

    def rate(step: float) -> float:
        """Of step 1, 2, ...: the last step of the warm-up has the peak."""
        if step <= config.warmup_steps:
            return config.learning_rate * step / config.warmup_steps
        through = min((step - config.warmup_steps) / (STEPS + 1 - config.warmup_steps), 1.0)
        share = config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * through))
        return config.learning_rate * share

    shift = 0
    for line in numbers(out / "metrics.jsonl"):
        nearest = min(range(1, STEPS + 1), key=lambda step, line=line: abs(rate(step) - line["learning_rate"]))
        shift = max(shift, abs(nearest - line["step"]) if rate(nearest) != rate(line["step"]) else 0)
    return shift


@dataclasses.dataclass
class Prepared:
    """A row as the bytes that are stored."""

    content: bytes

    def to_bytes(self) -> bytes:
        return self.content


def seek(folder: Path, draws: random.Random) -> dict[str, Any]:
    """Milliseconds to open a large packed folder with its first row, and then to read the batch of a random step."""
    small = loader.batches(packed(folder / "few", 64, 3), 64, 0).rows(0)
    content = [Prepared(row.to_bytes()) for row in small]
    many, report = folder / "many", pack.PackReport(rows=SEEK_ROWS)
    many.mkdir()
    rows: Any = (content[number % len(content)] for number in range(SEEK_ROWS))
    pack.write(many, rows, report, LENGTH, {"pad_id": 0})
    last = 2 * SEEK_ROWS // SEEK_BATCH - 1
    steps = [0, last, *(draws.randrange(last) for _ in range(SEEKS))]
    times: dict[str, list[float]] = {name: [] for name in ("open", "seek", "seek_cpu")}
    for step in steps:
        began = time.perf_counter()
        batches = loader.batches(many, SEEK_BATCH, 0, epochs=2)
        batches.at(0, [0])
        opened, cpu = time.perf_counter(), time.process_time()
        batches.at(step, range(SEEK_BATCH))
        times["open"].append(opened - began)
        times["seek"].append(time.perf_counter() - opened)
        times["seek_cpu"].append(time.process_time() - cpu)
    return {"rows": SEEK_ROWS, "tries": len(steps)} | {
        f"{name}_{kind}_ms": round(1e3 * value, 2)
        for name, values in times.items()
        for kind, value in (("median", statistics.median(values)), ("max", max(values)))
    }


def measure(wanted: int, seed: int, folder: Path, with_seek: bool) -> dict[str, Any]:
    draws, place, began = random.Random(seed), Place(folder), time.monotonic()
    packed(folder / "rows", ROWS, 1)
    packed(folder / "heldout", HELDOUT_ROWS, 2)
    first = undisturbed(place)
    expected, kills, runs, wrong = content(first), Kills(wanted), [first], list[str]()
    while kills.done < wanted:
        runs.append(folder / f"killed-{len(runs)}")
        disturb(runs[-1], place, draws, kills)
        wrong += different(content(runs[-1]), expected)
    result: dict[str, Any] = {
        "kills": kills.done,
        "identical": not wrong,
        "different": wrong[:10],
        "restarts": kills.done,
        "steps_lost": sum(kills.lost),
        "steps_lost_by_one_kill": max(kills.lost, default=0),
        "superseded_equal": all(repeated_equal(out) for out in runs),
        "schedule_shift": max(schedule_shift(out) for out in runs),
        "moments": kills.landed,
        "runs": len(runs) - 1,
        "runs_that_ended_before_their_kill": kills.ended_before,
        "compared_arrays": sum(isinstance(value, tuple) for value in expected.values()),
        "seconds": round(time.monotonic() - began, 1),
    }
    return result | ({"seek": seek(folder, draws)} if with_seek else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=natural, default=100)
    parser.add_argument("--seed", type=natural, default=0, help="draws the moments")
    parser.add_argument("--no-seek", action="store_true", help="leave out the 1.3 million rows")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.kills, options.seed, Path(folder), not options.no_seek)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name}: {value}")
    if not result["identical"] or not result["superseded_equal"] or result["schedule_shift"]:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
