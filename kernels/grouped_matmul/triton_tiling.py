"""Tiles of the Triton kernels, for an A100."""

import dataclasses
from typing import NamedTuple

from jax.experimental import pallas as pl

MULTIPROCESSORS = 108
"""Of an A100."""


class Tile(NamedTuple):
    """Rows, columns and contraction of one step of a program; its warps; the stages of its pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class StoredWeights:
    """Sizes of stored weights [experts, rows, columns], and along which axis a product contracts them.

    `block` is the size of NF4 blocks, 0 for dense weights; `recorded` is the dtype that was quantised. Kernels index
    the experts of all layers of a stack; `experts` counts those of one layer.
    """

    experts: int
    rows: int
    columns: int
    contract_columns: bool
    block: int = 0
    recorded: str = ""

    @property
    def depth(self) -> int:
        return self.columns if self.contract_columns else self.rows

    @property
    def width(self) -> int:
        return self.rows if self.contract_columns else self.columns


def power_of_two(size: int, most: int) -> int:
    """The smallest power of two that is at least `size`, at least 16 (for tensor cores) and at most `most`."""
    return min(most, max(16, pl.next_power_of_2(max(size, 1))))


def product_tile(rows: int, stored: StoredWeights, itemsize: int) -> Tile:
    """The tile of a product; for Mixtral's shapes none spills on an A100 (tests/kernels/test_codegen.py)."""
    # dense weights: at most half of an expert's even share of rows, so that the last, partly empty tile of a group adds
    # at most half of the work; packed weights are dequantised once for each row tile, so one tile holds most groups
    m = power_of_two(-(-rows * (4 if stored.block else 1) // (2 * stored.experts)), 128)
    if itemsize == 4:  # each is three products of TF32, whose operands take twice the registers
        m, n, k, warps, stages = min(m, 32), 64, 32, 4, 2
    elif stored.block:
        n, k, warps, stages = (128, 64, 8, 3) if m == 128 else (64, 256, 4, 4) if m == 16 else (64, 128, 4, 3)
    elif m == 128 and stored.width >= 1024:
        n, k, warps, stages = 256, 64, 8, 3
    else:  # a narrow output, such as that of an adapter's first factor: lower tiles are more, and occupy more of a GPU
        m, n, k, warps, stages = min(m, 64), 128, 32, 4, 4
    # few rows are limited by reading the weights: use every multiprocessor, with as many bytes in flight as before
    narrows = m == 16 and itemsize == 2 and stored.block > 0 and stored.contract_columns
    while narrows and n > 32 and n * MULTIPROCESSORS > stored.width:
        n, k = n // 2, k * 2
    n, k = power_of_two(stored.width, n), power_of_two(stored.depth, k)
    if stored.block:  # whole blocks that divide the columns
        along = max(stored.block, min(stored.columns & -stored.columns, k if stored.contract_columns else n))
        n, k = (n, along) if stored.contract_columns else (along, k)
        m = 16 if itemsize == 4 and k == 128 else m
    return Tile(m, n, k, warps, stages)


def gradient_tile(rows: int, experts: int, depth: int, width: int, itemsize: int) -> Tile:
    """The tile of a gradient to the weights: m of its rows, n of its columns, k rows of the operands."""
    most = 64 if itemsize == 4 else 128
    m, n = power_of_two(depth, most), power_of_two(width, most)
    k = power_of_two(-(-rows // experts), 32)
    return Tile(m, n, k, 8 if m * n >= 128 * 128 else 4, 2 if itemsize == 4 else 3)
