"""Cross entropy in NumPy."""

import numpy as np


def cross_entropy(x_ND: np.ndarray, w_DV: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
    """float32 [N]: -log softmax(x w)[target]."""
    logits_NV = x_ND.astype(np.float64) @ w_DV.astype(np.float64)
    logits_NV -= logits_NV.max(axis=1, keepdims=True)
    log_total_N = np.log(np.exp(logits_NV).sum(axis=1))
    return (log_total_N - logits_NV[np.arange(len(targets_N)), targets_N]).astype(np.float32)
