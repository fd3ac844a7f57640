"""The look-up in PTX against the table, bit for bit: a small interpreter executes the PTX text.

Interpret mode has no inline assembly, so nothing else tests it without a GPU. Semantics: PTX ISA 8.7, 9.7.1 to 9.7.9.
"""

import re
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from bimedix_jax.kernels.nf4 import ptx
from bimedix_jax.kernels.nf4.tables import NF4_VALUES

MASK = 0xFFFFFFFF


def permute(a: int, b: int, selector: int) -> int:
    """prmt.b32 in its default mode: the lowest four nibbles of the selector each choose one of eight bytes."""
    sources = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    assert not selector & 0x8888, "a nibble's highest bit would replicate the sign"
    return int.from_bytes(bytes(sources[(selector >> (4 * i)) & 7] for i in range(4)), "little")


def as_float(bits: int) -> np.float32:
    return np.uint32(bits).view(np.float32)


def product(a: int, b: int) -> int:
    return int((as_float(a) * as_float(b)).view(np.uint32))


def packed_halves(high: int, low: int) -> int:
    rounded = [int(as_float(bits).astype(ml_dtypes.bfloat16).view(np.uint16)) for bits in (high, low)]
    return rounded[0] << 16 | rounded[1]


OPERATIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shr.b32": lambda a, b: a >> b,
    "prmt.b32": permute,
    "mul.rn.f32": product,
    "cvt.rn.bf16x2.f32": packed_halves,
}


def execute(text: str, registers: dict[str, int]) -> dict[str, int]:
    """Every instruction once, in order."""
    for line in text.strip("{}\n ").splitlines():
        if line.startswith(".reg"):
            continue
        matched = re.fullmatch(r"([\w.]+) ([^;]+);", line)
        assert matched, line
        target, *sources = matched[2].split(", ")
        values = [registers[name] if name in registers else int(name, 0) for name in sources]
        registers[target] = OPERATIONS[matched[1]](*values) & MASK
    return registers


@pytest.mark.parametrize("seed", range(4))
def test_every_byte_with_any_scale(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scales = rng.lognormal(-4, 2, 256).astype(np.float32)
    octets = rng.permutation(256).astype(np.uint8)
    text = ptx.dequantize_pairs()
    for first in range(0, 256, 4):
        inputs = {"$4": int(octets[first : first + 4].view("<u4")[0])}
        inputs |= {f"${5 + i}": int(scales[first + i].view(np.uint32)) for i in range(4)}
        found = execute(text, inputs)
        words = np.array([found[f"${i}"] for i in range(4)], np.uint32)
        codes = np.stack([octets[first : first + 4] >> 4, octets[first : first + 4] & 15], axis=1)
        expected = (NF4_VALUES[codes] * scales[first : first + 4, None]).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(words.view("<u2").reshape(4, 2), expected.view(np.uint16))


def test_every_declared_operand_is_used() -> None:
    """Outputs: four words. Inputs: four bytes in one register, four scales."""
    assert ptx.CONSTRAINTS.split(",") == ["=r"] * 4 + ["r"] + ["f"] * 4
    assert {int(n) for n in re.findall(r"\$(\d)", ptx.dequantize_pairs())} == set(range(9))
