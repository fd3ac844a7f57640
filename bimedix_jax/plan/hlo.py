"""Parses the text of a compiled XLA program into computations and instructions, and finds the trip counts of its loops.

The input is the text of `compiled.as_text()`: HLO after all of XLA's passes, scheduled and fused. It is the program of
one device of an SPMD module.
"""

import dataclasses
import functools
import math
import re

from bimedix_jax.errors import BimedixError

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0, "opaque": 0,
}  # fmt: skip
"""Bits of an element. 8-bit floats such as f8e4m3fn are recognised by their prefix."""

ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\](\{[^{}]*\})?")
SPACE = re.compile(r"S\((\d+)\)")
HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{")
NAME = re.compile(r"(ROOT )?%?([\w.-]+) = ")
OPCODE = re.compile(r"([a-z][\w-]*)\(")
OPERAND = re.compile(r"%([\w.-]+)")
CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
MAIN_MEMORY = 0
"""Memory space of HBM. The TPU compiler also uses others; 1 is VMEM."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of a program. `space` is its memory space."""

    dtype: str
    dims: tuple[int, ...]
    space: int = MAIN_MEMORY

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        bits = BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 4 if self.dtype.startswith("f4") else None)
        if bits is None:
            raise BimedixError(f"The compiled program has an array of {self.dtype}, whose size is unknown.")
        return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      shapes: of the result; a tuple has one for each of its arrays.
      operands: names of instructions of the same computation.
      text: the text between the parentheses, such as the value of a constant or the number of a parameter.
      attributes: the text after the parentheses.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """The JAX operation that it comes from; empty if XLA added it."""
        match = OP_NAME.search(self.attributes)
        return match[1] if match else ""

    @property
    def called(self) -> dict[str, str]:
        """Names of the computations that it calls, by attribute. Branches are numbered."""
        found = dict(CALLED.findall(self.attributes))
        if branches := BRANCHES.search(self.attributes):
            found |= {f"branch {i}": name for i, name in enumerate(OPERAND.findall(branches[1]))}
        return found

    def attribute(self, name: str) -> str | None:
        """The value of `name={...}` without its braces, or of `name=word`."""
        match = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|([^\s,]+))", self.attributes)
        return None if match is None else match[1] if match[1] is not None else match[2]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in execution order."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in reversed(self.instructions.values()) if i.is_root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.text): i for i in self.instructions.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                found[name].append(instruction)
        return found

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        return self.instructions[instruction.operands[index]]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled module."""

    computations: dict[str, Computation]
    entry: Computation

    def callee(self, instruction: Instruction, attribute: str = "calls") -> Computation:
        return self.computations[instruction.called[attribute]]


def balanced(text: str, start: int) -> int:
    """Index after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise BimedixError("The text of the compiled program ends inside parentheses; XLA prints an unexpected format.")


def parse_shapes(text: str) -> tuple[Shape, ...]:
    shapes = []
    for dtype, dims, layout in ARRAY.findall(text):
        space = SPACE.search(layout)
        sizes = tuple(int(n.strip().removeprefix("<=")) for n in dims.split(",") if n.strip())
        shapes.append(Shape(dtype, sizes, int(space[1]) if space else MAIN_MEMORY))
    return tuple(shapes)


def parse_instruction(line: str) -> Instruction | None:
    """Parses one line of a computation. Returns None if it is not an instruction."""
    head = NAME.match(line)
    if head is None:
        return None
    start = head.end()
    stop = balanced(line, start) if line[start] == "(" else line.index(" ", start)
    opcode = OPCODE.match(line, stop + 1)
    if opcode is None:
        return None
    end = balanced(line, opcode.end() - 1)
    text = line[opcode.end() : end - 1]
    return Instruction(
        name=head[2],
        opcode=opcode[1],
        shapes=parse_shapes(line[start:stop]),
        operands=() if opcode[1] in ("constant", "parameter") else tuple(OPERAND.findall(text)),
        text=text,
        attributes=line[end:],
        is_root=head[1] is not None,
    )


