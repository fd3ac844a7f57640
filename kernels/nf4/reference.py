"""NF4 in NumPy, one unit at a time. Every backend must give the same bits."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bimedix_jax.kernels.nf4.tables import (
    DYNAMIC_MAP,
    DYNAMIC_THRESHOLDS,
    EMPTY_TAIL,
    HUGE,
    NESTED_BLOCK_SIZE,
    NF4_THRESHOLDS,
    NF4_VALUES,
    SHRINK,
    SUM_HUGE,
    SUM_SHRINK,
)


class PackedUnit(NamedTuple):
    """Leaves of an NF4Tensor without batch axes (see `NF4Tensor`)."""

    packed: np.ndarray
    absmax: np.ndarray
    nested_absmax: np.ndarray | None
    nested_offset: np.ndarray | None


def pad_to(x: np.ndarray, multiple: int) -> np.ndarray:
    return np.pad(x, (0, -x.size % multiple))


def normalise(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(blocks times 1 / absmax, absmax) in float32; denormals become zeros, because XLA:CPU flushes them."""
    blocks = np.where(np.abs(blocks) < np.finfo(np.float32).tiny, np.float32(0), blocks)
    absmax = np.abs(blocks).max(axis=1)
    # without this, the reciprocal of a value above 2**126 would be denormal
    shrink = np.where(absmax >= HUGE, SHRINK, np.float32(1))
    inverse = np.float32(1) / np.where(absmax > 0, absmax * shrink, np.float32(np.inf))
    return (blocks * shrink[:, None]) * inverse[:, None], absmax


def quantize(w: np.ndarray, block_size: int = 64, double_quant: bool = True) -> PackedUnit:
    """Quantises one array of any shape; blocks run over its row-major flattening, the last one zero-padded.

    An incomplete last block is divided by its scale; the others are multiplied by the reciprocal.
    """
    blocks = pad_to(w.astype(np.float32).reshape(-1), block_size).reshape(-1, block_size)
    normalised, absmax = normalise(blocks)
    if w.size % block_size:
        normalised[-1] = np.where(normalised[-1] == 0, np.float32(0), blocks[-1] / (absmax[-1] or np.float32(1)))
        absmax[-1] = absmax[-1] or EMPTY_TAIL
    codes = np.searchsorted(NF4_THRESHOLDS, normalised, side="left").astype(np.uint8).reshape(-1)
    codes = np.concatenate([codes[: w.size], np.full(w.size % 2, 7, np.uint8)])
    packed = (codes[0::2] << 4) | codes[1::2]
    if not double_quant:
        return PackedUnit(packed, absmax, None, None)
    scales = quantize_scales(absmax, lambda scales: scales.mean(dtype=np.float32))
    return PackedUnit(packed, *scales)


def quantize_scales(
    absmax: np.ndarray, mean: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The scales of one unit in 8 bits: (uint8 codes, nested_absmax, offset). `mean` decides its last bit."""
    absmax = np.where(absmax < np.finfo(np.float32).tiny, np.float32(0), absmax)
    shrink = SUM_SHRINK if absmax.max() >= SUM_HUGE else np.float32(1)
    offset = np.asarray(mean(absmax * shrink) / shrink)
    groups = pad_to(absmax - offset, NESTED_BLOCK_SIZE).reshape(-1, NESTED_BLOCK_SIZE)
    scaled, nested_absmax = normalise(groups)
    codes = np.searchsorted(DYNAMIC_THRESHOLDS, scaled.reshape(-1)[: absmax.size]).astype(np.uint8)
    return codes, nested_absmax, offset


def block_scales(unit: PackedUnit) -> np.ndarray:
    """float32 [blocks]: map[code] * nested_absmax + offset, each step rounded separately."""
    if unit.nested_absmax is None:
        return unit.absmax
    groups = np.repeat(unit.nested_absmax, NESTED_BLOCK_SIZE)[: unit.absmax.size]
    return DYNAMIC_MAP[unit.absmax] * groups + unit.nested_offset


def dequantize(unit: PackedUnit, shape: tuple[int, ...], block_size: int = 64) -> np.ndarray:
    """float32 array of `shape`, the row-major shape that was quantised."""
    codes = np.stack([unit.packed >> 4, unit.packed & 15], axis=1).reshape(-1)[: math.prod(shape)]
    scales = np.repeat(block_scales(unit), block_size)[: codes.size]
    return (NF4_VALUES[codes] * scales).reshape(shape)
