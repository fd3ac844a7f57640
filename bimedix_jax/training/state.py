"""A model split into trained parameters, frozen parameters and the structure that merges them."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from bimedix_jax.adapters import is_trainable
from bimedix_jax.models.config import RouterConfig
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.moe import RouterState
from bimedix_jax.models.routers import router_of
from bimedix_jax.sharding.by_rows import store_as_loaded, store_for_training
from bimedix_jax.sharding.layout import Layout

Params = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What an optimiser step changes and a checkpoint stores.

    Attributes:
      params: trained parameters by dotted path, float32.
      optimiser: state of the optimiser for these parameters.
      step: int32, optimiser steps done. It is also the position in the data, whose batches are indexed by step.
      router: what the router variant learns without a gradient, by dotted path; empty for most variants.
    """

    params: dict[str, Any]  # not Params: JAX also builds this with placeholders for leaves
    optimiser: optax.OptState
    step: Any
    router: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Structure:
    """A model without its values. A jitted function can close over it without capturing any array."""

    vocab_size: int
    router: RouterConfig
    layout: Layout | None
    graph: nnx.GraphDef
    variables: tuple[tuple[tuple, nnx.Variable], ...]

    def merge(self, params: Mapping[str, jax.Array], frozen: Mapping[str, Any]) -> Mixtral:
        """The model with these values, which may be tracers."""
        values = {**frozen, **params}
        flat = [(path, variable.replace(values[dotted(path)])) for path, variable in self.variables]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))

    def router_state(self, frozen: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The values that the router variant learns without a gradient."""
        names = [dotted(path) for path, variable in self.variables if isinstance(variable, RouterState)]
        return {name: frozen[name] for name in names}

    def update_router_state(self, state_LE: jax.Array, chosen_LE: jax.Array) -> jax.Array:
        """The router state after a step in which each expert was chosen `chosen_LE` times."""
        update = router_of(self.router).update
        assert update is not None  # only variants with an update have a state
        return update(state_LE, chosen_LE, self.router)


def dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def split_params(model: Mixtral) -> tuple[Structure, Params, dict[str, Any]]:
    """(structure, trained parameters, frozen parameters). Both are keyed by dotted path and share the model's arrays.

    Frozen values are jax arrays and packed weights. The structure references no array.
    """
    graph, trained, rest = nnx.split(model, is_trainable(model), ...)
    parts = [list(nnx.to_flat_state(part)) for part in (trained, rest)]
    params, frozen = ({dotted(path): variable.get_value() for path, variable in part} for part in parts)
    hollow = tuple((path, variable.replace(None)) for part in parts for path, variable in part)
    placement: Any = model.placement  # set by sharding.placement.place
    return Structure(model.config.vocab_size, model.config.router, placement, graph, hollow), params, frozen


@contextlib.contextmanager
def split_for_training(model: Mixtral) -> Iterator[tuple[Structure, Params, dict[str, Any]]]:
    """`split_params` of a model that is stored, inside, as this platform trains fastest; afterwards as it was loaded.

    The frozen parameters must not be used afterwards. A model on a mesh is not converted back after an error, because
    other processes may not have one.
    """
    store_for_training(model)
    structure, params, frozen = split_params(model)
    failed = True
    try:
        yield structure, params, frozen
        failed = False
    finally:
        frozen.clear()  # so that the memory of each form is freed when it is converted
        if not failed or model.placement is None:
            store_as_loaded(model)


def init_state(
    params: Params, optimiser: optax.GradientTransformation, router: Mapping[str, jax.Array] | None = None
) -> TrainState:
    """Step 0, on copies of `params` and `router` (from `Structure.router_state`).

    The step donates its state, so the state must not share the model's arrays.
    """
    own, state = ({name: jnp.array(x, copy=True) for name, x in values.items()} for values in (params, router or {}))
    return TrainState(own, optimiser.init(own), jnp.zeros((), jnp.int32), state)


def update_params(model: Mixtral, values: Mapping[str, jax.Array]) -> None:
    """Sets values of `model` by dotted path, in place."""
    flat = [(path, variable) for path, variable in nnx.to_flat_state(nnx.state(model)) if dotted(path) in values]
    nnx.update(model, nnx.from_flat_state([(path, v.replace(values[dotted(path)])) for path, v in flat]))
