"""The two code books of NF4 storage, as float32 NumPy arrays (QLoRA, arXiv 2305.14314, appendix E)."""

import numpy as np

NF4_VALUES = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""Quantiles of a standard normal, scaled to [-1, 1], with an exact zero at index 7."""

NF4_THRESHOLDS = (NF4_VALUES[:-1] + NF4_VALUES[1:]) / np.float32(2)
"""float32 midpoints: the code of x is the number of thresholds strictly below x."""

NESTED_BLOCK_SIZE = 256
"""Scales that share one second-level scale under double quantisation."""

EMPTY_TAIL = np.float32(1e-38)
"""bitsandbytes' scale of an incomplete last block of zeros (denormal; complete blocks of zeros have scale 0)."""

HUGE, SHRINK = np.float32(2.0**120), np.float32(2.0**-10)
"""Blocks with a scale of at least HUGE are multiplied by SHRINK, which is exact, before the reciprocal."""

SUM_HUGE, SUM_SHRINK = np.float32(2.0**64), np.float32(2.0**-64)
"""If one scale is at least SUM_HUGE, all are multiplied by SUM_SHRINK, which is exact, before they are summed."""


def dynamic_map() -> np.ndarray:
    """The signed 8-bit dynamic code book, ascending, 256 float32 values in [-1, 1].

    There are seven decades for each sign. Decade i (10**(i-6)) is divided into 2**i equal parts, and the code values
    are their centres; 0 and 1 are added (8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861, section 2.1).
    To get the bits that bitsandbytes writes, the edges are computed from both ends towards the middle with one rounding
    each, and every later step rounds to float32.
    """
    values = [np.float32(0), np.float32(1)]
    low, high = np.float32(0.1), np.float32(1)
    for decade in range(7):
        parts = 2**decade
        step = np.float64((high - low) / np.float32(parts))
        index = np.arange(parts + 1)
        edges = np.where(index < (parts + 1) // 2, low + step * index, high - step * (parts - index)).astype(np.float32)
        centres = np.float32(10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*centres, *-centres]
    return np.sort(np.array(values, np.float32))


DYNAMIC_MAP = dynamic_map()
DYNAMIC_THRESHOLDS = (DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:]) / np.float32(2)
