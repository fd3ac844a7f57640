"""Costs of a compiled program on a device: FLOPs, bytes of memory and network, and time."""

import dataclasses
import functools
from collections import Counter
from typing import Any

from bimedix_jax.costs import devices
from bimedix_jax.costs.devices import Device
from bimedix_jax.plan.attention import is_attention, name_of
from bimedix_jax.plan.collectives import BEGINNING, WAITING, Collective, collective_of, key_of
from bimedix_jax.plan.hlo import SILENT, Computation, Instruction, Program, trip_count_of
from bimedix_jax.plan.shares import part_of
from bimedix_jax.plan.traffic import bytes_of
from bimedix_jax.plan.work import Flops, flops_of

RECOMPUTED = "rematted_computation"
"""Part of the name that JAX gives to operations recomputed by `jax.checkpoint`."""
ATTENTION = "attention_products"
"""Named scope of the products in kernels/attention/api.py."""


@dataclasses.dataclass
class Costs:
    """Totals of one execution of a program on one device.

    Attributes:
      flops: FLOPs of all matrix products, by cause: "recomputed", "attention", "kernels", "dense".
      padding: the FLOPs of "kernels" in tiles beyond the existing rows, without recomputed ones.
      bytes: HBM traffic.
      collectives, exchanges: bytes sent in collectives, and number of collectives, by kind.
      compute_seconds, memory_seconds, network_seconds: time if only this resource counted.
      device_seconds: time of all kernels one after another.
      step_seconds: device_seconds plus the network time that no kernel hides.
      kernels: number of kernels launched.
      parts: seconds of kernels by part of the step (`shares.part_of`).
    """

    flops: Any = dataclasses.field(default_factory=Counter)  # Any, since Counter[float] is no valid type
    padding: float = 0.0
    bytes: float = 0.0
    collectives: Any = dataclasses.field(default_factory=Counter)
    exchanges: Any = dataclasses.field(default_factory=Counter)
    compute_seconds: float = 0.0
    memory_seconds: float = 0.0
    network_seconds: float = 0.0
    device_seconds: float = 0.0
    step_seconds: float = 0.0
    kernels: float = 0.0
    parts: Any = dataclasses.field(default_factory=Counter)

    def add(self, other: "Costs", times: float = 1.0) -> None:
        """Adds the costs of another program, `times` times."""
        for field in dataclasses.fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(ours, Counter):
                for name, value in theirs.items():
                    ours[name] += value * times
            else:
                setattr(self, field.name, ours + theirs * times)

    @property
    def total_flops(self) -> float:
        return float(sum(self.flops.values()))


def network_seconds(collective: Collective, device: Device) -> float:
    """Time of one collective as a ring. A ring across nodes is as fast as its slowest link."""
    rate = device.node_bandwidth if collective.crosses(device.node) else device.link_bandwidth
    return collective.sent / (rate * devices.NETWORK_SHARE)


def compute_seconds(flops: Flops, device: Device) -> float:
    share = devices.MATMUL_SHARE
    if flops.kernel:
        share = (devices.PACKED_SHARE if flops.packed else devices.KERNEL_SHARE)[device.platform]
    return ((flops.total - flops.single) / device.bfloat16_flops + flops.single / device.float32_flops) / share


def cause(instruction: Instruction, flops: Flops) -> str:
    if RECOMPUTED in instruction.op_name:
        return "recomputed"
    if ATTENTION in instruction.op_name or is_attention(name_of(instruction)):
        return "attention"
    return "kernels" if flops.kernel else "dense"


@dataclasses.dataclass
class Clock:
    """Time on the two streams of a device, kernels and network. `ready` has the end of each running collective."""

    kernels: float = 0.0
    network: float = 0.0
    ready: dict[str, float] = dataclasses.field(default_factory=dict)

    def start(self, name: str, seconds: float) -> None:
        self.network = max(self.network, self.kernels) + seconds
        self.ready[name] = self.network

    def wait(self, name: str) -> None:
        self.kernels = max(self.kernels, self.ready.pop(name, 0.0))

    @property
    def end(self) -> float:
        return max(self.kernels, self.network)


class CostModel:
    """Computes the costs of the computations of one program on one device."""

    def __init__(self, program: Program, device: Device):
        self.program = program
        self.device = device
        self.costs_once = functools.cache(self.compute)

    def compute(self, name: str) -> Costs:
        """Costs of one execution of a computation. Those of a loop's body are multiplied by its trip count."""
        computation, costs, clock = self.program.computations[name], Costs(), Clock()
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                times = trip_count_of(self.program, computation, instruction)
                self.add_computation(instruction.called["body"], times, costs, clock)
            elif instruction.opcode == "conditional":
                branches = [self.costs_once(branch) for branch in instruction.called.values()]
                self.add(max(branches, key=lambda branch: branch.step_seconds), 1, costs, clock)
            elif instruction.opcode == "call":
                self.add_computation(instruction.called["to_apply"], 1, costs, clock)
            elif instruction.opcode.endswith("-done") or instruction.name.startswith(WAITING):
                clock.wait(key_of(self.program, instruction))
            elif instruction.opcode not in SILENT:
                self.add_instruction(computation, instruction, costs, clock)
        costs.step_seconds = clock.end
        return costs

    def add_computation(self, name: str, times: float, costs: Costs, clock: Clock) -> None:
        self.add(self.costs_once(name), times, costs, clock)

    def add(self, inner: Costs, times: float, costs: Costs, clock: Clock) -> None:
        costs.add(inner, times)
        clock.kernels = max(clock.kernels, clock.network) + inner.step_seconds * times

    def add_instruction(self, computation: Computation, instruction: Instruction, costs: Costs, clock: Clock) -> None:
        """Adds the costs of one instruction."""
        collective = collective_of(self.program, computation, instruction)
        if collective is not None and collective.size > 1:
            seconds = network_seconds(collective, self.device)
            costs.collectives[collective.kind] += collective.sent
            costs.exchanges[collective.kind] += 1
            costs.network_seconds += seconds
            key = key_of(self.program, instruction)
            clock.start(key, seconds)
            if not instruction.opcode.endswith("-start") and not instruction.name.startswith(BEGINNING):
                clock.wait(key)
            return
        flops = flops_of(self.program, computation, instruction)
        moved = bytes_of(self.program, computation, instruction)
        computing = compute_seconds(flops, self.device)
        moving = moved / (self.device.bandwidth * devices.MEMORY_SHARE)
        costs.flops[cause(instruction, flops)] += flops.total
        if RECOMPUTED not in instruction.op_name:
            costs.padding += flops.total - flops.filled
        costs.bytes += moved
        costs.compute_seconds += computing
        costs.memory_seconds += moving
        if instruction.opcode.endswith("-start"):  # a transfer between memories, parallel to the kernels
            return
        seconds = max(computing, moving) + self.device.launch_seconds
        costs.kernels += 1
        costs.device_seconds += seconds
        costs.parts[part_of(self.program, instruction)] += seconds
        clock.kernels += seconds


def costs_of(program: Program, device: Device) -> Costs:
    """Costs of one execution of a program on each device.

    Raises:
      BimedixError: the program has an instruction or a loop whose work is unknown.
    """
    return CostModel(program, device).costs_once(program.entry.name)
