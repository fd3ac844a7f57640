"""How many programs a process compiled, and how many it read from the cache on disk (startup.keep_programs)."""

import dataclasses
import functools
from typing import Any

import jax

HIT = "/jax/compilation_cache/cache_hits"
"""JAX's event for a program that the cache on disk has."""
BUILT = "/jax/core/compile/backend_compile_duration"
"""JAX's event for every program, compiled or read."""


@dataclasses.dataclass
class Programs:
    """Counts so far: of all programs, and of those that were read."""

    built: int = 0
    cached: int = 0


@functools.cache
def _counted() -> Programs:
    """Counts that JAX adds to; JAX's listeners last as long as the process."""
    programs = Programs()

    def happened(event: str, **_: Any) -> None:
        programs.cached += event == HIT

    def took(event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        programs.built += event == BUILT

    jax.monitoring.register_event_listener(happened)
    jax.monitoring.register_event_duration_secs_listener(took)
    return programs


def count() -> Programs:
    """The counts of this process from the first call on."""
    return dataclasses.replace(_counted())


def since(before: Programs) -> dict[str, int]:
    """Programs since `count` returned `before`: `compiled_programs` and `cached_programs`."""
    now = _counted()
    cached = now.cached - before.cached
    return {"compiled_programs": now.built - before.built - cached, "cached_programs": cached}
