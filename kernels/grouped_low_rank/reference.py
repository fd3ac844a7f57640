"""The grouped low-rank delta as NumPy loops."""

import numpy as np


def grouped_low_rank(x_MD: np.ndarray, a_EDR: np.ndarray, b_ERF: np.ndarray, group_sizes_E: np.ndarray) -> np.ndarray:
    """y_MF in float32: row m of group e is x_MD[m] @ a_EDR[e] @ b_ERF[e]; rows beyond the last group are zero."""
    y_MF = np.zeros((x_MD.shape[0], b_ERF.shape[2]), np.float32)
    start = 0
    for e, size in enumerate(group_sizes_E):
        rows = slice(start, start + int(size))
        y_MF[rows] = x_MD[rows].astype(np.float32) @ a_EDR[e].astype(np.float32) @ b_ERF[e].astype(np.float32)
        start += int(size)
    return y_MF
