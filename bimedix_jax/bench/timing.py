"""Medians of interleaved repetitions: what slows the machine for a while slows every contestant alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def medians(contestants: Mapping[str, Callable[[], Any]], repetitions: int = 9, warm_up: int = 2) -> dict[str, float]:
    """Seconds of each contestant, a function that returns JAX arrays (or anything, if it blocks itself).

    Each runs `warm_up` times, which compiles it; then they take turns.
    """
    for run in contestants.values():
        for _ in range(warm_up):
            jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repetitions):
        for name, run in contestants.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}
