"""What a compiled program sends between devices."""

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
"""Names of a TPU's fusions that begin an exchange and wait for it."""
CHANNEL = re.compile(r"channel_id=(\d+)")
IOTA = re.compile(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange, for one device.

    Attributes:
      kind: one of KINDS.
      payload: bytes of the whole array: what an all-gather returns, what a reduction takes.
      groups: device numbers that exchange with one another.
    """

    kind: str
    payload: int
    groups: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        return max(map(len, self.groups))

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a ring."""
        share = (self.size - 1) / self.size
        if self.kind == "all-reduce":
            return 2 * self.payload * share
        return self.payload * (1.0 if self.kind in ("collective-permute", "collective-broadcast") else share)

    def crosses(self, node: int) -> bool:
        """Whether a group spans nodes of so many devices."""
        return any(len({device // node for device in group}) > 1 for group in self.groups)


def collective_of(program: Program, computation: Computation, instruction: Instruction) -> Collective | None:
    """The exchange that an instruction performs or begins.

    A TPU's compiler cuts an exchange into a fusion that begins it, fusions with products that carry it on, and one that
    waits for it; each holds a copy of the exchange, of which the first counts.
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
    """What the beginning of an exchange and the wait for it have in common: the name of the former, or its channel."""
    if instruction.opcode == "fusion":
        inside = program.callee(instruction)
        channels = [CHANNEL.search(i.attributes) for i in inside.instructions.values() if i.opcode in KINDS]
        return next((f"channel {channel[1]}" for channel in channels if channel is not None), instruction.name)
    return instruction.operands[0] if instruction.opcode.endswith("-done") else instruction.name


def first(found: Iterable[Collective | None]) -> Collective | None:
    return next((collective for collective in found if collective is not None), None)


def groups_of(instruction: Instruction) -> tuple[tuple[int, ...], ...]:
    """Device numbers of each group; of a permutation, each sender with its receiver."""
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
    raise BimedixError(f"The groups of {instruction.name} are printed in a way that is not known here: {text[:200]}")