def parse(text: str | None) -> Program:
    """Parses the text of `compiled.as_text()`.

    Raises:
      BimedixError: there is no text, or it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in (text or "").splitlines():
        line = line.strip()
        if current is None:
            if line.endswith("{") and (header := HEADER.fullmatch(line)) and not line.startswith("HloModule"):
                current = computations.setdefault(header[2], Computation(header[2], {}))
                entry = header[2] if header[1] else entry
        elif line == "}" or line.startswith("}, "):  # an execution thread may follow the brace
            current = None
        elif (instruction := parse_instruction(line)) is not None:
            current.instructions[instruction.name] = instruction
    if not entry:
        raise BimedixError("XLA does not print the compiled program, so its work cannot be counted.")
    return Program(computations, computations[entry])


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs its body; None if that depends on data.

    XLA annotates it for GPUs. Otherwise it is derived from the loop: a counter that starts at a constant, is increased
    by a constant, and is compared with a constant.
    """
    if (known := TRIP_COUNT.search(loop.attributes)) is not None:
        return int(known[1])
    condition, body = program.callee(loop, "condition"), program.callee(loop, "body")
    test = condition.root
    if test.opcode != "compare" or test.attribute("direction") != "LT":
        return None
    index, bound = condition.operand(test, 0), condition.operand(test, 1)
    if index.opcode != "get-tuple-element" or bound.opcode != "constant":
        return None
    place = int(index.attribute("index") or 0)
    start = scalar(computation, carried(computation, loop.operands[0], place))
    step = step_of(program, body, place)
    if start is None or not step or step < 0:
        return None
    return max(0, -(-(int(bound.text) - start) // step))


def carried(computation: Computation, name: str, place: int) -> Instruction | None:
    """Element number `place` of a tuple that this computation builds."""
    built = unwrapped(computation, computation.instructions[name])
    return computation.operand(built, place) if built.opcode == "tuple" else None


def unwrapped(computation: Computation, instruction: Instruction) -> Instruction:
    """The instruction behind copies, bitcasts, conversions and barriers."""
    while instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start", "optimization-barrier", "convert"):
        instruction = computation.operand(instruction, 0)
    return instruction


def scalar(computation: Computation, instruction: Instruction | None) -> int | None:
    """The value, if it is an integer constant."""
    if instruction is None:
        return None
    found = unwrapped(computation, instruction)
    return int(found.text) if found.opcode == "constant" and found.text.lstrip("-").isdigit() else None


def step_of(program: Program, body: Computation, place: int) -> int | None:
    """The constant that an iteration adds to element `place` of the loop's carry."""
    built = unwrapped(body, body.root)
    if built.opcode != "tuple":
        return None
    added, where = unwrapped(body, body.operand(built, place)), body
    if added.opcode == "get-tuple-element" and body.operand(added, 0).opcode == "fusion":
        # one of several results of a fusion
        where = program.callee(body.operand(added, 0))
        added = where.operand(where.root, int(added.attribute("index") or 0))
    elif added.opcode == "fusion":
        where = program.callee(added)
        added = where.root
    if added.opcode != "add":
        return None
    steps = [scalar(where, where.operand(added, side)) for side in (0, 1)]
    return next((step for step in steps if step is not None), None)


def trip_count_of(program: Program, computation: Computation, loop: Instruction) -> int:
    """`trip_count`, which must be known.

    Raises:
      BimedixError: it depends on data.
    """
    trips = trip_count(program, computation, loop)
    if trips is None:
        raise BimedixError(
            f"The trip count of the loop {loop.op_name or loop.name} depends on data, so its work cannot be counted; "
            "choose a target whose kernels have static grids."
        )
    return trips


SILENT = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id optimization-barrier "
    "async-update add-dependency".split()
)
"""Opcodes without work. Opcodes that end in -done have none either: they wait for an operation that -start began."""
