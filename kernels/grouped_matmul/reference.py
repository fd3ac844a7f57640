"""Grouped matmul as NumPy loops. Every backend must give the same up to rounding."""

import numpy as np


def grouped_matmul(x_MD: np.ndarray, w_EDF: np.ndarray, group_sizes_E: np.ndarray) -> np.ndarray:
    """y_MF in float32: row m of group e is x_MD[m] @ w_EDF[e]; rows beyond the last group are zero."""
    y_MF = np.zeros((x_MD.shape[0], w_EDF.shape[2]), np.float32)
    start = 0
    for e, size in enumerate(group_sizes_E):
        rows = slice(start, start + int(size))
        y_MF[rows] = x_MD[rows].astype(np.float32) @ w_EDF[e].astype(np.float32)
        start += int(size)
    return y_MF


def weight_gradient(x_MD: np.ndarray, dy_MF: np.ndarray, group_sizes_E: np.ndarray) -> np.ndarray:
    """dw_EDF in float32: x_e^T dy_e for each group, zero for an empty one."""
    dw_EDF = np.zeros((len(group_sizes_E), x_MD.shape[1], dy_MF.shape[1]), np.float32)
    start = 0
    for e, size in enumerate(group_sizes_E):
        rows = slice(start, start + int(size))
        dw_EDF[e] = x_MD[rows].astype(np.float32).T @ dy_MF[rows].astype(np.float32)
        start += int(size)
    return dw_EDF
