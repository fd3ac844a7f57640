"""Choosing the backend of an operation: the caller's choice, else that of `use`, else the platform's default."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractDevice, get_abstract_mesh, use_abstract_mesh

OPERATIONS = ("layer_scan", "attention", "expert_mlp", "grouped_matmul", "nf4_matmul", "grouped_low_rank")
"""Operations with more than one backend; the table of backends is in the api.py of each."""


class Choices:
    """Names of the backends that were chosen, by operation."""

    def __init__(self) -> None:
        self.names: dict[str, set[str]] = {}

    def add(self, operation: str, name: str) -> None:
        self.names.setdefault(operation, set()).add(name)

    def to_dict(self) -> dict[str, list[str]]:
        return {operation: sorted(self.names[operation]) for operation in sorted(self.names)}


KERNELS = ("triton", "mosaic_tpu", "splash")
"""Backends that are written for one kind of accelerator."""

# part of the key of JAX's caches: a function compiled under one choice is compiled again under another
overrides = jax.make_user_context(())
# also part of the key: functions are traced again inside `recording`, so that their choices are recorded
recorder = jax.make_user_context(None)
announced: set[tuple[str, str]] = set()


@contextlib.contextmanager
def use(platform: str | None = None, device: Any = None, **names: str) -> Iterator[None]:
    """Sets the backends of operations, and the platform ("cpu", "gpu", "tpu") that decides all others.

    A backend set here counts as named by the caller: if it cannot take the operands, that is an error. The platform may
    be one that this machine does not have: `with use(device=absent): jax.jit(f).lower(...)` compiles for an absent
    device, and sets its platform. Pallas kernels are interpreted for "cpu" only.

    Raises:
      ValueError: unknown operation.
    """
    for name in names:
        if name not in OPERATIONS:
            raise ValueError(f"No operation {name!r} has backends; choose among {', '.join(OPERATIONS)}.")
    platform = device.platform if device is not None else platform
    changed = dict(overrides.value) | names | ({} if platform is None else {"platform": platform})
    with overrides(tuple(sorted(changed.items()))), lowering_for(device):
        yield


def lowering_for(device: Any) -> contextlib.AbstractContextManager[Any]:
    """Tells JAX which absent device to lower for.

    Without it, Pallas' Triton backend raises (JAX 0.12) or lowers as for an H100 (JAX 0.10).
    """
    if device is None:
        return contextlib.nullcontext()
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=None, platform=device.platform)
    return use_abstract_mesh(get_abstract_mesh().update(abstract_device=abstract))


@contextlib.contextmanager
def recording() -> Iterator[Choices]:
    """Records the backends that are chosen inside, which happens while functions are traced."""
    with recorder(record := Choices()):
        yield record


def platform() -> str:
    """The platform to compile for: "cpu", "gpu" or "tpu"."""
    return dict(overrides.value).get("platform") or jax.default_backend()


def named(operation: str) -> str | None:
    """The backend that `use` sets for an operation."""
    return dict(overrides.value).get(operation)


def announce(operation: str, message: str, level: int = logging.INFO) -> None:
    """Logs a message once in each process."""
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
    """The name of the backend to run. It is recorded, and logged if nobody named it.

    Args:
      names: the operation's backends.
      preferred: backends of each platform, best first; the last one takes all operands.
      name: the caller's choice, if any. A named backend never falls back, nor does one set by `use`.
      refusal: the reason why a backend cannot take the operands, as a sentence; None if it can.

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
    elif name in KERNELS and platform() == "cpu":
        announce(operation, f"backend {name} is interpreted on a CPU: correct, but very slow", logging.WARNING)
    if recorder.value is not None:
        recorder.value.add(operation, name)
    return name


def best(operation: str, preferred: Mapping[str, Sequence[str]], refusal: Callable[[str], str | None]) -> str:
    """The first of the platform's backends that can take the operands."""
    *first, last = preferred.get(platform(), preferred["cpu"])
    for candidate in first:
        if (reason := refusal(candidate)) is None:
            announce(operation, f"backend {candidate} on {platform()}")
            return candidate
        announce(operation, f"backend {candidate} cannot be used, falling back: {reason}", logging.WARNING)
    announce(operation, f"backend {last} on {platform()}")
    return last
