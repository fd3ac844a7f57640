"""Models between two: some parameters and routes of a base model, the others of the model that was tuned from it.

Such a model is a choice of values by parameter path in the structure of the tuned model, so that all of them run in one
compiled program. The base model is an adapter of zeros there. Routes are chosen by replay.

Letters as in models/axes.py.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bimedix_jax.adapters import linears
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import Routing, RoutingPlan, route

ATTENTION, EXPERTS, ROUTES, ROUTER, SETS, WEIGHTS = "attention", "experts", "routes", "router", "sets", "weights"
Path = tuple[str, ...]


def factor_of(path: Path) -> str:
    """Which factor a parameter belongs to: the experts, the router, or the attention with norms and embeddings."""
    if path[:2] != ("layers", "moe"):
        return ATTENTION
    return EXPERTS if path[2] in ("w1", "w2", "w3") else ROUTER


@dataclasses.dataclass(frozen=True, eq=False)
class Parameter:
    """A variable of the tuned model, and its value in both.

    Attributes:
      layered: whether the leading axis is that of the layers.
      lead: for an adapter of some matrices only, the layer of each of them; None otherwise.
    """

    path: tuple
    variable: nnx.Variable
    base: Any
    tuned: Any
    layered: bool
    lead: np.ndarray | None

    def mixed(self, tuned_L: np.ndarray) -> Any:
        """The tuned value in these layers and the base value in the others."""
        if self.base is self.tuned or tuned_L.all():
            return self.tuned
        if not tuned_L.any():
            return self.base
        if not isinstance(self.tuned, jax.Array):
            name = ".".join(map(str, self.path))
            raise BimedixError(f"{name} is stored in 4 bits and differs between the models; load both in bfloat16")
        chosen = tuned_L if self.lead is None else tuned_L[self.lead]
        return jnp.where(chosen.reshape(-1, *[1] * (self.tuned.ndim - 1)), self.tuned, self.base)


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """A base model and a tuned model of the same architecture. `Pair.of` makes one."""

    base: Mixtral
    tuned: Mixtral
    graph: nnx.GraphDef
    parameters: tuple[Parameter, ...]

    @classmethod
    def of(cls, base: Mixtral, tuned: Mixtral) -> "Pair":
        """The two models. Raises BimedixError if their architectures differ."""
        routers = [(model.config.router.num_experts, model.config.router.top_k) for model in (base, tuned)]
        own_router = dataclasses.replace(tuned.config, router=base.config.router)
        if base.config != own_router or routers[0] != routers[1]:
            raise BimedixError("the two models differ in architecture; give a model and an adapter of it")
        graph, state = nnx.split(tuned)
        own = {strings(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(base))}
        slots = slots_of(tuned)
        found = []
        for path, variable in nnx.to_flat_state(state):
            name, value = strings(path), variable.get_value()
            found.append(
                Parameter(
                    path,
                    variable,
                    base_value(name, value, own),
                    value,
                    layered=name[0] == "layers",
                    lead=slots.get(name[:-1]),
                )
            )
        return cls(base, tuned, graph, tuple(found))

    @property
    def layers(self) -> int:
        return self.tuned.config.num_layers

    def state(self, tuned: Mapping[str, np.ndarray]) -> nnx.State:
        """The parameters, given for each factor the layers [L] in which they are the tuned model's.

        Embeddings belong to the first layer, the final norm and the output head to the last.
        """
        flat = []
        for one in self.parameters:
            name = strings(one.path)
            layers_L = tuned[factor_of(name)]
            if not one.layered:
                layers_L = layers_L[:1] if name[0] == "embed" else layers_L[-1:]
            flat.append((one.path, one.variable.replace(one.mixed(layers_L))))
        return nnx.from_flat_state(flat)

    @property
    def same_router(self) -> bool:
        """Whether both have the same router variant, so that the parameters of one run in the other."""
        return self.base.config.router == self.tuned.config.router


def strings(path: Sequence[Any]) -> Path:
    return tuple(map(str, path))


def base_value(name: Path, tuned: Any, own: Mapping[Path, Any]) -> Any:
    """The base model's value of a parameter of the tuned model: zeros for an adapter that the base lacks.

    Raises:
      BimedixError: the base has it in another shape or storage.
    """
    if name not in own:
        if name[-2:] == ("lora", "b"):
            return jnp.zeros_like(tuned)
        return tuned  # a factor that is multiplied by zeros, or what another router variant has learned
    value = own[name]
    if same(value, tuned):
        return tuned
    if jax.tree.structure(value) != jax.tree.structure(tuned) or value.shape != tuned.shape:
        raise BimedixError(f"the models store {'.'.join(name)} differently; load both with the same base")
    return value.astype(tuned.dtype) if isinstance(value, jax.Array) else value


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same arrays in memory, as those of a base and of an adapted model are."""
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(leaves) == len(others) and all(a is b for a, b in zip(leaves, others, strict=True))


