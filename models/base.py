"""The parts of a model that are not mathematics: the folder it came from, its placement on devices, the compiled
call."""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import jax
from flax import nnx

from bimedix_jax.models import shards
from bimedix_jax.models.call import Call, Output
from bimedix_jax.models.config import Storage


class Placement(Protocol):
    """How a model's parameters are sharded (bimedix_jax/sharding/layout.py); hashable, and equal for equal layouts."""

    def forward(self, graph: Any, state: Any, call: Call) -> Output:
        """The forward pass of the model (graph, state) on every shard."""
        ...


class Origin:
    """Where a model came from. All origins are equal, so that models of one shape share their compiled programs."""

    def __init__(self, folder: str | None, trained_over: Storage | None = None):
        self.folder = folder
        self.trained_over = trained_over

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return 0


class Model(nnx.Module):
    """A model that can be called with its parameters on one device or sharded.

    Attributes:
      placement: how the parameters are sharded; None on one device. `sharding.place` sets it.
    """

    def __init__(self) -> None:
        self.placement: Placement | None = None
        self._origin = Origin(None)

    @property
    def origin(self) -> str | None:
        """Folder that the parameters came from; exports copy the tokenizer from there."""
        return self._origin.folder

    @origin.setter
    def origin(self, folder: str | None) -> None:
        self._origin = Origin(folder, self._origin.trained_over)

    @property
    def trained_over(self) -> Storage | None:
        """Storage that the loaded adapters were trained over; None if it is unknown, or that of this model."""
        return self._origin.trained_over

    @trained_over.setter
    def trained_over(self, storage: Storage | None) -> None:
        self._origin = Origin(self._origin.folder, storage)

    def forward(self, call: Call) -> Output:
        """The mathematics, without the output head. Operands are checked and present.

        On a shard, `Output.sums` covers the tokens of this shard only.
        """
        raise NotImplementedError

    def compiled(self, call: Call) -> Output:
        """`forward`, compiled once for each shape and structure; on all shards if the model is sharded."""
        return (inspect.unwrap(forward) if _INLINED.get() else forward)(*nnx.split(self), call)


@functools.partial(jax.jit, static_argnames="graph")
def forward(graph: Any, state: Any, call: Call) -> Output:
    """`Model.forward` of the model (graph, state)."""
    model: Model = nnx.merge(graph, state)
    if model.placement is None or shards.active():
        return model.forward(call)
    return model.placement.forward(graph, state, call)


_INLINED: ContextVar[bool] = ContextVar("inlined", default=False)


@contextmanager
def inlined() -> Iterator[None]:
    """In this context, a model is a part of the function that is being traced, and not a compiled function of its own.

    JAX traces a compiled function before it differentiates it, and then traces its layers once more for their custom
    gradient. A training step does without the first, and is traced and lowered in 0.85 of the time.
    """
    token = _INLINED.set(True)
    try:
        yield
    finally:
        _INLINED.reset(token)
