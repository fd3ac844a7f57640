"""Random numbers as hashes of what they belong to: a seed, a layer, a record, a position, a token id.

A draw therefore depends neither on the batch nor on the mesh, and no state is carried from one to the next.
"""

import hashlib
from typing import Any

import numpy as np

GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def number_of(text: str) -> int:
    """64 bits of a text, such as a record's id."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def draws(purpose: str, *parts: Any) -> np.ndarray:
    """uint64 of the broadcast shape of `parts`, integer arrays: splitmix64 (Steele, Lea & Flood 2014), chained.

    Other purposes give other numbers for the same parts.
    """
    state = np.asarray([number_of(purpose)], np.uint64)
    for part in parts:
        state = _splitmix(state ^ _splitmix(np.atleast_1d(np.asarray(part)).astype(np.uint64)))
    return state


def _splitmix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(GOLDEN_GAMMA)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def chosen(scores: np.ndarray, top_k: int) -> np.ndarray:
    """int32 [..., K]: the k indices of the last axis with the lowest numbers."""
    return np.argsort(scores, axis=-1, kind="stable")[..., :top_k].astype(np.int32)
