"""NF4 look-up in the registers of an NVIDIA GPU, for kernels that dequantise.

The table's 16 float32 values are split into four planes of bytes, each 16 bytes in four registers. PRMT selects four
bytes by four selectors of 4 bits. Two packed bytes of NF4 are four such selectors: the low nibble of a byte is its odd
element, the high nibble the even one. A selector can address 8 bytes only. So there are two look-ups for each plane,
and a third PRMT chooses between them by the codes' highest bits. The four planes are then transposed into four float32
words. This takes 6 integer instructions a value. A tree of selects takes 20, which would cost more than the products of
a tile of 128 rows.
"""

import numpy as np

from bimedix_jax.kernels.nf4.tables import NF4_VALUES

CONSTRAINTS = "=r,=r,=r,=r,r,f,f,f,f"
"""Operands of `dequantize_pairs` for four packed bytes: four words out; the bytes in one register, four scales."""


def plane_words(plane: int) -> list[str]:
    """Byte `plane` of the 16 values, four to a word, lowest code in the lowest byte."""
    column = NF4_VALUES.view(np.uint8).reshape(16, 4)[:, plane]
    return [f"0x{word:08x}" for word in np.ascontiguousarray(column).view("<u4")]


def four_values(first: int) -> list[str]:
    """float32 registers f0..f3: values of the four lowest nibbles of `code`, times the scales $first and $first+1."""
    lines = []
    for plane in range(4):
        a, b, c, d = plane_words(plane)
        lines += [f"prmt.b32 low, {a}, {b}, code;", f"prmt.b32 high, {c}, {d}, code;"]
        lines += [f"prmt.b32 plane{plane}, low, high, half;"]
    for pair, halves in (("0x5140", (0, 1)), ("0x7362", (2, 3))):
        lines += [f"prmt.b32 low, plane0, plane1, {pair};", f"prmt.b32 high, plane2, plane3, {pair};"]
        lines += [f"prmt.b32 word{halves[0]}, low, high, 0x5410;", f"prmt.b32 word{halves[1]}, low, high, 0x7632;"]
    for i in range(4):
        lines += [f"mov.b32 f{i}, word{i};", f"mul.rn.f32 f{i}, f{i}, ${first + i // 2};"]
    return lines


def dequantize_pairs() -> str:
    """PTX (sm80 and newer) that maps each of four packed bytes, with its scale, to two bfloat16 in a word.

    The even element is the lower half. Value times scale in float32, rounded once, as `dequantize` does.
    """
    lines = [".reg .b32 code, half, low, high, plane<4>, word<4>;", ".reg .f32 f<4>;"]
    # PRMT replicates a sign if a selector's highest bit is set; `half` selects between the two look-ups
    lines += ["and.b32 code, $4, 0x77777777;", "shr.b32 half, $4, 1;", "and.b32 half, half, 0x44444444;"]
    lines += ["or.b32 half, half, 0x32103210;", *four_values(5)]
    lines += ["cvt.rn.bf16x2.f32 $0, f0, f1;", "cvt.rn.bf16x2.f32 $1, f2, f3;"]
    lines += ["shr.b32 code, code, 16;", "shr.b32 half, half, 16;", *four_values(7)]
    lines += ["cvt.rn.bf16x2.f32 $2, f0, f1;", "cvt.rn.bf16x2.f32 $3, f2, f3;"]
    return "\n".join(["{", *lines, "}"])
