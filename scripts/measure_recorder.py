"""Measures the recorder of routes: time, bytes, memory, the same rows on meshes and processes, and kills.

    python scripts/measure_recorder.py --json                                        # 10 M rows; 20 minutes on 2 cores
    python scripts/measure_recorder.py --only kills --json                           # a part of it
    python scripts/measure_recorder.py --rows 20000 --large-rows 60000 --kills 4 --json    # minutes

A row is a token in a layer. The model is a random Mixtral of `--layers` layers and `--width`; the records are random
tokens. Every measurement runs in processes of its own:

- `overhead`: time of recording divided by that of the same forward passes with losses, less 1; median over `--repeats`
  pairs of one after the other, so that other load on the machine cancels. `overhead_cpu` is that of processor time.
- `bytes_per_row`; `peak_rss_bytes` at both numbers of rows.
- `mesh_mismatches`: rows whose experts differ between one device, a mesh of 8 and 2 processes, although the margin is
  at least 1e-4; `mesh_ties` counts the others.
- `report_large`: time and memory of `bimedix routes report` for `--large-rows` rows with 100 random routers;
  `import_and_report_80_records`: for 80 records of 8 layers from JSONL.
- `kills_identical`: whether recordings that were killed `--kills` times, in all stages, and started again are byte by
  byte the one that was never killed (scripts/measure_record_kills.py).
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bimedix_jax.errors import natural, positive, run_script
from bimedix_jax.routing.recording import Recording

VOCAB = 512
CONTEXT = 512
LEAST_MARGIN = 1e-4
LIMIT = 7200.0
"""Seconds after which a process counts as stuck."""


@dataclasses.dataclass(frozen=True)
class RandomTokens:
    """Records of random tokens, as recorded_data.Data."""

    tokens: int
    limit: int | None = None

    @property
    def hashes(self) -> dict[str, str | None]:
        return {"data": f"random tokens {self.tokens}"}

    def items(self, with_prompts: bool = False) -> Iterator[Any]:
        from bimedix_jax.inference.planning import Source
        from bimedix_jax.routing.recorded_data import Item

        assert not with_prompts
        left, number = self.tokens, 0
        while left > 0:
            rng = np.random.default_rng(number)
            ids = rng.integers(0, VOCAB, min(int(rng.integers(64, 448)), left)).astype(np.int32)
            yield Item(Source(f"record {number}", ("en", "ar")[number % 2]), ids)
            left, number = left - len(ids), number + 1


def model_of(options: argparse.Namespace) -> Any:
    """A random model; on a mesh if there are several devices."""
    import jax

    from bimedix_jax.models.config import MixtralConfig, RouterConfig
    from bimedix_jax.models.init import init_random
    from bimedix_jax.sharding.placement import place
    from bimedix_jax.sharding.rules import make_mesh

    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=options.width,
        intermediate_size=2 * options.width,
        num_layers=options.layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=options.width // 4,
        router=RouterConfig(num_experts=options.experts, top_k=options.top_k),
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_embeddings=True,
        max_position_embeddings=CONTEXT,
    )
    model = init_random(config, seed=0, std=0.1)
    if jax.device_count() == 1:
        return model
    return place(model, make_mesh(data=2, fsdp=2, expert=jax.device_count() // 4))


def record(options: argparse.Namespace) -> dict[str, Any]:
    """Records into --out; what a child process does."""
    from bimedix_jax.distributed import joined
    from bimedix_jax.routing.recorder import RecordSettings, record_routes

    with joined(options.processes > 1):
        settings = RecordSettings(exact=options.exact, batch_tokens=options.batch_tokens)
        manifest = record_routes(model_of(options), data_of(options), options.out, settings)
    size = sum(part.bytes for part in manifest.parts)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rows": manifest.rows, "bytes": size, "peak_rss_bytes": peak}


def data_of(options: argparse.Namespace) -> Any:
    return RandomTokens(max(options.rows // options.layers, 1))


def compare_times(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of recording, and of the same forward passes with losses, in pairs; by the clock and of the processor."""
    import jax
    from flax import nnx

    from bimedix_jax.inference.padding import packed
    from bimedix_jax.models.plans import RoutingPlan
    from bimedix_jax.routing.recorder import RecordSettings, record_routes
    from bimedix_jax.routing.recording_writer import in_parts
    from bimedix_jax.routing.watch import nll_step

    model, data = model_of(options), data_of(options)
    graph, state = nnx.split(model)

    def forward() -> None:
        for part in in_parts(data.items(), lambda item: len(item.ids), options.layers):
            waiting = None
            for _, tokens_BT, ids_BT in packed([item.ids for item in part], options.batch_tokens, CONTEXT):
                found = nll_step(graph, state, tokens_BT, ids_BT, RoutingPlan())
                jax.block_until_ready(waiting)
                waiting = found
            jax.block_until_ready(waiting)

    def recorded() -> None:
        record_routes(model, data, options.out, RecordSettings(batch_tokens=options.batch_tokens), overwrite=True)

    actions = {"forward": forward, "recorded": recorded}
    found: dict[str, list[float]] = {f"{name}_{clock}": [] for name in actions for clock in ("seconds", "cpu")}
    for repeat in range(options.repeats + 1):
        for name in sorted(actions, reverse=repeat % 2 == 0):  # each goes first in every second pair
            wall, cpu = time.monotonic(), time.process_time()
            actions[name]()
            if repeat:  # the first one compiles
                found[f"{name}_seconds"].append(time.monotonic() - wall)
                found[f"{name}_cpu"].append(time.process_time() - cpu)
    return found


