"""What a compiled program costs on a device: FLOPs, bytes of memory and of the network, and the time they take."""

import dataclasses
import functools
from collections import Counter
from typing import Any

from bimedix_jax.plan import devices
from bimedix_jax.plan.collectives import BEGINNING, WAITING, Collective, collective_of, key_of
from bimedix_jax.plan.devices import Device
from bimedix_jax.plan.hlo import SILENT, Computation, Instruction, Program, trip_count_of
from bimedix_jax.plan.work import Flops, bytes_of, flops_of

RECOMPUTED = "rematted_computation"
"""What JAX writes into the name of an operation that `jax.checkpoint` runs a second time."""
ATTENTION = "attention_products"
"""Scope that kernels/attention/api.py gives its products."""


@dataclasses.dataclass
class Costs:
    """Totals of one device and one run of a program.

    Attributes:
      flops: of all matrix products, by cause: "recomputed", "attention", "kernels", "dense".
      padding: of "kernels", those of tiles beyond the rows that exist; recomputed ones are not in it.
      bytes: of HBM. collectives: bytes sent, by kind. exchanges: number of them, by kind.
      compute_seconds, memory_seconds, network_seconds: each resource alone, at the shares assumed.
      device_seconds: of all kernels one after another; step_seconds: with what of the network is not hidden.
      kernels: that are started.
    """

    flops: Any = dataclasses.field(default_factory=Counter)  # counters of floats, which their type does not allow
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

    def add(self, other: "Costs", times: float = 1.0) -> None:
        """Another program's costs, so many times."""
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
    """Time of one exchange in a ring; a ring that leaves the node is as fast as its slowest link."""
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
    if ATTENTION in instruction.op_name:
        return "attention"
    return "kernels" if flops.kernel else "dense"


@dataclasses.dataclass
class Clock:
    """Two streams of one device: kernels, and the network; `ready` is when each running exchange ends."""

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


class Meter:
    """Measures the computations of one program on one device."""

    def __init__(self, program: Program, device: Device):
        self.program = program
        self.device = device
        self.measured = functools.cache(self.measure)

    def measure(self, name: str) -> Costs:
        """One run of a computation. A loop's body is measured once and counted as often as it runs."""
        computation, costs, clock = self.program.computations[name], Costs(), Clock()
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                times = trip_count_of(self.program, computation, instruction)
                self.inner(instruction.called["body"], times, costs, clock)
            elif instruction.opcode == "conditional":
                branches = [self.measured(branch) for branch in instruction.called.values()]
                self.add(max(branches, key=lambda branch: branch.step_seconds), 1, costs, clock)
            elif instruction.opcode == "call":
                self.inner(instruction.called["to_apply"], 1, costs, clock)
            elif instruction.opcode.endswith("-done") or instruction.name.startswith(WAITING):
                clock.wait(key_of(self.program, instruction))
            elif instruction.opcode not in SILENT:
                self.run(computation, instruction, costs, clock)
        costs.step_seconds = clock.end
        return costs

    def inner(self, name: str, times: float, costs: Costs, clock: Clock) -> None:
        self.add(self.measured(name), times, costs, clock)

    def add(self, inner: Costs, times: float, costs: Costs, clock: Clock) -> None:
        costs.add(inner, times)
        clock.kernels = max(clock.kernels, clock.network) + inner.step_seconds * times

    def run(self, computation: Computation, instruction: Instruction, costs: Costs, clock: Clock) -> None:
        """One instruction on the device."""
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
        if instruction.opcode.endswith("-start"):  # a transfer between memories, beside the kernels
            return
        seconds = max(computing, moving) + self.device.launch_seconds
        costs.kernels += 1
        costs.device_seconds += seconds
        clock.kernels += seconds


def costs_of(program: Program, device: Device) -> Costs:
    """Costs of one run of a program on each device.

    Raises:
      BimedixError: something in it cannot be counted.
    """
    return Meter(program, device).measured(program.entry.name)
