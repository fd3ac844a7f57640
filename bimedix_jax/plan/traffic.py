"""HBM traffic of one instruction of a compiled program.

The rule:
  - An instruction reads each operand once, and writes its result once.
  - A slice, a gather and an in-place update count the part that they read or write, also inside a fusion.
  - Arrays in another memory, such as a TPU's VMEM, count when they are copied from HBM or to it.
  - A kernel of ours that is given the index of an expert reads only the experts that own rows. The program does not
    know the group sizes, so it is assumed that as many experts as possible do: the number of rows, or all of a layer.
    Each of their blocks is read once for each tile of rows, and each tile is assumed to hold a whole group.
"""

import itertools
import math
import re

from bimedix_jax.errors import BimedixError
from bimedix_jax.plan.hlo import MAIN_MEMORY, Computation, Instruction, Program, Shape
from bimedix_jax.plan.work import GRADIENT, KERNELS, ROW_TYPES, TILE, UNPACK

MOSAIC_UNITS = {"grouped_nf4_rows": (0, 2, 3, 4), "grouped_nf4": (0, 1), "grouped_dense": (0,)}
"""TPU kernels of products: which operands after the rows have an axis of experts."""
MOSAIC_KERNEL = re.compile(r"\b(grouped_nf4_rows|grouped_nf4|grouped_dense)/")
HEIGHT = 128
"""Most rows of a tile on a TPU."""

SLICES = ("slice", "dynamic-slice", "gather", "slice-start", "dynamic-slice-start")
READ_IN_PART = ("dynamic-slice", "slice", "gather")
FREE = ("bitcast", "tuple", "get-tuple-element", "reshape")
GENERATED = ("broadcast", "iota", "rng-bit-generator")
"""Opcodes that read next to nothing."""