def child(options: argparse.Namespace, task: str, out: Path, wait: bool = True, **changes: Any) -> Any:
    """Runs a task in a process of its own, and returns its result or, without `wait`, the process."""
    given = vars(options) | changes
    words = [sys.executable, __file__, "--task", task, "--out", str(out)]
    for name in ("rows", "layers", "experts", "top_k", "width", "batch_tokens", "repeats", "processes"):
        words += [f"--{name.replace('_', '-')}", str(given[name])]
    words += ["--exact"] if given["exact"] else []
    devices = given.get("devices", 1)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    environment |= given.get("environment", {})
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if not wait:
        return process
    return result_of(process)


def result_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=LIMIT)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}:\n{errors[-3000:]}")
    return json.loads(output.splitlines()[-1])


def two_processes(options: argparse.Namespace, out: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    running = []
    for number in range(2):
        variables = {"BIMEDIX_COORDINATOR": address, "BIMEDIX_PROCESSES": "2", "BIMEDIX_PROCESS": str(number)}
        how = {"rows": options.mesh_rows, "exact": True, "devices": 4, "processes": 2, "environment": variables}
        running.append(child(options, "record", out, wait=False, **how))
    for process in running:
        result_of(process)


def mesh_rows(options: argparse.Namespace, place: Path) -> dict[str, int]:
    """Rows whose experts are not those of one device."""
    child(options, "record", place / "one", rows=options.mesh_rows, exact=True)
    child(options, "record", place / "mesh", rows=options.mesh_rows, exact=True, devices=8)
    two_processes(options, place / "two")
    one = Recording.open(place / "one").tokens("experts", "margin", "id")
    found = {"mesh_rows": one["margin"].size, "mesh_mismatches": 0, "mesh_ties": 0}
    for name in ("mesh", "two"):
        other = Recording.open(place / name).tokens("experts", "margin", "id")
        if not np.array_equal(one["id"], other["id"]):
            raise SystemExit(f"{name} has other tokens")
        differs = (np.sort(one["experts"], -1) != np.sort(other["experts"], -1)).any(-1)
        clear = np.minimum(one["margin"], other["margin"]) >= LEAST_MARGIN
        found["mesh_mismatches"] += int((differs & clear).sum())
        found["mesh_ties"] += int((differs & ~clear).sum())
    return found


def kills(options: argparse.Namespace, _: Path) -> dict[str, Any]:
    """What measure_record_kills.py finds."""
    script = Path(__file__).with_name("measure_record_kills.py")
    words = [sys.executable, str(script), "--kills", str(options.kills), "--json"]
    found = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        raise SystemExit(found.returncode)
    names = ("kills", "kills_in", "recordings_compared", "kills_identical", "parts_kept_at_kills")
    return {name: json.loads(found.stdout)[name] for name in names}


def memory(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Bytes a row, and the peak of the resident memory at both numbers of rows."""
    small = child(options, "record", place / "small")
    large = child(options, "record", place / "large", rows=options.large_rows)
    return {
        "rows": large["rows"],
        "bytes_per_row": large["bytes"] / large["rows"],
        "bytes_per_row_limit": 6 + 3 * options.top_k,
        "peak_rss_bytes": {str(found["rows"]): found["peak_rss_bytes"] for found in (small, large)},
        "peak_rss_growth": large["peak_rss_bytes"] / small["peak_rss_bytes"] - 1,
    }


def overhead(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Time of recording, relative to the same forward passes."""
    times = child(options, "times", place / "times", rows=options.time_rows)
    by_clock, by_processor = (
        [a / b - 1 for a, b in zip(times[f"recorded_{clock}"], times[f"forward_{clock}"], strict=True)]
        for clock in ("seconds", "cpu")
    )
    return {
        "overhead": statistics.median(by_clock),
        "overheads": by_clock,
        "overhead_cpu": statistics.median(by_processor),
        "overheads_cpu": by_processor,
        "seconds_recorded": statistics.median(times["recorded_seconds"]),
    }


def reports(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """What `bimedix routes report` takes for a large recording with 100 random routers, and import and report for a
    small file of another program."""
    write_synthetic(place / "large", options.large_rows, options.layers, options.experts, options.top_k)
    write_lines(place / "small.jsonl")
    imported = timed("import", str(place / "small.jsonl"), "--format", "jsonl", "--out", str(place / "small"))
    small = timed("report", str(place / "small"), "--out", str(place / "small-report"))
    large = timed("report", str(place / "large"), "--out", str(place / "large-report"))
    both = {name: imported[name] + small[name] for name in ("seconds", "cpu_seconds")}
    return {"report_large": large, "import_and_report_80_records": both}


def timed(*words: str) -> dict[str, float]:
    """Time and memory of `bimedix routes WORDS`."""
    started = time.monotonic()
    command, silent = [sys.executable, "-m", "bimedix_jax", "routes", *words], subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=silent, stderr=silent)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"bimedix routes {' '.join(words)} failed")
    cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024
    return {"seconds": time.monotonic() - started, "cpu_seconds": cpu, "peak_rss_bytes": peak}


def write_synthetic(folder: Path, rows: int, layers: int, experts: int, top_k: int) -> None:
    """A recording of about so many rows whose routes depend on the language, without a model."""
    from bimedix_jax.routing.parts import PartLayout, Routes
    from bimedix_jax.routing.recording import LayerName
    from bimedix_jax.routing.recording_writer import finish, write_parts

    rng, routers, length = np.random.default_rng(0), 100, 104
    loads = {language: rng.dirichlet(np.full(experts, 20), layers) for language in ("en", "ar")}

    def found() -> Iterator[Routes]:
        for number in range(max(rows // layers // length, 1)):
            language = ("en", "ar")[number % 2]
            keys = np.log(loads[language])[None] + rng.gumbel(size=(length, layers, experts))
            nll = rng.random(length)
            columns = {"nll": nll, "shuffled_nll": nll + 0.1 * rng.random(length)}
            columns |= {"experts": np.argsort(-keys, -1)[..., :top_k]}
            columns |= {"weights": np.full((length, layers, top_k), 1 / top_k)}
            yield Routes(
                id=f"r{number}",
                ids_N=rng.zipf(1.3, length).clip(0, 30_000),
                columns=columns,
                about={"language": language},
                random_RLE=rng.multinomial(top_k * length, np.full(experts, 1 / experts), (routers, layers)),
            )

    columns = ("nll", "shuffled_nll", "experts", "weights")
    layout = PartLayout(layers=layers, top_k=top_k, columns=columns, wide=False, routers=routers)
    folder.mkdir()
    write_parts(folder, layout, found())
    names = [LayerName(number=number) for number in range(layers)]
    finish(folder, layers=names, experts=experts, layout=layout, hashes={}, options={})


def write_lines(path: Path) -> None:
    """80 records of 8 layers as JSONL."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for number in range(80):
            length = int(rng.integers(80, 200))
            experts = np.argsort(rng.random((8, length, 8)), -1)[..., :2]
            record = {"id": f"r{number}", "language": ("en", "ar")[number % 2], "experts": experts.tolist()}
            record |= {
                "input_ids": rng.integers(0, 500, length).tolist(),
                "weights": np.full(experts.shape, 0.5).tolist(),
            }
            file.write(json.dumps(record) + "\n")


MEASURES = {"overhead": overhead, "memory": memory, "mesh": mesh_rows, "kills": kills, "reports": reports}


def measured(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"layers": options.layers, "top_k": options.top_k}
    for name in options.only:
        with tempfile.TemporaryDirectory() as place:
            result |= MEASURES[name](options, Path(place))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES), help="what to measure")
    parser.add_argument("--rows", type=positive, default=1_000_000)
    parser.add_argument("--large-rows", type=positive, default=10_000_000)
    parser.add_argument("--time-rows", type=positive, default=330_000)
    parser.add_argument("--mesh-rows", type=positive, default=64_000)
    parser.add_argument("--kills", type=natural, default=20)
    parser.add_argument("--layers", type=positive, default=32)
    parser.add_argument("--experts", type=positive, default=8)
    parser.add_argument("--top-k", type=positive, default=2)
    parser.add_argument("--width", type=positive, default=64)
    parser.add_argument("--batch-tokens", type=positive, default=4096)
    parser.add_argument("--repeats", type=positive, default=9)
    parser.add_argument("--json", action="store_true", help="print the result as JSON, which is the only form")
    parser.add_argument("--task", choices=("measure", "record", "times"), default="measure", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("R"), help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=positive, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--exact", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task == "measure":
        print(json.dumps(measured(options), indent=2))
    else:
        print(json.dumps({"record": record, "times": compare_times}[options.task](options)))


if __name__ == "__main__":
    run_script(main)
