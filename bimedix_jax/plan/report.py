"""A plan as numbers: memory, FLOPs, communication and time of the compiled steps of an experiment."""

import dataclasses
import math
from typing import Any

from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment, override
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.plan import devices, hardware, hlo, useful
from bimedix_jax.plan.devices import Target
from bimedix_jax.plan.roofline import Costs, costs_of
from bimedix_jax.plan.saved import saved_bytes
from bimedix_jax.plan.step import Compiled, abstract_model, inference_steps, training_step

BIMED_TOKENS = 632e6
"""Of BiMed1.3M (arXiv 2402.13253, table 8)."""
EPOCHS = 2
PAPER = {"devices": "8 x A100-80GB", "hours": 35.0, "device_hours": 280.0, "tokens_per_s": 2 * 632e6 / (35 * 3600)}
"""The paper's own run (section 4.1)."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """A training step that was compiled.

    Attributes:
      program, costs: None where the compiler ran out of memory.
    """

    experiment: Experiment
    config: MixtralConfig
    target: Target
    compiled: Compiled
    program: hlo.Program | None
    costs: Costs | None

    @property
    def fits(self) -> bool:
        peak = self.compiled.peak_bytes
        return self.compiled.compiles and peak is not None and peak <= self.target.device.memory_bytes


def plan_training(config: MixtralConfig, experiment: Experiment, target: Target) -> Planned:
    """Compiles the training step of an experiment for a target.

    Raises:
      BimedixError: the experiment cannot run on so many devices, or the compiler for them is not installed.
    """
    if experiment.data.sequence_length > config.max_position_embeddings:
        raise BimedixError(
            f"Rows of {experiment.data.sequence_length} tokens exceed the model's {config.max_position_embeddings} "
            "positions; lower data.sequence_length."
        )
    absent = hardware.devices(target.device.name, target.count)
    compiled = training_step(config, experiment, absent, target.device.platform)
    program = hlo.parse(compiled.text) if compiled.compiles else None
    costs = costs_of(program, target.device) if program is not None else None
    return Planned(experiment, config, target, compiled, program, costs)


def described(planned: Planned) -> dict[str, Any]:
    """The plan of a training step, as it is printed under --json."""
    target, compiled = planned.target, planned.compiled
    document: dict[str, Any] = {
        "target": target.name,
        "fits": planned.fits,
        "memory_bytes_per_device": target.device.memory_bytes,
        "peak_bytes_per_device": compiled.peak_bytes,
        "parts": parts(planned),
        "compile_seconds": compiled.seconds,
    }
    if planned.costs is None:
        return document | {"compiler": "ran out of the device's memory"}
    return document | work(planned, planned.costs) | speed(planned, planned.costs)


def parts(planned: Planned) -> dict[str, int]:
    """Bytes of each device: what it holds, what the forward pass keeps, and the rest (gradients, gathered weights,
    working space)."""
    found = dict(planned.compiled.held)
    if planned.program is not None and planned.compiled.peak_bytes is not None:
        found["activations"] = saved_bytes(planned.program, planned.config.num_layers)
        found["temporaries"] = planned.compiled.peak_bytes - sum(found.values())
    return found


def work(planned: Planned, costs: Costs) -> dict[str, Any]:
    """FLOPs of a step on all devices against the useful ones, and what each device moves."""
    experiment, count = planned.experiment, planned.target.count
    tokens, length = experiment.batch.size * experiment.data.sequence_length, experiment.data.sequence_length
    wanted = useful.training_flops(abstract_model(planned.config, experiment), tokens, length)
    flops = costs.total_flops * count
    excess = {
        "recomputation": costs.flops["recomputed"] * count,
        "tile padding": costs.padding * count,
        "attention beyond the causal half, and its scores again in the backward pass": costs.flops["attention"] * count
        - wanted["attention"],
    }
    excess["other"] = flops - sum(wanted.values()) - sum(excess.values())
    return {
        "flops": flops,
        "flops_per_device": costs.total_flops,
        "useful_flops": sum(wanted.values()),
        "useful_parts": wanted,
        "excess_flops": excess,
        "collective_bytes": dict(costs.collectives),
        "collectives": dict(costs.exchanges),
        "memory_traffic_bytes": costs.bytes,
    }


def speed(planned: Planned, costs: Costs) -> dict[str, Any]:
    """Predicted times, and what they mean for the paper's run."""
    device, count = planned.target.device, planned.target.count
    tokens = planned.experiment.batch.size * planned.experiment.data.sequence_length
    rate = tokens / costs.step_seconds
    hours = BIMED_TOKENS * EPOCHS / rate / 3600
    wanted = sum(useful.training_flops(
        abstract_model(planned.config, planned.experiment), tokens, planned.experiment.data.sequence_length
    ).values())  # fmt: skip
    return {
        "roofline": {
            "compute_seconds": costs.compute_seconds,
            "memory_seconds": costs.memory_seconds,
            "network_seconds": costs.network_seconds,
        },
        "device_seconds": costs.device_seconds,
        "exposed_network_seconds": costs.step_seconds - costs.device_seconds,
        "step_seconds": costs.step_seconds,
        "tokens_per_step": tokens,
        "tokens_per_s": rate,
        "useful_share_of_peak": wanted / (costs.step_seconds * count * device.bfloat16_flops),
        "hours": hours,
        "device_hours": hours * count,
        "paper": PAPER,
    }


