"""A setting of an experiment that fits a target: what costs nothing but time is changed first."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment, differences, override
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.plan.devices import Target
from bimedix_jax.plan.report import Planned, plan_training

SHORTEST = 512
"""Tokens a row below which no shorter rows are tried: documents would be cut apart."""


def fit(
    config: MixtralConfig,
    experiment: Experiment,
    target: Target,
    say: Callable[[str], None],
) -> tuple[Planned, list[str]]:
    """The first setting that fits, and what differs from the one asked for; the last one tried where none does.

    In this order, each on top of those before it:
      1. fewer rows of a micro-batch, and more micro-batches: the same step, with more kernels and gathers;
      2. layers recomputed in the backward pass: the same step, a third slower;
      3. heads and feed-forward columns divided among devices (mesh.tensor): the same step, with more communication;
      4. the optimiser's moments in bfloat16: other rounding;
      5. shorter rows, as many more of them: other data, since documents are cut elsewhere.
    """
    planned, first = None, divisible(experiment, target)
    for setting in [first, *settings(config, first, target)]:
        if planned is not None:
            if hopeless(planned, setting):
                continue
            say(f"{target.name}: {shortage(planned)}; trying {'; '.join(changes(setting, experiment))}")
        planned = plan_training(config, setting, target)
        if planned.fits:
            break
    assert planned is not None
    return planned, changes(planned.experiment, experiment)


def changes(ours: Experiment, asked: Experiment) -> list[str]:
    """What differs, as 'batch.rows: 1, 8 asked for'."""
    return [line.replace(" here", "").replace(" there", " asked for") for line in differences(ours, asked)]


def shortage(planned: Planned) -> str:
    peak = planned.compiled.peak_bytes
    needs = "more" if peak is None else f"{peak / 2**30:.1f} GiB"
    return f"needs {needs} of {planned.target.device.memory_bytes / 2**30:.1f} GiB a device"


def divisible(experiment: Experiment, target: Target) -> Experiment:
    """The experiment with rows that all devices can share, in a step of at least as many."""
    parts = row_parts(experiment, target)
    if experiment.batch.rows % parts == 0:
        return experiment
    micro_batches = max(1, math.ceil(experiment.batch.size / parts))
    return override(experiment, {"batch.rows": parts, "batch.accumulation": micro_batches})


def row_parts(experiment: Experiment, target: Target) -> int:
    """Devices that the rows of a micro-batch are divided among."""
    tensor = 1 if experiment.mesh is None else experiment.mesh.tensor
    if target.count % tensor:
        raise BimedixError(f"mesh.tensor {tensor} does not divide {target.count} devices; choose one that does.")
    return target.count // tensor


def settings(config: MixtralConfig, experiment: Experiment, target: Target) -> Iterator[Experiment]:
    """Settings in the order of `fit`."""
    current = experiment
    for fewer in fewer_rows(experiment, row_parts(experiment, target)):
        current = fewer
        yield current
    if current.remat != "layer":
        current = override(current, {"remat": "layer"})
        yield current
    for size in (2, 4, 8):
        if experiment.mesh is not None and size <= experiment.mesh.tensor:
            continue
        if target.count % size or config.num_kv_heads % size or config.intermediate_size % size:
            break
        current = override(current, {"mesh.tensor": size, "mesh.fsdp": None})
        current = with_rows(current, row_parts(current, target))
        yield current
    if current.optimiser.state_dtype != "bfloat16":
        current = override(current, {"optimiser.state_dtype": "bfloat16"})
        yield current
    while current.data.sequence_length // 2 >= SHORTEST:
        length, rows = current.data.sequence_length // 2, current.batch.size * 2
        current = override(current, {"data.sequence_length": length, "batch.accumulation": rows // current.batch.rows})
        yield current


def fewer_rows(experiment: Experiment, parts: int) -> Iterator[Experiment]:
    """Rows of a micro-batch halved until every part has one, with as many rows a step."""
    rows = experiment.batch.rows
    while rows > parts:
        rows = max(parts, rows // 2 // parts * parts)
        experiment = with_rows(experiment, rows)
        yield experiment


def with_rows(experiment: Experiment, rows: int) -> Experiment:
    return override(
        experiment, {"batch.rows": rows, "batch.accumulation": max(1, math.ceil(experiment.batch.size / rows))}
    )


def hopeless(tried: Planned, next_one: Experiment) -> bool:
    """Whether a setting with fewer rows need not be compiled: its share of what rows cost would still be too much."""
    peak = tried.compiled.peak_bytes
    before = tried.experiment
    changed: Any = {"batch.rows": next_one.batch.rows, "batch.accumulation": next_one.batch.accumulation}
    if peak is None or override(before, changed) != next_one or next_one.batch.rows >= before.batch.rows:
        return False
    held = sum(tried.compiled.held.values())
    estimate = held + (peak - held) * next_one.batch.rows / before.batch.rows
    last = next_one.batch.rows <= row_parts(next_one, tried.target)
    return estimate > tried.target.device.memory_bytes and not last
