"""Which part of a training step a kernel of the compiled program belongs to, by the named scopes of the model.

A fusion may compute for several parts. It belongs to the first one in the table.
"""

import re

from bimedix_jax.plan.hlo import Instruction, Program
from bimedix_jax.plan.traffic import target_of
from bimedix_jax.plan.work import KERNELS, UNPACK

EXPERTS, PROJECTIONS, ATTENTION = "products of the experts", "products of the projections", "attention"
DEQUANTISED = "weights dequantised to memory"
SCOPES = (
    ("SwiGLU, with the adapters' deltas", ("silu",)),
    ("results stored for the backward pass, gradients added up", ("dynamic_update_slice",)),
    ("parts that devices gather or send", ("all_gather", "reduce_scatter", "psum")),
    (ATTENTION, ("attention_products", "scores")),
    ("norms, residuals, gradients of the dispatch", ("norm",)),
    ("routing, dispatch, combine", ("router", "router_losses", "dispatch", "combine")),
    ("rotary angles", ("rope",)),
    (PROJECTIONS, ("qkv", "output")),
    (EXPERTS, ("w1_w3", "w2")),
    ("embedding, output head and loss", ("embedding", "head", "loss")),
    ("optimiser", ("optimiser",)),
    ("slices of stacks, with casts of adapters", ("dynamic_slice",)),
)
"""Scopes and operations, as they occur in the names of operations, in order of precedence."""
ZEROS, MOVED = "stacks filled with zeros", "casts and copies"


def part_of(program: Program, instruction: Instruction) -> str:
    """The part of a step that this instruction belongs to."""
    if target_of(instruction) in KERNELS and f"/{UNPACK}_" in instruction.op_name:
        return DEQUANTISED
    inside = program.callee(instruction).instructions.values() if instruction.opcode == "fusion" else ()
    opcodes = {one.opcode for one in inside}
    if inside and (not instruction.operands or opcodes <= {"parameter", "constant", "broadcast", "tuple", "bitcast"}):
        return ZEROS
    words = {word for one in (instruction, *inside) for word in re.split("[/()]", one.op_name)}
    for part, scopes in SCOPES:
        if words.intersection(scopes):
            return part
    return MOVED
