"""AdamW with linear warm-up, a cosine and clipping by the norm of the whole gradient."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import OptimiserConfig


def schedule(config: OptimiserConfig, steps: int) -> optax.Schedule:
    """Learning rate of the update after `count` updates (from 0), for a run of `steps`."""
    if config.warmup_steps >= steps:
        raise BimedixError(
            f"{config.warmup_steps} warm-up steps leave nothing of a run of {steps}; "
            "lower optimiser.warmup_steps or raise steps."
        )

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.asarray(count, jnp.float32)
        warm = (done + 1) / max(config.warmup_steps, 1)
        # the last warm-up step is the peak, the first step after the run would be the end of the cosine
        through = jnp.clip((done + 1 - config.warmup_steps) / (steps + 1 - config.warmup_steps), 0, 1)
        cosine = config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * through))
        return config.learning_rate * jnp.where(done < config.warmup_steps, warm, cosine)

    return rate


def make_optimiser(config: OptimiserConfig, steps: int) -> optax.GradientTransformation:
    """AdamW on a flat {name: array}; the caller clips. Its state is two arrays a parameter and a count."""

    def decayed(params: Mapping[str, jax.Array]) -> dict[str, bool]:
        # norms are stacked over layers, so their number of axes does not tell them from matrices; names do
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
    # an update of AdamW, decay included, is proportional to the rate
    ratio = config.router_learning_rate / config.learning_rate

    def scale_router(updates: Any, _: object = None) -> dict[str, jax.Array]:
        return {name: update * ratio if ".router." in name else update for name, update in updates.items()}

    return optax.chain(adamw, optax.stateless(scale_router))


def clip(gradients: dict[str, jax.Array], largest: float | None) -> tuple[dict[str, jax.Array], jax.Array]:
    """(gradients with a norm of at most `largest`, their norm before)."""
    norm = optax.tree.norm(gradients)
    if largest is None:
        return gradients, norm
    factor = jnp.minimum(1.0, largest / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    return {name: gradient * factor for name, gradient in gradients.items()}, norm
