"""The collectives of a compiled program."""

import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np

from bimedix_jax.errors import BimedixError
from bimedix_jax.plan.hlo import Computation, Instruction, Program

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast")
NAMED = re.compile(r"replica_groups=mesh\[((?:'[\w.]+'=\d+,?)+)\] \{((?:'[\w.]+',? ?)+)\}")
BEGINNING, WAITING = "async-collective-start", "async-collective-done"
"""Prefixes of the TPU fusions that start a collective and wait for it."""
CHANNEL = re.compile(r"channel_id=(\d+)")
IOTA = re.compile(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective.

    Attributes:
      kind: one of KINDS.
      payload: bytes of the whole array: the result of an all-gather, the operand of a reduction.
      groups: the groups of device numbers that communicate.
    """

    kind: str
    payload: int
    groups: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Devices of the largest group."""
        return max(map(len, self.groups))

    @property
    def sent(self) -> float:
        """Bytes that each device sends, if the collective is a ring."""
        share = (self.size - 1) / self.size
        if self.kind == "all-reduce":
            return 2 * self.payload * share
        return self.payload * (1.0 if self.kind in ("collective-permute", "collective-broadcast") else share)

    def crosses(self, node: int) -> bool:
        """Whether a group spans several nodes, of this many devices each."""
        return any(len({device // node for device in group}) > 1 for group in self.groups)


def collective_of(program: Program, computation: Computation, instruction: Instruction) -> Collective | None:
    """The collective that an instruction performs or starts, if any.

    The TPU compiler splits a collective over several fusions: one starts it, others continue it beside products, and
    the last one waits for it. Each contains a copy of the collective. Only the one that starts it counts.
    """
    if instruction.opcode == "async-start" or instruction.name.startswith(BEGINNING):
        inside = program.callee(instruction)
        return first(collective_of(program, inside, i) for i in inside.instructions.values())
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    operands = sum(shape.nbytes for name in instruction.operands for shape in computation.instructions[name].shapes)
    groups = groups_of(instruction)
    payload = operands * max(map(len, groups)) if kind == "all-gather" else operands
    return Collective(kind, payload, groups)


def key_of(program: Program, instruction: Instruction) -> str:
    """A key that the start of a collective and its wait share: the name of the start, or the channel."""
    if instruction.opcode == "fusion":
        inside = program.callee(instruction)
        channels = [CHANNEL.search(i.attributes) for i in inside.instructions.values() if i.opcode in KINDS]
        return next((f"channel {channel[1]}" for channel in channels if channel is not None), instruction.name)
    return instruction.operands[0] if instruction.opcode.endswith("-done") else instruction.name


def first(found: Iterable[Collective | None]) -> Collective | None:
    return next((collective for collective in found if collective is not None), None)


def groups_of(instruction: Instruction) -> tuple[tuple[int, ...], ...]:
    """Device numbers of each group. For a permutation, each group is a sender and its receiver."""
    text = instruction.attributes
    if (pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)) is not None:
        return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])) or ((0,),)
    if (listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", text)) is not None:
        return tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    if (iota := re.search(r"replica_groups=" + IOTA.pattern, text)) is not None:
        groups, size, shape, order = int(iota[1]), int(iota[2]), iota[3], iota[4]
        numbers = np.arange(groups * size).reshape([int(n) for n in shape.split(",")])
        if order is not None:
            numbers = numbers.transpose([int(n) for n in order.split(",")])
        return tuple(map(tuple, numbers.reshape(groups, size).tolist()))
    if (named := NAMED.search(text)) is not None:
        sizes = {name: int(size) for name, size in re.findall(r"'([\w.]+)'=(\d+)", named[1])}
        inside = [list(sizes).index(name) for name in re.findall(r"'([\w.]+)'", named[2])]
        numbers = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        outside = [axis for axis in range(len(sizes)) if axis not in inside]
        grouped = numbers.transpose([*outside, *inside])
        size = math.prod(numbers.shape[axis] for axis in inside)
        return tuple(map(tuple, grouped.reshape(-1, size).tolist()))
    raise BimedixError(f"The groups of {instruction.name} are printed in an unknown format: {text[:200]}")
