"""Medians of interleaved repetitions, so that a temporary slow-down of the machine affects all contestants alike."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

BURST_SECONDS, LONGEST_BURST = 0.02, 100
"""Accelerators are timed over bursts of calls, since launching a short kernel takes longer than running it."""


def burst_calls(run: Callable[[], Any]) -> int:
    """Calls in one burst."""
    if jax.default_backend() == "cpu":
        return 1
    began = time.perf_counter()
    jax.block_until_ready(run())
    return max(1, min(LONGEST_BURST, math.ceil(BURST_SECONDS / (time.perf_counter() - began))))


def medians(contestants: Mapping[str, Callable[[], Any]], repetitions: int = 9, warm_up: int = 2) -> dict[str, float]:
    """Median seconds of a call of each contestant.

    Each is called `warm_up` times, which compiles it. Then they take turns, on accelerators in bursts.

    Args:
      contestants: functions that return JAX arrays, or that block until their work is done.
    """
    calls: dict[str, int] = {}
    for name, run in contestants.items():
        for _ in range(warm_up):
            jax.block_until_ready(run())
        calls[name] = burst_calls(run)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repetitions):
        for name, run in contestants.items():
            began = time.perf_counter()
            jax.block_until_ready([run() for _ in range(calls[name])])
            seconds[name].append((time.perf_counter() - began) / calls[name])
    return {name: statistics.median(values) for name, values in seconds.items()}
