"""Values for a model that was built without storage: random weights, a router's state, another router variant."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from bimedix_jax.models.config import MixtralConfig, RouterConfig
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import router_of


def init_random(config: MixtralConfig, seed: int = 0, dtype: jnp.dtype | str = "float32", std: float = 0.02) -> Mixtral:
    """A Mixtral with normal weights of this std and unit norms; each parameter's draw depends on its name alone."""
    model = Mixtral(config, dtype)
    key = jax.random.key(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(map(str, path))
        shape = variable.get_value().shape
        if path[-1] == "scale":
            value = jnp.ones(shape, dtype)
        else:
            draw = jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), shape, jnp.float32)
            value = (std * draw).astype(dtype)
        variable.set_value(value)
    reset_router_state(model)
    return model


def reset_router_state(model: Mixtral) -> None:
    """Sets to zero, in place, what a router variant learns without gradients."""
    if (state := model.layers.moe.state) is not None:
        state.set_value(jnp.zeros(state.get_value().shape, jnp.float32))


def with_router(model: Mixtral, router: RouterConfig) -> Mixtral:
    """The model with another router variant or other parameters of its variant; weights are shared with `model`.

    Raises:
      ValueError: an unknown variant, another number of experts, or a model that is already sharded.
    """
    router_of(router)
    if model.placement is not None:
        raise ValueError("The model is already sharded; choose its router before sharding it.")
    if router.num_experts != model.config.router.num_experts:
        raise ValueError(f"This model has {model.config.router.num_experts} experts, not {router.num_experts}.")
    other = nnx.merge(*nnx.split(model), copy=True)
    other.config = dataclasses.replace(model.config, router=router)
    other.layers.attention.config = other.config
    if router != model.config.router:
        other.layers.moe.set_router(other.config)
        reset_router_state(other)
    return other
