"""Kills `bimedix data translate` repeatedly: compares the final output and counts requests that were paid for twice.

    python scripts/measure_translation_kills.py --kills 50 --json      # two to five minutes on two cores
    python scripts/measure_translation_kills.py --kills 3 --records 8  # seconds

A server on this machine (`loopback_llm.py`) makes translations and scores by rules. One request in ten first gets an
error, a broken connection or an unusable reply. One run is undisturbed. Another, with its own store, gets SIGKILL at
random moments: four times in five after a random number of requests, otherwise after a random time, which may be during
the start or while output is written. After `--kills` kills it runs to the end.

`identical`: whether all output files have the same bytes. `resent`: how often the server gave a good reply to a request
that already had one. `in_flight`: the number of requests that were sent and not committed at the kills, which limits
`resent`.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loopback_llm import Server, some_faults

from bimedix_jax.curation.llm.store import open_store
from bimedix_jax.data.records import sample, write_jsonl
from bimedix_jax.errors import natural, positive, run_script

CONCURRENCY = 4  # of the translator and of the judge each
LATENCY = 0.04
FAULTS = 0.1
START_SECONDS = 2.5  # a process without any request to send takes at most about so long


def command(records: Path, output: Path, server: Server) -> list[str]:
    words = [sys.executable, "-m", "bimedix_jax", "data", "translate", "--sources", str(records)]
    words += ["--out", str(output), "--llm.model", "rule", "--llm.base-url", server.url, "--llm.api-key-env", ""]
    return [*words, "--llm.concurrency", str(CONCURRENCY), "--overwrite", "--json"]


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def finish(words: list[str], log: Path) -> None:
    """Run to the end."""
    if start(words, log).wait() != 0:
        sys.exit(f"the run failed:\n{log.read_text('utf-8')[-2000:]}")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def kill(process: subprocess.Popen[bytes], server: Server, draws: random.Random, left: int, kills_left: int) -> bool:
    """Wait for a random moment and kill the process; False if it ended before."""
    if left <= 0 or draws.random() < 0.2:
        deadline, wanted = time.monotonic() + draws.uniform(0.0, START_SECONDS), None
    else:
        wanted = server.stats()["received"] + draws.randint(1, max(1, min(left, 2 * left // kills_left)))
        deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline and (wanted is None or server.stats()["received"] < wanted):
        if process.poll() is not None:
            return False
        time.sleep(0.003)
    process.kill()
    return process.wait() != 0


def measure(records: int, kills: int, seed: int, folder: Path) -> dict[str, Any]:
    draws = random.Random(seed)
    source = folder / "records.jsonl"
    english = [record for record in sample() if record.language == "en"]
    written = write_jsonl(source, draws.sample(english, min(records, len(english))))

    undisturbed = Server(fault=some_faults(FAULTS), latency=LATENCY).start()
    finish(command(source, folder / "undisturbed", undisturbed), folder / "undisturbed.log")
    needed = undisturbed.stats()["distinct"]
    undisturbed.stop()

    server = Server(fault=some_faults(FAULTS), latency=LATENCY).start()
    words = command(source, folder / "killed", server)
    done = in_flight = ended_early = 0
    began = time.monotonic()
    while done < kills:
        process = start(words, folder / "killed.log")
        if not kill(process, server, draws, needed - server.stats()["answered"], kills - done):
            ended_early += 1
            continue
        done += 1
        with open_store(folder / "killed.sqlite") as store:
            in_flight += store.open_attempts()
        if sys.stderr.isatty():
            print(f"\r{done} kills, {server.stats()['answered']} of {needed} answers", end="", file=sys.stderr)
    finish(words, folder / "killed.log")
    stats = server.stats()
    server.stop()
    return {
        "kills": done,
        "identical": digests(folder / "undisturbed") == digests(folder / "killed"),
        "resent": stats["twice"],
        "in_flight": in_flight,
        "at_most": done * 2 * CONCURRENCY,
        "records": written,
        "requests": needed,
        "requests_of_killed_run": stats["received"],
        "runs_that_ended_before_their_kill": ended_early,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=natural, default=50)
    parser.add_argument("--records", type=positive, default=60, help="of the sample that ships with the package")
    parser.add_argument("--seed", type=natural, default=0, help="draws the records and the moments")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.records, arguments.kills, arguments.seed, Path(folder))
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name}: {value}")
    if not result["identical"] or result["resent"] > result["in_flight"]:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
