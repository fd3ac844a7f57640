"""FLOPs of the attention kernels in a compiled program.

A program does not know the segments of its rows: all pairs of blocks that causality allows are counted, as without
packing. A window is not counted either.
"""

import math
import re

from bimedix_jax.costs.flops import matmul_flops
from bimedix_jax.kernels.attention.blocks import splash_block
from bimedix_jax.plan.hlo import Instruction, Shape

TRITON = re.compile(r"attention_(forward|queries|keys)_(\d+)x(\d+)x(\d+)")
"""Name of a kernel of kernels/attention/triton.py: what it computes, queries and keys of a block, width of a head."""
SPLASH = re.compile(r"splash_m[qh]a_(fwd|dq|dkv)")
"""Name of a kernel of JAX's splash attention."""
PRODUCTS = {"forward": 2, "fwd": 2, "queries": 3, "dq": 3, "keys": 4, "dkv": 4}
"""Matrix products over each pair of a query and a key. The backward kernels compute the scores again."""


def name_of(instruction: Instruction) -> str:
    """Text with the name of the kernel that an instruction calls: on GPUs from its operation, on TPUs its own name."""
    return f"{instruction.op_name} {instruction.name}"


def is_attention(name: str) -> bool:
    """Whether this is the name of a kernel for attention."""
    return bool(TRITON.search(name) or SPLASH.search(name))


def blocks_visited(length: int, slots: int, rows: int, columns: int) -> int:
    """Pairs of a block of queries and a block of keys, among the last `length` of `slots` causal positions."""
    before = slots - length
    return sum(-(-min(slots, before + first + rows) // columns) for first in range(0, length, rows))


def attention_flops(name: str, operands: list[Shape]) -> tuple[float, float]:
    """(FLOPs of all blocks that the kernel visits, those of the pairs that causality allows).

    Args:
      operands: of the kernel's call; its first floating-point ones are q and k.
    """
    q, k = (shape.dims for shape in [shape for shape in operands if shape.dtype in ("bf16", "f16", "f32")][:2])
    if (found := TRITON.search(name)) is not None:
        kernel, rows, columns, width = found[1], int(found[2]), int(found[3]), int(found[4])
        (batch, length, heads, _), slots = q, k[1]
        heads *= batch
    else:
        found = SPLASH.search(name)
        assert found is not None
        *lead, length, width = q
        kernel, heads, slots, rows = found[1], math.prod(lead), k[-2], splash_block(length) or length
        columns = rows
    products = PRODUCTS[kernel] * heads
    useful = length * (slots - length) + length * (length + 1) // 2
    visited = blocks_visited(length, slots, rows, columns)
    return products * visited * matmul_flops(rows, width, columns), products * matmul_flops(useful, width, 1)