def slots_of(model: Mixtral) -> dict[Path, np.ndarray]:
    """For each adapter of some matrices of a stack: the layer of each of them."""
    found = {}
    for path, layer in linears(model).items():
        if layer.lora is not None and layer.lora.slots is not None and path[0] == "layers":
            per_layer = math.prod(layer.w.get_value().shape[1:-2])
            found[(*path, "lora")] = np.asarray(layer.lora.slots) // per_layer
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Routes:
    """The routes of both models for a batch.

    Attributes:
      base, tuned: records with the logits if `crossed` is used.
    """

    base: Routing
    tuned: Routing
    pair: Pair

    def settled(self, like: Routing) -> "Routes":
        """The routes without the difference in rounding between the programs of the two models.

        Where the base model chooses the same experts in the program of the tuned model, with adapters of zeros, its
        weights are those of this program. Then parts that an adapter leaves alone bring exactly nothing.

        Args:
          like: the routes of the base model in that program.
        """
        same_LBT1 = (self.base.experts_LBTK == like.experts_LBTK).all(-1, keepdims=True)
        base = dataclasses.replace(
            self.base,
            weights_LBTK=jnp.where(same_LBT1, like.weights_LBTK, self.base.weights_LBTK),
            logits_LBTE=None
            if self.base.logits_LBTE is None
            else jnp.where(same_LBT1, like.logits_LBTE, self.base.logits_LBTE),
        )
        return dataclasses.replace(self, base=base)

    def plan(self, sets_L: np.ndarray, weights_L: np.ndarray) -> RoutingPlan:
        """A replay, given the layers in which sets and weights are the tuned model's.

        Where they come from different models, the one router weighs the experts that the other chose.
        """
        sets, weights = (x_L[:, None, None, None] for x_L in (sets_L, weights_L))
        experts_LBTK = jnp.where(sets, self.tuned.experts_LBTK, self.base.experts_LBTK)
        weights_LBTK = jnp.where(sets, self.tuned.weights_LBTK, self.base.weights_LBTK)
        if (sets_L & ~weights_L).any():
            own = weigh(self.base.logits_LBTE, self.tuned.experts_LBTK, self.pair.base)
            weights_LBTK = jnp.where(sets & ~weights, own, weights_LBTK)
        if (~sets_L & weights_L).any():
            own = weigh(self.tuned.logits_LBTE, self.base.experts_LBTK, self.pair.tuned)
            weights_LBTK = jnp.where(~sets & weights, own, weights_LBTK)
        return RoutingPlan(experts_LBTK=experts_LBTK, weights_LBTK=weights_LBTK)


def weigh(logits_LBTE: jax.Array, experts_LBTK: jax.Array, model: Mixtral) -> jax.Array:
    """[L, B, T, K]: the weights that a model's router gives to these experts; 0 at padding."""
    weigh_layer: Callable[..., jax.Array] = jax.vmap(
        lambda logits_BTE, experts_BTK: (
            route(
                logits_BTE,
                model.config.router,
                RoutingPlan(experts_LBTK=experts_BTK),
                experts_BTK[..., 0] >= 0,
                None,  # what a variant has learned without gradients chooses, and does not weigh
            ).weights_LBTK
        )
    )
    return weigh_layer(logits_LBTE, experts_LBTK)
