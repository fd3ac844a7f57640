"""Interrupts each command at different moments, and checks that it ends with one sentence and leaves nothing
half-written.

    python scripts/measure_interrupts.py --json                     # one try each, some minutes on two idle cores
    python scripts/measure_interrupts.py --commands train --tries 20

There is a row for each command, moment and signal. `tries` is the number of tries. `clean` counts those in which the
process ended within 30 s with exit code 130 and one sentence that begins with "interrupted", without a traceback, a
crash of the interpreter, or a partial folder. Tries in which the process had finished before the signal came (`late`)
are clean too. The moments are `start`, a random time while Python imports; `compile`, during a compilation of JAX;
`work`, during the first step, reply or tensor; and `save`, while results are written. A command for which JAX compiles
nothing has no `compile`. `faults` has the end of the output of each try that was not clean.
"""

import argparse
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bimedix_jax.errors import natural, positive, run_script

TIMEOUT = 30.0
COMPILE = "jax._src.compiler:compile_or_get_cached"
WRITE_TENSOR = "bimedix_jax.checkpoint.safetensors_io:ShardedWriter.write"
REPLACE = "bimedix_jax.process.folders:list_written"

COMMANDS: dict[str, tuple[list[str], dict[str, str]]] = {
    "train": (
        ["train", "smoke", "--out", "OUT"],
        {
            "compile": COMPILE,
            "work": "bimedix_jax.training.metrics:MetricsLog.write",
            "save": "bimedix_jax.checkpoint.steps:save_arrays",
        },
    ),
    "quickstart": (
        ["quickstart", "--smoke", "--out", "OUT"],
        {"compile": COMPILE, "work": "bimedix_jax.training.metrics:MetricsLog.write", "save": REPLACE},
    ),
    "convert": (["convert", "MODEL", "--out", "OUT", "--base", "float32"], {"work": WRITE_TENSOR, "save": REPLACE}),
    "export": (["export", "MODEL", "--out", "OUT"], {"work": WRITE_TENSOR, "save": REPLACE}),
    "upcycle": (["upcycle", "--model", "DENSE", "--out", "OUT"], {"work": WRITE_TENSOR, "save": REPLACE}),
    "data pack": (
        ["data", "pack", "--records", "sample", "--tokenizer", "MODEL", "--out", "OUT", "--sequence-length", "256"],
        {"work": "bimedix_jax.data.pack:pack", "save": REPLACE},
    ),
    "eval run": (
        ["eval", "run", "--model", "MODEL", "--heldout", "sample", "--limit", "2", "--out", "OUT"],
        {
            "compile": COMPILE,
            "work": "bimedix_jax.evals.heldout:heldout_loss",
            "save": "bimedix_jax.files:write_text",
        },
    ),
    "chat": (
        ["chat", "--model", "MODEL", "--prompt", "hello", "--max-new-tokens", "8"],
        {"compile": COMPILE, "work": "bimedix_jax.inference.chat:Chat.stream"},
    ),
}
"""The words of each command, and at which function each moment begins (module:name)."""
SIGNALS = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}


def child(moment: str, report: int, words: list[str]) -> int:
    """Runs a command that writes to the descriptor `report` when it reaches a moment; without one, when it starts."""
    from bimedix_jax import cli, startup

    if moment:
        startup.prepare()
        module, _, name = moment.partition(":")
        *classes, attribute = name.split(".")
        place: Any = importlib.import_module(module)
        for part in classes:
            place = getattr(place, part)
        original = getattr(place, attribute)

        def reporting(*args: Any, **options: Any) -> Any:
            os.write(report, b"x")
            return original(*args, **options)

        setattr(place, attribute, reporting)
    sys.argv = ["bimedix", *words]
    if not moment:
        os.write(report, b"x")
    return cli.main()


def interrupt(words: list[str], moment: str, number: int, draws: random.Random, folder: Path) -> dict[str, Any]:
    """One try: {"clean", "late", "fault"}."""
    reading, writing = os.pipe()
    log = folder / "log"
    command = [sys.executable, __file__, "--child", moment, str(writing), *words]
    environment = {"JAX_PLATFORMS": "cpu", **os.environ}

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell lets it be ignored

    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, pass_fds=(writing,), preexec_fn=prepare, cwd=folder
        )
    os.close(writing)
    os.read(reading, 1)  # or the end of the process
    time.sleep(draws.uniform(0.0, 0.3 if moment else 4.0))
    os.close(reading)
    late = process.poll() is not None
    process.send_signal(number)
    try:
        code = process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return {"clean": False, "late": late, "fault": f"did not end within {TIMEOUT:.0f} s"}
    text = log.read_text("utf-8", "replace")
    partial = [path.name for path in folder.rglob("*.partial")]
    return {"late": late or code == 0, **judge(code, text, partial)}


def judge(code: int, text: str, partial: list[str]) -> dict[str, Any]:
    """Whether a process ended cleanly. A process that was not stopped by the signal must have finished well."""
    sentences = [line for line in text.splitlines() if line.startswith("interrupted")]
    dirty = [sign for sign in ("Traceback", "Fatal Python error", "Exception ignored", "unexpected") if sign in text]
    clean = not dirty and not partial and (code == 0 or (code == 130 and len(sentences) == 1))
    return {"clean": clean, "fault": None if clean else f"exit code {code}, left {partial}: {text[-600:]}"}


def make_models(folder: Path) -> dict[str, str]:
    """A tiny dense model and a mixture made from it."""
    from bimedix_jax.checkpoint.upcycle import UpcycleRecipe, upcycle
    from bimedix_jax.quickstart.tiny import tiny_dense

    tiny_dense(folder / "dense")
    upcycle(folder / "dense", folder / "model", UpcycleRecipe(experts=4, top_k=2), "dense")
    return {"DENSE": str(folder / "dense"), "MODEL": str(folder / "model")}


def measure(commands: list[str], moments: list[str], tries: int, seed: int) -> list[dict[str, Any]]:
    draws, rows = random.Random(seed), []
    with tempfile.TemporaryDirectory() as temporary:
        models = make_models(Path(temporary))
        for command in commands:
            words, places = COMMANDS[command]
            for moment in [name for name in moments if name == "start" or name in places]:
                for name, number in SIGNALS.items():
                    found = []
                    for _ in range(tries):
                        with tempfile.TemporaryDirectory(dir=temporary) as place:
                            filled = [models.get(word, word).replace("OUT", f"{place}/out") for word in words]
                            found.append(interrupt(filled, places.get(moment, ""), number, draws, Path(place)))
                    row = {"command": command, "moment": moment, "signal": name, "tries": tries}
                    row |= {key: sum(one[key] for one in found) for key in ("clean", "late")}
                    rows.append({**row, "faults": [one["fault"] for one in found if one["fault"]]})
                    print(f"{command:10} {moment:8} {name:8} {row['clean']}/{tries} clean", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    moments = ["start", "compile", "work", "save"]
    parser.add_argument("--moments", nargs="+", choices=moments, default=moments)
    parser.add_argument("--tries", type=positive, default=1)
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON document")
    options = parser.parse_args()
    rows = measure(options.commands, options.moments, options.tries, options.seed)
    if options.json:
        print(json.dumps({"rows": rows, "clean": all(row["clean"] == row["tries"] for row in rows)}, indent=2))


if __name__ == "__main__":
    run_script(main)
