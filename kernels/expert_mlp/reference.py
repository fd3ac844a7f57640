"""The experts' feed-forward as NumPy loops over tokens and their experts, in float32."""

from collections.abc import Sequence

import numpy as np


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def expert_mlp(
    x_ND: np.ndarray,
    weights_NK: np.ndarray,
    owners_NK: np.ndarray,
    w1_EDF: np.ndarray,
    w3_EDF: np.ndarray,
    w2_EFD: np.ndarray,
    deltas: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
) -> np.ndarray:
    """y_ND: for each token the sum over its pairs of weight * w2(silu(w1 x) * w3 x). Owners from E on mean no expert.

    `deltas` are the factors (a, b) of the low-rank deltas of w1, w3 and w2.
    """
    w1_EDF, w3_EDF, w2_EFD = (
        w if deltas is None else w + deltas[i][0] @ deltas[i][1] for i, w in enumerate((w1_EDF, w3_EDF, w2_EFD))
    )
    y_ND = np.zeros_like(x_ND)
    for n, owners in enumerate(owners_NK):
        for k, e in enumerate(owners):
            if e < len(w1_EDF):
                hidden = silu(x_ND[n] @ w1_EDF[e]) * (x_ND[n] @ w3_EDF[e])
                y_ND[n] += weights_NK[n, k] * (hidden @ w2_EFD[e])
    return y_ND
