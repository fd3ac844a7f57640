"""Kills an evaluation at random moments: does it end with the same bytes, and was any result computed twice?

    python scripts/measure_eval_kills.py --kills 20 --json     # about four minutes on two idle cores
    python scripts/measure_eval_kills.py --kills 3             # a trial

A tiny random model answers 600 questions in two languages, also in another order of the options, and its loss is
measured. One evaluation is undisturbed. Another gets SIGKILL: every second time after a random time since its start,
which may be during imports or compilation, otherwise a random number of batches later. After `--kills` kills it runs to
the end. If it finishes before that, another evaluation is killed in the same way.

`identical`: the result and the predictions have the same bytes. `repeated`: results that were computed again although
they were on disk. `continued`: starts that found results of an earlier start.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bimedix_jax import startup
from bimedix_jax.errors import natural, run_script

QUESTIONS = 600
WORDS = {
    "en": "which vitamin prevents scurvy bleeding gums tired patient child fever dose tablet daily".split(),
    "ar": "أي فيتامين يقي من نزف اللثة مريض طفل حمى جرعة قرص يوميا".split(),
}


def prepare(folder: Path) -> None:
    """Writes a model and its questions."""
    from bimedix_jax.checkpoint.hf import export_hf
    from bimedix_jax.data.records import (
        Record,
        conversation,
        multiple_choice_answer,
        multiple_choice_question,
        write_jsonl,
    )
    from bimedix_jax.data.tokenizer import byte_tokenizer
    from bimedix_jax.models.config import MixtralConfig, RouterConfig
    from bimedix_jax.models.init import init_random

    config = MixtralConfig(
        vocab_size=304,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        router=RouterConfig(num_experts=4, top_k=2),
        rope_theta=10_000.0,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_embeddings=False,
        max_position_embeddings=512,
    )
    tokenizer = byte_tokenizer(folder / "tokenizer")
    export_hf(init_random(config, seed=3, std=0.3), folder / "model", tokenizer_from=tokenizer.folder)
    draws, rows = random.Random(0), []
    for number in range(QUESTIONS):
        language = ("en", "ar")[number % 2]
        text = " ".join(draws.choices(WORDS[language], k=draws.randint(3, 12))) + "?"
        choices = tuple(f"{draws.choice(WORDS[language])} {place}" for place in range(4))
        answer = draws.randrange(4)
        turns = (multiple_choice_question(text, choices), multiple_choice_answer(choices, answer, language))
        about: dict[str, Any] = {"id": f"q{number}", "language": language, "kind": "mcqa", "source": "made"}
        about |= {"licence": "CC0-1.0", "choices": choices, "answer": answer, "conversations": conversation(*turns)}
        rows.append(Record(**about))
    write_jsonl(folder / "records.jsonl", rows)


def start(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    words = ["eval", "run", "--model", str(folder / "model"), "--base", "float32", "--batch-tokens", "1024"]
    words += ["--heldout", str(folder / "records.jsonl"), "--orders", "1", "--out", str(out)]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, **cache}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "bimedix_jax", *words], stdout=log, stderr=log, env=environment)


def finish(folder: Path, out: Path) -> None:
    """Runs to the end."""
    if start(folder, out).wait() != 0:
        sys.exit(f"the evaluation failed:\n{(folder / 'log').read_text('utf-8')[-2000:]}")


def results_of(out: Path) -> Path:
    """The results of an unfinished evaluation."""
    from bimedix_jax.evals.journal import RESULTS, folder_of

    return folder_of(out) / RESULTS


def lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def wait(process: subprocess.Popen[bytes], results: Path, draws: random.Random, scale: float) -> bool:
    """Waits for a random moment; False if the evaluation ended before."""
    if draws.random() < 0.5:
        deadline, wanted = time.monotonic() + draws.uniform(0.0, scale), None
    else:
        deadline, wanted = time.monotonic() + 300.0, lines(results) + draws.randint(1, 1500)
    while time.monotonic() < deadline and (wanted is None or lines(results) < wanted):
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return process.poll() is None


@dataclass
class Kills:
    """What was killed so far, over all evaluations."""

    wanted: int
    done: int = 0
    continued: int = 0
    repeated: int = 0
    results_at_kills: list[int] = field(default_factory=list)


def disturb(folder: Path, out: Path, draws: random.Random, scale: float, kills: Kills) -> None:
    """Runs an evaluation to its end, killing until there were enough kills."""
    from bimedix_jax.evals.journal import is_unfinished

    out.parent.mkdir()
    results, kept = results_of(out), out.parent / "kept.jsonl"
    process = start(folder, out)
    while kills.done < kills.wanted and wait(process, results, draws, scale):
        process.kill()
        process.wait()
        kills.done += 1
        found = lines(results)
        kills.results_at_kills.append(found)
        kills.continued += found > 0
        if results.exists() and not kept.exists():
            os.link(results, kept)  # the same file, whatever is appended to it; it remains when its name is removed
        if sys.stderr.isatty():
            print(f"\r{kills.done} kills, {found} results", end="", file=sys.stderr)
        process = start(folder, out)
    if process.wait() != 0 and (is_unfinished(out) or not out.exists()):  # else it was killed after it had finished
        sys.exit(f"the evaluation failed:\n{(folder / 'log').read_text('utf-8')[-2000:]}")
    if kept.exists():
        rows = [json.loads(line) for line in kept.read_text("utf-8").splitlines()]
        counts = Counter((row["part"], row["number"]) for row in rows)
        kills.repeated += sum(count - 1 for count in counts.values())


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.parent.glob("r.*")}


def measure(wanted: int, seed: int, folder: Path) -> dict[str, Any]:
    draws, began = random.Random(seed), time.monotonic()
    prepare(folder)
    for name in ("warm", "undisturbed"):  # the first one compiles
        (folder / name).mkdir()
        started = time.monotonic()
        finish(folder, folder / name / "r.json")
    scale = time.monotonic() - started
    expected, kills, identical, runs = files_of(folder / "undisturbed/r.json"), Kills(wanted), True, 0
    while kills.done < wanted:
        runs += 1
        out = folder / f"killed-{runs}" / "r.json"
        disturb(folder, out, draws, scale, kills)
        identical = identical and files_of(out) == expected
    return {
        "kills": kills.done,
        "identical": identical,
        "repeated": kills.repeated,
        "continued": kills.continued,
        "evaluations": runs,
        "results": QUESTIONS * (1 + 2 * 8),  # a loss, and two orders of four letters and four texts
        "results_at_kills": kills.results_at_kills,
        "seconds_undisturbed": round(scale, 1),
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=natural, default=20)
    parser.add_argument("--seed", type=natural, default=0, help="draws the moments")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    startup.prepare()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.kills, arguments.seed, Path(folder))
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name}: {value}")
    if not result["identical"] or result["repeated"]:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
