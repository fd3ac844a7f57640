"""What logging costs: an optimiser step with everything that a run logs, against the same step without.

    python scripts/measure_logging.py            # a table; three minutes on 2 idle cores
    python scripts/measure_logging.py --json     # one JSON document: ratio, interval, host_seconds, ...

Both steps train the model of `bimedix bench train` (width 512, 4 layers, 8 experts, adapters of rank 16 over an NF4
base) on rows with six groups of language and kind. The bare step returns loss and gradient norm only, so the compiler
removes what computes the other metrics, and its batch has no groups. The full step returns all metrics; its time
includes that of the line: fetching, formatting, writing it to metrics.jsonl, looking for warnings and, with --wandb,
the offline mirror. On an accelerator that work overlaps with the next step; here it comes after the step.

The two take turns, and the ratio is the median over pairs of neighbours, with a bootstrap over pairs as its interval.
`cpu_ratio` compares processor time instead, which other programs on the machine disturb less.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bimedix_jax import startup
from bimedix_jax.errors import positive, run_script

LENGTH, ROWS, RECORD = 512, 2, 128
PAIRS = (("ar", "chat"), ("ar", "mcqa"), ("ar", "qa"), ("en", "chat"), ("en", "mcqa"), ("en", "qa"))
STEPS = 1000
"""Length of the learning-rate schedule; the first steps run."""
BAR = 1.03
"""The largest accepted ratio."""


def batch(vocabulary: int) -> dict[str, Any]:
    """Rows of records of equal length, whose groups take turns; [A, B, T]."""
    draw = np.random.default_rng(0)
    record_T = np.arange(LENGTH) // RECORD
    number_BT = np.arange(ROWS)[:, None] * (LENGTH // RECORD) + record_T
    found = {
        "tokens_BT": draw.integers(0, vocabulary, (ROWS, LENGTH), dtype=np.int32),
        "segment_ids_BT": np.broadcast_to(record_T + 1, (ROWS, LENGTH)).astype(np.int32),
        "loss_mask_BT": np.broadcast_to(np.arange(LENGTH) % RECORD >= RECORD // 2, (ROWS, LENGTH)),
        "group_BT": (number_BT % len(PAIRS)).astype(np.int32),
    }
    return {name: x[None] for name, x in found.items()}


def programs(size: str, mirrored: bool) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """(model, experiment, {name: (step, rows)}, {name: state}) of both sides."""
    import jax
    import jax.numpy as jnp

    from bimedix_jax.adapters import add_lora
    from bimedix_jax.bench import model as bench
    from bimedix_jax.experiment import DataSource, Experiment, ModelSource, RouterTraining, Tracking
    from bimedix_jax.models.config import LoraConfig
    from bimedix_jax.training.optimiser import make_optimiser
    from bimedix_jax.training.state import init_state, split_params
    from bimedix_jax.training.step import make_train_step

    config = bench.SIZES[size]
    model = add_lora(bench.base_model(config, "nf4"), LoraConfig(rank=16, alpha=32.0))
    experiment = Experiment(
        name="logging",
        model=ModelSource(random=config),
        lora=model.lora,
        data=DataSource(sequence_length=LENGTH, synthetic_rows=ROWS),
        router=RouterTraining(aux_scope="micro_batch"),
        tracking=Tracking(mode="offline" if mirrored else "disabled"),
        steps=STEPS,
    )
    structure, params, _ = split_params(model)
    optimiser = make_optimiser(experiment.optimiser, STEPS)
    data = jax.tree.map(jnp.asarray, batch(config.vocab_size))
    plain_step = make_train_step(structure, experiment, STEPS, optimiser)

    def bare_step(state: Any, frozen: Any, data: Any) -> tuple[Any, Any]:
        state, metrics = plain_step(state, frozen, data)
        return state, {name: metrics[name] for name in ("loss", "grad_norm")}

    steps = {
        "bare": (jax.jit(bare_step, donate_argnums=0), {n: x for n, x in data.items() if n != "group_BT"}),
        "full": (make_train_step(structure, experiment, STEPS, optimiser, len(PAIRS)), data),
    }
    return model, experiment, steps, {name: init_state(params, optimiser) for name in steps}


def sides(size: str, folder: Path, mirrored: bool) -> tuple[dict[str, Callable[[], None]], dict[str, Any]]:
    """({name: does one step}, facts that the full side fills in)."""
    from rich.console import Console

    from bimedix_jax.training.goodput import Goodput
    from bimedix_jax.training.groups import Groups
    from bimedix_jax.training.metrics import MetricsLog
    from bimedix_jax.training.observe import Observer
    from bimedix_jax.training.state import split_params
    from bimedix_jax.training.tracking import Mirror

    model, experiment, steps, states = programs(size, mirrored)
    structure, params, frozen = split_params(model)
    quiet = Console(quiet=True)
    observer = Observer.of_run(experiment, folder, model, structure, params, Groups(PAIRS), True, Goodput(), quiet)
    log, mirror = MetricsLog(folder), Mirror(experiment, folder, 0)
    facts: dict[str, Any] = {"host_seconds": [], "line_bytes": 0, "number": 0}

    def bare() -> None:
        step, rows = steps["bare"]
        states["bare"], metrics = step(states["bare"], frozen, rows)
        float(metrics["loss"])

    def full() -> None:
        step, rows = steps["full"]
        states["full"], metrics = step(states["full"], frozen, rows)
        facts["number"] += 1
        metrics = observer.with_experts(facts["number"], metrics, states["full"], frozen)
        float(metrics["loss"])
        began = time.perf_counter()
        line = {"step": facts["number"], **observer.plain(metrics), "seconds": 1.0, "tokens_per_second": 1.0}
        line |= observer.timings(line)
        for write in (log.write, mirror.write, observer.alarms.update):
            write(line)
        facts["host_seconds"].append(time.perf_counter() - began)
        facts["line_bytes"] = len(json.dumps(line))

    return {"bare": bare, "full": full}, facts


def paired(seconds: dict[str, list[float]]) -> tuple[float, list[float]]:
    """(median ratio of the full side to the bare one over pairs, its 95 % interval)."""
    ratios = np.asarray(seconds["full"]) / np.asarray(seconds["bare"])
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return round(float(np.median(ratios)), 4), [round(float(low), 4), round(float(high), 4)]


def measure(size: str, pairs: int, mirrored: bool) -> dict[str, Any]:
    """Times pairs of steps, in alternating order."""
    startup.prepare()
    with tempfile.TemporaryDirectory() as folder:
        run, facts = sides(size, Path(folder), mirrored)
        for _ in range(2):
            for name in run:
                run[name]()
        facts["host_seconds"].clear()
        wall, cpu = {name: [] for name in run}, {name: [] for name in run}
        for pair in range(pairs):
            for name in sorted(run, reverse=pair % 2 == 1):
                began, used = time.perf_counter(), time.process_time()
                run[name]()
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - used)
    ratio, interval = paired(wall)
    cpu_ratio, cpu_interval = paired(cpu)
    return {
        "size": size,
        "pairs": pairs,
        "wandb": mirrored,
        "step_seconds": {name: round(float(np.median(values)), 4) for name, values in wall.items()},
        "ratio": ratio,
        "interval": interval,
        "cpu_ratio": cpu_ratio,
        "cpu_interval": cpu_interval,
        "host_seconds": round(float(np.median(facts["host_seconds"])), 5),
        "line_bytes": facts["line_bytes"],
        "bar": BAR,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=("small", "smoke"), default="small", help="model of the benchmark")
    parser.add_argument("--pairs", type=positive, default=30, help="pairs of steps (default: %(default)s)")
    parser.add_argument("--wandb", action="store_true", help="also write the offline mirror of Weights & Biases")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(argv)
    found = measure(options.size, options.pairs, options.wandb)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<14}{value}")


if __name__ == "__main__":
    run_script(main)