def plan_inference(
    config: MixtralConfig, experiment: Experiment, target: Target, rows: int, length: int
) -> dict[str, dict[str, Any]]:
    """The prefill of `rows` prompts of `length` tokens and one decoding step, adapters unmerged.

    On one device where the model fits there, otherwise with heads and columns divided among as many as divide them.
    """
    device = target.device
    sizes = [1] + [n for n in (2, 4, 8) if n <= target.count and config.num_kv_heads % n == 0]
    found: dict[str, dict[str, Any]] = {}
    for size in sizes:
        mesh = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.expert": 1, "mesh.tensor": size, "batch.rows": 1}
        alone = override(experiment, mesh) if size > 1 else experiment
        least = held_bytes(config, experiment) / size
        if least > device.memory_bytes and size != sizes[-1]:
            continue
        absent = hardware.devices(device.name, size)
        steps = inference_steps(config, alone, absent, device.platform, rows, length)
        model = abstract_model(config, experiment)
        for name, compiled, new in (("prefill", steps[0], length), ("decode", steps[1], 1)):
            before = 0 if name == "prefill" else length
            wanted = useful.inference_flops(model, rows, new, before)
            found[name] = inference_row(compiled, device, size, rows, new, wanted) | {"prompt_tokens": length}
        if all(row["fits"] for row in found.values()):
            break
    return found


def held_bytes(config: MixtralConfig, experiment: Experiment) -> int:
    """Bytes of base and adapters."""
    import jax
    from flax import nnx

    leaves = jax.tree.leaves(nnx.state(abstract_model(config, experiment)))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def inference_row(
    compiled: Compiled, device: devices.Device, count: int, rows: int, new: int, wanted: dict[str, float]
) -> dict[str, Any]:
    """One of the steps of inference; `tokens_per_s` counts the tokens that go in (prefill) or come out (decode)."""
    peak = compiled.peak_bytes
    row: dict[str, Any] = {
        "devices": count,
        "rows": rows,
        "fits": compiled.compiles and peak is not None and peak <= device.memory_bytes,
        "peak_bytes_per_device": peak,
        "parts": compiled.held,
        "compile_seconds": compiled.seconds,
    }
    if not compiled.compiles:
        return row
    costs = costs_of(hlo.parse(compiled.text), device)
    return row | {
        "flops": costs.total_flops * count,
        "useful_flops": sum(wanted.values()),
        "memory_traffic_bytes": costs.bytes,
        "collective_bytes": dict(costs.collectives),
        "roofline": {
            "compute_seconds": costs.compute_seconds,
            "memory_seconds": costs.memory_seconds,
            "network_seconds": costs.network_seconds,
        },
        "step_seconds": costs.step_seconds,
        "tokens_per_s": rows * new / costs.step_seconds,
    }
