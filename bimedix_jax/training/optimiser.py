"""AdamW with linear warm-up, cosine decay and clipping by the global norm."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import OptimiserConfig


def schedule(config: OptimiserConfig, steps: int) -> optax.Schedule:
    """Learning rate of the update that follows `count` updates (from 0), in a run of `steps`."""
    if config.warmup_steps >= steps:
        raise BimedixError(
            f"{config.warmup_steps} warm-up steps are as many as the run has ({steps}), or more; "
            "lower optimiser.warmup_steps or raise steps."
        )

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.asarray(count, jnp.float32)
        warm = (done + 1) / max(config.warmup_steps, 1)
        # the last warm-up step has the peak rate; the cosine would end one step after the run
        through = jnp.clip((done + 1 - config.warmup_steps) / (steps + 1 - config.warmup_steps), 0, 1)
        cosine = config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * through))
        return config.learning_rate * jnp.where(done < config.warmup_steps, warm, cosine)

    return rate


def make_optimiser(config: OptimiserConfig, steps: int) -> optax.GradientTransformation:
    """AdamW on a flat {name: array}, without clipping. Its state is two arrays for each parameter, and a count."""
    optimiser = make_adamw(config, steps)
    return optimiser if config.state_dtype == "float32" else stored_in_bfloat16(optimiser)


def make_adamw(config: OptimiserConfig, steps: int) -> optax.GradientTransformation:
    def decayed(params: Mapping[str, jax.Array]) -> dict[str, bool]:
        # norms are stacked over layers, so they are recognised by name, not by their number of axes
        return {name: not name.endswith(".scale") for name in params}

    adamw = optax.adamw(
        schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    if config.router_learning_rate is None:
        return adamw
    # an update of AdamW, including the decay, is proportional to the rate
    ratio = config.router_learning_rate / config.learning_rate

    def scale_router(updates: Any, _: object = None) -> dict[str, jax.Array]:
        return {name: update * ratio if ".router." in name else update for name, update in updates.items()}

    return optax.chain(adamw, optax.stateless(scale_router))


def stored_in_bfloat16(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimiser with its moments stored in bfloat16. It computes in float32."""

    def is_moment(leaf: Any) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim > 0

    def init(params: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if is_moment(x) else x, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        exact = jax.tree.map(lambda x: x.astype(jnp.float32) if is_moment(x) else x, state)
        updates, exact = inner.update(updates, exact, params)
        count = next(leaf for leaf in jax.tree.leaves(exact) if jnp.issubdtype(leaf.dtype, jnp.integer))
        return updates, jax.tree.map(lambda x: round_stochastically(x, count) if is_moment(x) else x, exact)

    return optax.GradientTransformation(init, update)


def round_stochastically(x: jax.Array, count: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16, up or down, with the probabilities that make the mean exact.

    A decay of 0.1 % a step is less than half of bfloat16's spacing, so with rounding to nearest a moment would never
    decay. The direction is a hash of the value and the number of the update, so that a repeated run gives the same.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    mixed = (bits ^ (count.astype(jnp.uint32) * jnp.uint32(0x9E3779B9))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    up = jax.lax.bitcast_convert_type((bits + (mixed >> 16)) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), up, x).astype(jnp.bfloat16)


def clip(
    gradients: dict[str, jax.Array], largest: float | None, norm: jax.Array | None = None
) -> tuple[dict[str, jax.Array], jax.Array]:
    """(gradients scaled to a norm of at most `largest`, their norm before that, which may be given)."""
    norm = optax.tree.norm(gradients) if norm is None else norm
    if largest is None:
        return gradients, norm
    factor = jnp.minimum(1.0, largest / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    return {name: gradient * factor for name, gradient in gradients.items()}, norm
