"""The product in NumPy."""

import numpy as np


def matmul(x: np.ndarray, w_DF: np.ndarray) -> np.ndarray:
    """[..., F] in float32."""
    return x.astype(np.float32) @ w_DF.astype(np.float32)
