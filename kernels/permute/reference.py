"""The permutation in NumPy loops."""

import numpy as np


def dispatch(x_ND: np.ndarray, experts_NK: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows sorted by expert, stable in token order; group sizes). Expert ids outside [0, num_experts) own no row."""
    pairs = [(e, n) for n, chosen in enumerate(experts_NK) for e in chosen]
    kept = sorted((pair for pair in pairs if 0 <= pair[0] < num_experts), key=lambda pair: pair[0])
    sizes = np.bincount([e for e, _ in kept], minlength=num_experts)
    return x_ND[[n for _, n in kept]], sizes


def combine(y_MD: np.ndarray, weights_NK: np.ndarray, experts_NK: np.ndarray, num_experts: int) -> np.ndarray:
    """float32 [N, D]: each token's weighted sum of its experts' rows."""
    pairs = [(e, n, k) for n, chosen in enumerate(experts_NK) for k, e in enumerate(chosen)]
    kept = sorted((pair for pair in pairs if 0 <= pair[0] < num_experts), key=lambda pair: pair[0])
    out_ND = np.zeros((experts_NK.shape[0], y_MD.shape[1]), np.float32)
    for row, (_, n, k) in enumerate(kept):
        out_ND[n] += weights_NK[n, k] * y_MD[row].astype(np.float32)
    return out_ND
