"""Which backend of an operation runs: the caller's choice, else `use`'s, else the platform's."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax

OPERATIONS = ("layer_scan", "expert_mlp", "grouped_matmul", "nf4_matmul", "grouped_low_rank")
"""Operations with more than one backend; each has its table in its api.py."""


class Record:
    """Names of the backends that were picked, by operation."""

    def __init__(self) -> None:
        self.names: dict[str, set[str]] = {}

    def add(self, operation: str, name: str) -> None:
        self.names.setdefault(operation, set()).add(name)

    def to_dict(self) -> dict[str, list[str]]:
        return {operation: sorted(self.names[operation]) for operation in sorted(self.names)}


# part of the key of JAX's caches, so that a function compiled under one choice is compiled anew under another
overrides = jax.make_user_context(())
# likewise, so that what was traced before is traced again, and its choices are seen
recorder = jax.make_user_context(None)
announced: set[tuple[str, str]] = set()


@contextlib.contextmanager
def use(platform: str | None = None, **names: str) -> Iterator[None]:
    """Chooses backends by operation, and the platform ("cpu", "gpu", "tpu") that the others are chosen for.

    A choice made here counts as named by the caller: where the backend cannot take the operands, that is an error. The
    platform is the one that is compiled for, which need not be there: Pallas kernels are interpreted only for "cpu".
    `with use(platform="gpu"): jax.jit(f).lower(...)` compiles for an absent GPU.

    Raises:
      ValueError: unknown operation.
    """
    for name in names:
        if name not in OPERATIONS:
            raise ValueError(f"No operation {name!r} has backends; choose among {', '.join(OPERATIONS)}.")
    changed = dict(overrides.value) | names | ({} if platform is None else {"platform": platform})
    with overrides(tuple(sorted(changed.items()))):
        yield


@contextlib.contextmanager
def recording() -> Iterator[Record]:
    """Records what is picked within, which is while functions are traced: lower or call them inside."""
    with recorder(record := Record()):
        yield record


def platform() -> str:
    """The platform that is compiled for: "cpu", "gpu" or "tpu"."""
    return dict(overrides.value).get("platform") or jax.default_backend()


def named(operation: str) -> str | None:
    """The backend that `use` names for an operation."""
    return dict(overrides.value).get(operation)


def announce(operation: str, message: str, level: int = logging.INFO) -> None:
    """Logs a message once in the life of the process."""
    if (operation, message) not in announced:
        announced.add((operation, message))
        logging.getLogger(__name__).log(level, "%s: %s", operation, message)


def pick(
    operation: str,
    names: Sequence[str],
    preferred: Mapping[str, Sequence[str]],
    name: str | None,
    refusal: Callable[[str], str | None],
) -> str:
    """Name of the backend that runs; it is announced, where it was not named, and recorded.

    Args:
      names: the operation's backends.
      preferred: names for each platform, best first; the last one takes everything.
      name: the caller's choice, if any. Neither it nor that of `use` ever falls back.
      refusal: why a backend cannot take the operands, in a sentence, or None where it can.

    Raises:
      ValueError: unknown name.
      NotImplementedError: the named backend cannot take the operands.
    """
    name = name or named(operation)
    if name is None:
        name = best(operation, preferred, refusal)
    elif name not in names:
        raise ValueError(f"Unknown {operation} backend {name!r}; choose one of {', '.join(sorted(names))}.")
    elif (reason := refusal(name)) is not None:
        raise NotImplementedError(f"{operation} backend {name!r}: {reason}")
    if recorder.value is not None:
        recorder.value.add(operation, name)
    return name


def best(operation: str, preferred: Mapping[str, Sequence[str]], refusal: Callable[[str], str | None]) -> str:
    """The first of the platform's backends that takes the operands."""
    *first, last = preferred.get(platform(), preferred["cpu"])
    for candidate in first:
        if (reason := refusal(candidate)) is None:
            announce(operation, f"backend {candidate} on {platform()}")
            return candidate
        announce(operation, f"backend {candidate} cannot be used, falling back: {reason}", logging.WARNING)
    announce(operation, f"backend {last} on {platform()}")
    return last
