"""`bimedix plan --fit`: changes an experiment until it fits a target, the changes that cost only time first."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from bimedix_jax.costs.devices import Target
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment, differences, override
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.plan.report import Estimate, estimate_training

SHORTEST = 512
"""Rows are not made shorter than this many tokens, since more documents would be cut."""


def fit(
    config: MixtralConfig,
    experiment: Experiment,
    target: Target,
    report: Callable[[str], None],
) -> tuple[Estimate, list[str]]:
    """The estimate of the first experiment that fits, and its changes. If none fits, that of the last one tried.

    The changes are made in this order, each in addition to the ones before it:
      1. fewer rows in a micro-batch, and more micro-batches: the same step, with more kernels and gathers;
      2. layers recomputed in the backward pass: the same step, a third slower;
      3. heads and feed-forward columns sharded (mesh.tensor): the same step, with more communication;
      4. the optimiser's moments in bfloat16: different rounding;
      5. shorter rows, and more of them: different data, since documents are cut at other places.

    Args:
      report: called with a sentence about each experiment that does not fit and the next one.
    """
    estimate, first = None, with_divisible_rows(experiment, target)
    for candidate in [first, *candidates(config, first, target)]:
        if estimate is not None:
            if cannot_fit(estimate, candidate):
                continue
            report(f"{target.name}: {shortage(estimate)}; trying {'; '.join(changes(candidate, experiment))}")
        estimate = estimate_training(config, candidate, target)
        if estimate.fits:
            break
    assert estimate is not None
    return estimate, changes(estimate.experiment, experiment)


def changes(ours: Experiment, asked: Experiment) -> list[str]:
    """The fields that differ, as 'batch.rows: 1, 8 asked for'."""
    return [line.replace(" here", "").replace(" there", " asked for") for line in differences(ours, asked)]


def shortage(estimate: Estimate) -> str:
    peak = estimate.compiled.peak_bytes
    needs = "more" if peak is None else f"{peak / 2**30:.1f} GiB"
    return f"needs {needs} of {estimate.target.device.memory_bytes / 2**30:.1f} GiB a device"


def with_divisible_rows(experiment: Experiment, target: Target) -> Experiment:
    """The experiment with rows that the devices divide, and at least as many rows in a step."""
    parts = row_parts(experiment, target)
    if experiment.batch.rows % parts == 0:
        return experiment
    micro_batches = max(1, math.ceil(experiment.batch.size / parts))
    return override(experiment, {"batch.rows": parts, "batch.accumulation": micro_batches})


def row_parts(experiment: Experiment, target: Target) -> int:
    """Number of devices that the rows of a micro-batch are sharded over."""
    tensor = 1 if experiment.mesh is None else experiment.mesh.tensor
    if target.count % tensor:
        raise BimedixError(f"mesh.tensor {tensor} does not divide {target.count} devices; choose one that does.")
    return target.count // tensor


def candidates(config: MixtralConfig, experiment: Experiment, target: Target) -> Iterator[Experiment]:
    """Experiments in the order of `fit`."""
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
    """Halves the rows of a micro-batch until each device has one. The rows of a step stay the same."""
    rows = experiment.batch.rows
    while rows > parts:
        rows = max(parts, rows // 2 // parts * parts)
        experiment = with_rows(experiment, rows)
        yield experiment


def with_rows(experiment: Experiment, rows: int) -> Experiment:
    return override(
        experiment, {"batch.rows": rows, "batch.accumulation": max(1, math.ceil(experiment.batch.size / rows))}
    )


def cannot_fit(tried: Estimate, next_one: Experiment) -> bool:
    """Whether an experiment that only has fewer rows need not be compiled, since it would not fit either.

    Memory beyond the arguments is assumed to be proportional to the rows. The last candidate is always compiled.
    """
    peak = tried.compiled.peak_bytes
    before = tried.experiment
    changed: Any = {"batch.rows": next_one.batch.rows, "batch.accumulation": next_one.batch.accumulation}
    if peak is None or override(before, changed) != next_one or next_one.batch.rows >= before.batch.rows:
        return False
    arguments = sum(tried.compiled.argument_bytes.values())
    expected = arguments + (peak - arguments) * next_one.batch.rows / before.batch.rows
    last = next_one.batch.rows <= row_parts(next_one, tried.target)
    return expected > tried.target.device.memory_bytes and not last
