"""Kills recordings of routes in every stage: do they end with the same bytes?

    python scripts/measure_record_kills.py --kills 20 --json     # six minutes of processor time
    python scripts/measure_record_kills.py --kills 4             # a trial, one kill in each stage

A small random model records random tokens. One recording is undisturbed. Another gets SIGKILL a random time after it
has entered a stage, is started again, and gets the next kill in the next stage:

- `compiling`: the programs are compiled, without the cache that other starts share.
- `running`: batches run, and those before them are cut into records.
- `writing`: a part is written, under a temporary name first.
- `finishing`: all parts are complete; the manifest is written, and the folder gets its name.

After that it runs to the end, and the next recording is killed in the same way. A part has fewer rows than usual, so
that there are several.

`kills`: processes that ended by the signal. `kills_in`: the stage that each had entered last. `parts_kept_at_kills`:
complete parts in the unfinished recording. `kills_identical`: all recordings have the bytes of the undisturbed one.
"""

import argparse
import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bimedix_jax.errors import natural, run_script

PARTS, BATCHES = 5, 5
"""Parts of a recording, and batches of a part, about."""
LAYERS, EXPERTS, TOP_K, WIDTH, VOCAB, BATCH_TOKENS, CONTEXT = 8, 8, 2, 32, 512, 4096, 512
STAGES = ("compiling", "running", "writing", "finishing")
FIRST, LAST = "compiling", "finished"


def record(out: Path) -> None:
    """Records into a folder and prints each stage when it begins; what a child process does."""
    import numpy as np

    from bimedix_jax.inference.planning import Source
    from bimedix_jax.models.config import MixtralConfig, RouterConfig
    from bimedix_jax.models.init import init_random
    from bimedix_jax.routing import recorder, recording_writer
    from bimedix_jax.routing.recorded_data import Item

    @dataclasses.dataclass(frozen=True)
    class RandomTokens:
        """Records of random tokens, as recorded_data.Data."""

        limit: int | None = None
        hashes: dict[str, str | None] = dataclasses.field(default_factory=dict)

        def items(self, with_prompts: bool = False) -> Iterator[Any]:
            assert not with_prompts
            left, number = PARTS * BATCHES * BATCH_TOKENS, 0
            while left > 0:
                rng = np.random.default_rng(number)
                ids = rng.integers(0, VOCAB, min(int(rng.integers(64, 448)), left)).astype(np.int32)
                yield Item(Source(f"record {number}", ("en", "ar")[number % 2]), ids)
                left, number = left - len(ids), number + 1

    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=2,
        head_dim=WIDTH // 4,
        router=RouterConfig(num_experts=EXPERTS, top_k=TOP_K),
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_embeddings=True,
        max_position_embeddings=CONTEXT,
    )
    announced(recorder, "write_part", "writing", "running")
    announced(recorder, "finish", "finishing")
    announced(recorder, "record_step", None, "running")
    recording_writer.PART_ROWS = BATCHES * BATCH_TOKENS * LAYERS
    model = init_random(config, seed=0, std=0.1)
    print(FIRST, flush=True)
    data: Any = RandomTokens()
    recorder.record_routes(model, data, out, recorder.RecordSettings(batch_tokens=BATCH_TOKENS))
    print(LAST, flush=True)


def announced(module: Any, name: str, before: str | None, after: str | None = None) -> None:
    """Makes a function of a module print the stages that begin when it is called and when it returns."""
    function: Callable[..., Any] = getattr(module, name)

    def announcing(*args: Any, **named: Any) -> Any:
        if before is not None:
            print(before, flush=True)
        found = function(*args, **named)
        if after is not None:
            print(after, flush=True)
        return found

    setattr(module, name, announcing)


class Recording:
    """A process that records, and the stages that it has begun, with their times."""

    def __init__(self, out: Path, cache: Path | None):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        if cache is not None:
            environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        words = [sys.executable, __file__, "--record", str(out)]
        self.errors = out.with_name("errors.txt").open("w+")
        self.process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        assert self.process.stdout is not None
        self.lines, self.stages = self.process.stdout, list[tuple[str, float]]()

    def next_stage(self) -> str | None:
        """Waits for the next stage; None if the process has ended."""
        line = self.lines.readline()
        if not line:
            return None
        self.stages.append((line.strip(), time.monotonic()))
        return self.stages[-1][0]

    def ended(self) -> int:
        """The exit code, after all stages have been read. Raises SystemExit if it failed by itself."""
        while self.next_stage():
            pass
        code = self.process.wait()
        if code not in (0, -signal.SIGKILL):
            self.errors.seek(0)
            raise SystemExit(f"a recording failed with exit code {code}:\n{self.errors.read()[-3000:]}")
        self.errors.close()
        return code

    def lengths(self, stage: str) -> list[float]:
        """Seconds of each time that it was in a stage."""
        following = zip(self.stages, self.stages[1:], strict=False)
        return [end - start for (name, start), (_, end) in following if name == stage]

    def killed(self, stage: str, times: int, delay: float) -> bool:
        """Kills the process `delay` seconds after it has begun a stage for so many times; False if it ended before."""
        while times:
            found = self.next_stage()
            if found in (None, LAST):
                break
            times -= found == stage
        time.sleep(0.0 if times else delay)
        if not times and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        return self.ended() == -signal.SIGKILL


def measure(kills: int, seed: int, place: Path) -> dict[str, Any]:
    draws, began = random.Random(seed), time.monotonic()
    whole = Recording(place / "whole", place / "programs")
    if whole.ended():
        raise SystemExit("the undisturbed recording was killed")
    longest = {stage: max(whole.lengths(stage)) for stage in STAGES}
    runs = sum(stage == "running" for stage, _ in whole.stages)
    expected, out, partial = bytes_of(place / "whole"), place / "killed", place / ".killed.recording"
    killed_in, kept, compared = list[str](), list[int](), 0
    while len(kept) < kills:
        stage = STAGES[len(kept) % len(STAGES)]
        times = draws.randint(1, {"running": runs // 3, "writing": PARTS // 2}.get(stage, 1))
        own = Recording(out, None if stage == "compiling" else place / "programs")
        if own.killed(stage, times, draws.uniform(0, longest[stage])):
            killed_in.append(own.stages[-1][0] if own.stages else "starting")
            kept.append(len(list(partial.glob("records-*.parquet"))) if partial.exists() else 0)
            say(f"{len(kept)} kills, the last one in the stage {killed_in[-1]!r}, {kept[-1]} parts kept")
        if not out.exists() and (len(kept) == kills or stage == STAGES[-1]):
            Recording(out, place / "programs").ended()
        if out.exists():  # also where the last kill came after it had got its name
            check_same(expected, bytes_of(out))
            out.rename(place / f"ended {compared}")
            compared += 1
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "kills": len(kept),
        "kills_in": dict(Counter(killed_in)),
        "parts_kept_at_kills": kept,
        "parts": PARTS,
        "recordings_compared": compared,
        "kills_identical": True,  # check_same ends the script otherwise
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
    }


def say(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_same(expected: dict[str, bytes], found: dict[str, bytes]) -> None:
    """Raises SystemExit unless both folders have the same bytes."""
    differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if differing:
        raise SystemExit(f"after a kill the recording differs in {', '.join(differing)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=natural, default=20)
    parser.add_argument("--seed", type=natural, default=0, help="draws the moments")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, which is the only form")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.record is not None:
        record(options.record)
        return
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(measure(options.kills, options.seed, Path(place)), indent=2))


if __name__ == "__main__":
    run_script(main)
