"""Estimates of the compiled steps of an experiment: memory, FLOPs, communication and time."""

import dataclasses
import math
from typing import Any

from bimedix_jax.costs import devices, flops
from bimedix_jax.costs.devices import Target
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment, override
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.plan import hardware, hlo, reads
from bimedix_jax.plan.roofline import Costs, costs_of
from bimedix_jax.plan.saved import saved_bytes
from bimedix_jax.plan.step import CompiledStep, abstract_model, inference_steps, training_step

BIMED_TOKENS = 632e6
"""Tokens of BiMed1.3M (arXiv 2402.13253, table 8)."""
EPOCHS = 2
PAPER = {"devices": "8 x A100-80GB", "hours": 35.0, "device_hours": 280.0, "tokens_per_s": 2 * 632e6 / (35 * 3600)}
"""The training run of the paper (section 4.1)."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What compiling a training step for a target shows.

    Attributes:
      program, costs: None if the step needs more memory than the compiler can allocate on the device.
    """

    experiment: Experiment
    config: MixtralConfig
    target: Target
    compiled: CompiledStep
    program: hlo.Program | None
    costs: Costs | None

    @property
    def fits(self) -> bool:
        peak = self.compiled.peak_bytes
        return self.compiled.compiles and peak is not None and peak <= self.target.device.memory_bytes


def estimate_training(config: MixtralConfig, experiment: Experiment, target: Target) -> Estimate:
    """Compiles the training step of an experiment for a target.

    Raises:
      BimedixError: the experiment cannot run on this many devices, or their compiler is not installed.
    """
    if experiment.data.sequence_length > config.max_position_embeddings:
        raise BimedixError(
            f"Rows of {experiment.data.sequence_length} tokens exceed the model's {config.max_position_embeddings} "
            "positions; lower data.sequence_length."
        )
    absent = hardware.devices(target.device.name, target.count)
    compiled = training_step(config, experiment, absent)
    program = hlo.parse(compiled.text) if compiled.compiles else None
    costs = costs_of(program, target.device) if program is not None else None
    return Estimate(experiment, config, target, compiled, program, costs)


def to_document(estimate: Estimate) -> dict[str, Any]:
    """The estimate of a training step as `bimedix plan --json` prints it."""
    target, compiled = estimate.target, estimate.compiled
    document: dict[str, Any] = {
        "target": target.name,
        "fits": estimate.fits,
        "memory_bytes_per_device": target.device.memory_bytes,
        "peak_bytes_per_device": compiled.peak_bytes,
        "parts": parts(estimate),
        "compile_seconds": compiled.seconds,
    }
    if estimate.costs is None:
        return document | {"compiler": "ran out of the device's memory"}
    return document | work(estimate, estimate.costs) | speed(estimate, estimate.costs)


def parts(estimate: Estimate) -> dict[str, int]:
    """Bytes on each device: arguments, activations kept for the backward pass, and temporaries.

    Temporaries are gradients, gathered weights and working space.
    """
    found = dict(estimate.compiled.argument_bytes)
    if estimate.program is not None and estimate.compiled.peak_bytes is not None:
        found["activations"] = saved_bytes(estimate.program, estimate.config.num_layers)
        found["temporaries"] = estimate.compiled.peak_bytes - sum(found.values())
    return found


def work(estimate: Estimate, costs: Costs) -> dict[str, Any]:
    """FLOPs of a step on all devices beside the useful ones, and the bytes that each device moves."""
    experiment, count = estimate.experiment, estimate.target.count
    tokens, length = experiment.batch.size * experiment.data.sequence_length, experiment.data.sequence_length
    wanted = flops.training_flops(abstract_model(estimate.config, experiment), tokens, length)
    total = costs.total_flops * count
    excess = {
        "recomputation": costs.flops["recomputed"] * count,
        "tile padding": costs.padding * count,
        "attention beyond the causal half, and its scores again in the backward pass": costs.flops["attention"] * count
        - wanted["attention"],
    }
    excess["other"] = total - sum(wanted.values()) - sum(excess.values())
    return {
        "flops": total,
        "flops_per_device": costs.total_flops,
        "useful_flops": sum(wanted.values()),
        "useful_parts": wanted,
        "excess_flops": excess,
        "collective_bytes": dict(costs.collectives),
        "collectives": dict(costs.exchanges),
        "memory_traffic_bytes": costs.bytes,
    }


