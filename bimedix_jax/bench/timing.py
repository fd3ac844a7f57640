"""Medians of interleaved repetitions: what slows the machine for a while slows every contestant alike."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

BURST_SECONDS, LONGEST_BURST = 0.02, 100
"""An accelerator is given so much to do at once: a host takes longer to start a short kernel than it takes to run."""


def calls_at_once(run: Callable[[], Any]) -> int:
    if jax.default_backend() == "cpu":
        return 1
    began = time.perf_counter()
    jax.block_until_ready(run())
    return max(1, min(LONGEST_BURST, math.ceil(BURST_SECONDS / (time.perf_counter() - began))))


def medians(contestants: Mapping[str, Callable[[], Any]], repetitions: int = 9, warm_up: int = 2) -> dict[str, float]:
    """Seconds of each contestant, a function that returns JAX arrays (or anything, if it blocks itself).

    Each runs `warm_up` times, which compiles it; then they take turns, on accelerators in bursts.
    """
    calls: dict[str, int] = {}
    for name, run in contestants.items():
        for _ in range(warm_up):
            jax.block_until_ready(run())
        calls[name] = calls_at_once(run)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repetitions):
        for name, run in contestants.items():
            began = time.perf_counter()
            jax.block_until_ready([run() for _ in range(calls[name])])
            seconds[name].append((time.perf_counter() - began) / calls[name])
    return {name: statistics.median(values) for name, values in seconds.items()}