def bytes_of(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Bytes of HBM that one execution reads and writes."""
    return read(program, computation, instruction) + written(program, computation, instruction)


def read(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Bytes of HBM that one execution reads."""
    operands = [computation.instructions[name] for name in instruction.operands]
    if instruction.opcode in SLICES or instruction.opcode == "copy-start":
        source = operands[0].shapes[0]
        return float(moved(instruction)) if source.space == MAIN_MEMORY else 0.0
    if instruction.opcode == "dynamic-update-slice":
        return float(nbytes(operands[1].shapes[0]))
    if target_of(instruction) in KERNELS:
        return kernel_read(instruction, [operand.shapes[0] for operand in operands])
    if instruction.opcode in GENERATED:
        return 0.0
    return sum(read_bytes(program, operand, instruction, place) for place, operand in enumerate(operands))


def moved(instruction: Instruction) -> int:
    """Bytes that a slice or a copy moves. Results of a start are (source, target, context) or (target, source, ...)."""
    if len(instruction.shapes) == 1:
        return instruction.shapes[0].nbytes
    return min((shape.nbytes for shape in instruction.shapes[:2]), default=0)


def written(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Bytes of HBM that one execution writes. An in-place update counts the part that it updates."""
    if instruction.opcode == "dynamic-update-slice":
        return float(nbytes(computation.operand(instruction, 1).shapes[0]))
    if instruction.opcode.endswith("-start") and len(instruction.shapes) > 1:
        source = computation.operand(instruction, 0).shapes[0].space if instruction.operands else MAIN_MEMORY
        sides = [shape.space == MAIN_MEMORY for shape in instruction.shapes[:2]]
        return float(moved(instruction) * max(0, sum(sides) - (source == MAIN_MEMORY)))
    if instruction.opcode != "fusion":
        return float(sum(map(nbytes, instruction.shapes)))
    inside = program.callee(instruction)
    root = inside.root
    parts = [inside.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0.0
    for part, shape in itertools.zip_longest(parts, instruction.shapes):
        while part is not None and part.opcode in ("bitcast", "reshape"):
            part = inside.operand(part, 0)
        if part is not None and part.opcode == "dynamic-update-slice" and shape is not None:
            total += min(inside.operand(part, 1).shapes[0].nbytes, nbytes(shape))
        elif shape is not None:
            total += nbytes(shape)
    return total


def target_of(instruction: Instruction) -> str:
    """What a custom call calls; empty for another instruction."""
    if instruction.opcode != "custom-call":
        return ""
    return (instruction.attribute("custom_call_target") or "").strip('"')


def kernel_read(instruction: Instruction, operands: list[Shape]) -> float:
    """Bytes that a kernel of ours reads of its operands."""
    indexed, used = units_read(instruction, operands)
    return float(
        sum(
            nbytes(shape) * (min(1.0, used / shape.dims[0]) if place in indexed else 1.0)
            for place, shape in enumerate(operands)
        )
    )


def units_read(instruction: Instruction, operands: list[Shape]) -> tuple[set[int], int]:
    """(operands that have an axis of units, how many of these are read); all other operands are read whole.

    A unit is the matrix of an expert, or of a projection. Kernels of grouped products take the units of all layers. The
    grid has a tile for each full height of rows, and one more for each expert of a layer (on a TPU but one).

    Raises:
      BimedixError: a kernel of a product whose operands are not those of kernels/grouped_matmul.
    """
    triton, mosaic = TILE.search(instruction.op_name), MOSAIC_KERNEL.search(instruction.op_name)
    if mosaic is None and (triton is None or triton["kernel"] == GRADIENT):
        return set(), 0
    if triton is not None and triton["kernel"] == UNPACK:
        return {1, 2, 3, 4} & set(range(len(operands))), instruction.shapes[0].dims[0]
    x = next((i for i, shape in enumerate(operands) if shape.dtype in ROW_TYPES and len(shape.dims) == 2), None)
    if not x or len(operands[0].dims) != 1:
        raise BimedixError(f"The kernel {instruction.op_name} has other operands than expected; it cannot be counted.")
    rows, tiles = operands[x].dims[0], operands[0].dims[0]
    if mosaic is not None:
        experts, after = tiles - math.ceil(rows / min(rows, HEIGHT)) + 1, MOSAIC_UNITS[mosaic[1]]
    else:
        assert triton is not None
        experts, after = max(1, tiles - math.ceil(rows / int(triton["m"]))), (0, 1, 2, 3)
    return {x + 1 + place for place in after if x + 1 + place < len(operands)}, min(rows, experts)


def nbytes(shape: Shape) -> int:
    """Bytes in HBM; 0 for an array in another memory."""
    return shape.nbytes if shape.space == MAIN_MEMORY else 0


def read_bytes(program: Program, operand: Instruction, user: Instruction, place: int) -> float:
    """Bytes that `user` reads of its operand number `place`."""
    whole = float(sum(map(nbytes, operand.shapes)))
    if user.opcode != "fusion" or not whole or len(operand.shapes) != 1:
        return whole
    inside = program.callee(user)
    return min(whole, part_read(program, inside, inside.parameters[place], whole))


def is_copy(program: Program, instruction: Instruction) -> bool:
    """Whether a fused instruction only changes the layout of its operand."""
    if instruction.opcode != "fusion":
        return instruction.opcode == "copy"
    inside = program.callee(instruction)
    return inside.root.opcode == "copy" and inside.operand(inside.root, 0).opcode == "parameter"


def part_read(program: Program, computation: Computation, value: Instruction, whole: float) -> float:
    """Bytes that a fused computation reads of a value of `whole` bytes: less than all if every user slices it."""
    total = 0.0
    for user in computation.users[value.name]:
        if user.opcode in READ_IN_PART and user.operands[0] == value.name:
            total += sum(shape.nbytes for shape in user.shapes)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # updated in place
        elif user.opcode in FREE:
            total += 0.0 if user.is_root and user.opcode == "tuple" else part_read(program, computation, user, whole)
        elif is_copy(program, user) and not user.is_root:
            total += part_read(program, computation, user, whole)  # copied as far as it is read
        elif user.opcode == "fusion":
            inside = program.callee(user)
            places = [place for place, name in enumerate(user.operands) if name == value.name]
            total += sum(part_read(program, inside, inside.parameters[place], whole) for place in places)
        else:
            return whole
    return min(total, whole)
