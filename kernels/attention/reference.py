"""Attention in NumPy, one query at a time."""

import numpy as np


def attention(
    q_BTQH: np.ndarray,
    k_BSGH: np.ndarray,
    v_BSGH: np.ndarray,
    query_ids_BT: np.ndarray,
    key_ids_BS: np.ndarray,
    offset: int = 0,
    window: int | None = None,
    ancestor_ids_BTA: np.ndarray | None = None,
) -> np.ndarray:
    """float32 [B, T, Q, H]; query t is in slot offset + t and attends to itself and to earlier keys of its segment and
    of its ancestors."""
    batch, length, heads, width = q_BTQH.shape
    shared = heads // k_BSGH.shape[2]
    ancestor_ids_BTA = query_ids_BT[..., None] if ancestor_ids_BTA is None else ancestor_ids_BTA
    out = np.zeros(q_BTQH.shape, np.float32)
    for b in range(batch):
        for t in range(length):
            slot = offset + t
            first = 0 if window is None else max(0, slot - window + 1)
            own = {query_ids_BT[b, t], *ancestor_ids_BTA[b, t]}
            keys = [s for s in range(first, slot + 1) if key_ids_BS[b, s] in own]
            for h in range(heads):
                scores = k_BSGH[b, keys, h // shared].astype(np.float32) @ q_BTQH[b, t, h].astype(np.float32)
                weights = np.exp((scores - scores.max()) * width**-0.5)
                out[b, t, h] = weights @ v_BSGH[b, keys, h // shared].astype(np.float32) / weights.sum()
    return out