def speed(estimate: Estimate, costs: Costs) -> dict[str, Any]:
    """Predicted times, and the hours that the training run of the paper would take."""
    device, count = estimate.target.device, estimate.target.count
    tokens = estimate.experiment.batch.size * estimate.experiment.data.sequence_length
    rate = tokens / costs.step_seconds
    hours = BIMED_TOKENS * EPOCHS / rate / 3600
    wanted = sum(flops.training_flops(
        abstract_model(estimate.config, estimate.experiment), tokens, estimate.experiment.data.sequence_length
    ).values())  # fmt: skip
    return {
        "roofline": {
            "compute_seconds": costs.compute_seconds,
            "memory_seconds": costs.memory_seconds,
            "network_seconds": costs.network_seconds,
        },
        "device_seconds": costs.device_seconds,
        "device_seconds_by_part": dict(costs.parts.most_common()),
        "exposed_network_seconds": costs.step_seconds - costs.device_seconds,
        "step_seconds": costs.step_seconds,
        "tokens_per_step": tokens,
        "tokens_per_s": rate,
        "useful_share_of_peak": wanted / (costs.step_seconds * count * device.bfloat16_flops),
        "hours": hours,
        "device_hours": hours * count,
        "paper": PAPER,
    }


def estimate_inference(
    config: MixtralConfig, experiment: Experiment, target: Target, rows: int, length: int
) -> dict[str, dict[str, Any]]:
    """The prefill of `rows` prompts of `length` tokens, and one decoding step. Adapters are not merged.

    Both run on one device if the model fits there. Otherwise heads and columns are sharded over 2, 4 or 8 devices.
    """
    device = target.device
    sizes = [1] + [n for n in (2, 4, 8) if n <= target.count and config.num_kv_heads % n == 0]
    found: dict[str, dict[str, Any]] = {}
    for size in sizes:
        mesh = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.expert": 1, "mesh.tensor": size, "batch.rows": 1}
        alone = override(experiment, mesh) if size > 1 else experiment
        least = model_bytes(config, experiment) / size
        if least > device.memory_bytes and size != sizes[-1]:
            continue
        absent = hardware.devices(device.name, size)
        steps = inference_steps(config, alone, absent, rows, length)
        model = abstract_model(config, experiment)
        for name, compiled, new in (("prefill", steps[0], length), ("decode", steps[1], 1)):
            before = 0 if name == "prefill" else length
            wanted = flops.inference_flops(model, rows, new, before)
            found[name] = inference_row(compiled, device, size, rows, new, wanted) | {"prompt_tokens": length}
        if all(row["fits"] for row in found.values()):
            break
    return found


def model_bytes(config: MixtralConfig, experiment: Experiment) -> int:
    """Bytes of the base weights and the adapters."""
    import jax
    from flax import nnx

    leaves = jax.tree.leaves(nnx.state(abstract_model(config, experiment)))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def inference_row(
    compiled: CompiledStep, device: devices.Device, count: int, rows: int, new: int, wanted: dict[str, float]
) -> dict[str, Any]:
    """The row of one inference step. `tokens_per_s` counts prompt tokens (prefill) or new tokens (decode)."""
    peak = compiled.peak_bytes
    row: dict[str, Any] = {
        "devices": count,
        "rows": rows,
        "fits": compiled.compiles and peak is not None and peak <= device.memory_bytes,
        "peak_bytes_per_device": peak,
        "parts": compiled.argument_bytes,
        "compile_seconds": compiled.seconds,
    }
    if not compiled.compiles:
        return row
    program = hlo.parse(compiled.text)
    costs = costs_of(program, device)
    return row | {
        "flops": costs.total_flops * count,
        "useful_flops": sum(wanted.values()),
        "memory_traffic_bytes": costs.bytes,
        "read_bytes": reads.total(reads.readings(program)),
        "collective_bytes": dict(costs.collectives),
        "roofline": {
            "compute_seconds": costs.compute_seconds,
            "memory_seconds": costs.memory_seconds,
            "network_seconds": costs.network_seconds,
        },
        "step_seconds": costs.step_seconds,
        "tokens_per_s": rows * new / costs.step_seconds,
    }
