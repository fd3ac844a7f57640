"""Runs full-size training steps on the local accelerator, and compares them with the estimate of `bimedix plan`.

    python scripts/measure_full_size.py                       # Mixtral-8x7B, the paper's recipe, on one device
    python scripts/measure_full_size.py --layers 4 --json     # a shallower one; one JSON document

The step is that of `bimedix train` with the preset bimedix-mixtral-8x7b: rank 128 on attention, experts and router over
an NF4 base, rows of 4,096 tokens, 16 rows a step. Micro-batches have one row and layers are recomputed, which is what
`bimedix plan --fit` chooses for one device of 80 GB. All layers are copies of one random, quantised layer, so that
routing, products and optimiser run on realistic values. `planned_bytes` is the compiler's memory analysis,
`measured_bytes` the peak memory in use on the device. `planned_seconds` is the estimated time of the same compiled
program, if `bimedix plan` knows the device.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bimedix_jax.adapters import add_lora
from bimedix_jax.costs.devices import known
from bimedix_jax.costs.flops import training_flops
from bimedix_jax.errors import BimedixError, natural, positive, run_script
from bimedix_jax.experiment import Experiment, override
from bimedix_jax.kernels import backends
from bimedix_jax.models.config import ARCHITECTURES, MixtralConfig
from bimedix_jax.models.init import init_random
from bimedix_jax.plan import hlo
from bimedix_jax.plan.report import BIMED_TOKENS, EPOCHS
from bimedix_jax.plan.roofline import costs_of
from bimedix_jax.plan.step import STEPS, abstract_model, peak, training_arguments
from bimedix_jax.presets import bimedix_mixtral_8x7b
from bimedix_jax.quantise import quantise_base
from bimedix_jax.sharding.by_rows import store_for_training
from bimedix_jax.sharding.rules import COMPILER_OPTIONS
from bimedix_jax.training.optimiser import make_optimiser
from bimedix_jax.training.state import init_state, split_params

LAST_NUMBER = re.compile(r"[._]\d+$")
"""XLA appends a number to repeated kernel names, as in `grouped_matmul_128x128x64.3`."""


def recipe(options: argparse.Namespace) -> Experiment:
    changes = {
        "mesh": None,
        "batch.rows": options.rows,
        "batch.accumulation": options.accumulation,
        "data.sequence_length": options.sequence_length,
        "remat": options.remat,
    }
    return override(bimedix_mixtral_8x7b(), changes)


def arrays(config: MixtralConfig, experiment: Experiment, abstract: Any) -> tuple[Any, Any, Any]:
    """State, frozen parameters and batch. Layers are copies of the layer of a random one-layer model."""
    one = quantise_base(init_random(dataclasses.replace(config, num_layers=1), dtype="bfloat16"))
    assert experiment.lora is not None
    one = add_lora(one, experiment.lora)
    store_for_training(one)
    _, params, frozen = split_params(one)

    def deepen(value: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        if value.shape == wanted.shape:
            return value
        assert value.shape[0] == 1, (value.shape, wanted.shape)
        return jnp.copy(jnp.broadcast_to(value, wanted.shape))

    state, kept, batch = abstract
    del one
    frozen = jax.tree.map(deepen, frozen, kept)
    params = jax.tree.map(deepen, params, state.params)
    shape = batch["tokens_BT"].shape
    rows = {
        "tokens_BT": jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)),
        "segment_ids_BT": jnp.ones(shape, jnp.int32),
        "loss_mask_BT": jnp.ones(shape, bool),
    }
    return init_state(params, make_optimiser(experiment.optimiser, STEPS)), frozen, rows


@contextlib.contextmanager
def tracing(found: list[dict[str, Any]]) -> Iterator[None]:
    """Traces the block, and appends the seconds and runs of each device kernel, longest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            yield
        [file] = Path(folder).rglob("*.xplane.pb")
        spent: Counter[str] = Counter()
        runs: Counter[str] = Counter()
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines if plane.name.startswith("/device:") else ():
                for event in line.events if line.name.startswith("Stream") else ():
                    name = LAST_NUMBER.sub("", event.name)
                    spent[name] += round(event.duration_ns)
                    runs[name] += 1
    found += [{"name": name, "seconds": ns / 1e9, "runs": runs[name]} for name, ns in spent.most_common()]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compiles the step, runs it once to warm up, and then `steps` times."""
    device, experiment = jax.devices()[0], recipe(options)
    config = ARCHITECTURES[options.model]
    config = dataclasses.replace(config, num_layers=options.layers or config.num_layers)
    abstract, step = training_arguments(config, experiment, [device])
    with backends.recording() as record:
        lowered = step.lower(*abstract)
    began = time.perf_counter()
    compiled = lowered.compile(compiler_options=COMPILER_OPTIONS.get(device.platform))
    compile_seconds = time.perf_counter() - began
    state, frozen, batch = arrays(config, experiment, abstract)
    seconds, losses = [], []
    kernels: list[dict[str, Any]] = []
    for index in range(1 + options.steps + (options.kernels > 0)):
        with tracing(kernels) if index > options.steps else contextlib.nullcontext():
            began = time.perf_counter()
            state, metrics = compiled(state, frozen, batch)
            losses.append(float(metrics["loss"]))
            jax.block_until_ready(state.params)
            seconds.append(time.perf_counter() - began)
    if not all(map(math.isfinite, losses)):
        raise BimedixError(f"The losses {losses} are not finite; the step is wrong on this device.")
    peak_in_use = (device.memory_stats() or {}).get("peak_bytes_in_use")
    taken = statistics.median(seconds[1 : 1 + options.steps])
    tokens = experiment.batch.size * experiment.data.sequence_length
    useful = training_flops(abstract_model(config, experiment), tokens, experiment.data.sequence_length)
    facts = known(device.device_kind)
    planned = costs_of(hlo.parse(compiled.as_text()), facts) if facts is not None else None
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "model": options.model,
        "layers": config.num_layers,
        "experiment": experiment.to_dict(),
        "backends": record.to_dict(),
        "losses": losses,
        "compile_seconds": compile_seconds,
        "planned_bytes": peak(compiled.memory_analysis()),
        "measured_bytes": peak_in_use,
        "step_seconds": taken,
        "planned_seconds": None if planned is None else planned.step_seconds,
        "tokens_per_step": tokens,
        "tokens_per_s": tokens / taken,
        "hours_of_bimed": BIMED_TOKENS * EPOCHS * taken / tokens / 3600,
        "useful_tflops_per_s": sum(useful.values()) / taken / 1e12,
        "program_tflops_per_s": None if planned is None else planned.total_flops / taken / 1e12,
        "kernels": kernels[: options.kernels],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(ARCHITECTURES), default="mixtral-8x7b")
    parser.add_argument("--layers", type=positive, help="fewer layers than the model has, for smaller devices")
    parser.add_argument("--rows", type=positive, default=1, help="rows of a micro-batch")
    parser.add_argument("--accumulation", type=positive, default=16, help="micro-batches of a step")
    parser.add_argument("--sequence-length", type=positive, default=4096)
    parser.add_argument("--remat", choices=("none", "experts", "layer"), default="layer")
    parser.add_argument("--steps", type=positive, default=2, help="timed steps after one warm-up; their median counts")
    parser.add_argument("--kernels", type=natural, default=0, help="trace one more step and list its longest kernels")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # as `bimedix plan` assumes
    if jax.default_backend() == "cpu" and options.layers is None:
        parser.error("JAX finds no GPU or TPU; on a CPU use fewer layers than the model has, such as --layers 1")
    document = measure(options)
    if options.json:
        print(json.dumps(document, indent=2))
        return
    for name in ("planned_bytes", "measured_bytes"):
        print(f"{name:24}" + ("unknown" if document[name] is None else f"{document[name] / 2**30:.1f} GiB"))
    for name in ("compile_seconds", "step_seconds", "planned_seconds", "tokens_per_s", "useful_tflops_per_s"):
        print(f"{name:24}" + ("unknown" if document[name] is None else f"{document[name]:,.1f}"))
    for kernel in document["kernels"]:
        print(f"{kernel['seconds']:10.4f} s {kernel['runs']:8,} x {kernel['name']}")


if __name__ == "__main__":
    run_script(main)
