"""Random routers that read the same hidden states as the real ones: the null model for "beyond geometry".

A random router has the Gram matrix of the real router's weights in a random orientation of the hidden space, and a bias
that gives it the real router's loads. Where the hidden states of two languages differ, such routers send the languages
to different experts too (arXiv 2604.09780).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bimedix_jax import distributed
from bimedix_jax.models.mixtral import Mixtral

CALIBRATION_TOKENS = 2048
"""Tokens on which the biases are fitted."""
ROUNDS = 100


def router_weights(model: Mixtral) -> np.ndarray:
    """float32 [L, D, E]: weights of the routers, with their adapters."""
    router = model.layers.moe.router
    weights_LDE = distributed.on_host(router.w.get_value()).astype(np.float32)
    if router.lora is not None:
        a, b = (distributed.on_host(factor.get_value()).astype(np.float32) for factor in (router.lora.a, router.lora.b))
        slots = slice(None) if router.lora.slots is None else list(router.lora.slots)
        weights_LDE = weights_LDE.copy()
        weights_LDE[slots] += a @ b * np.float32(router.lora.scale)
    return weights_LDE


def oriented(weights_DE: np.ndarray, routers: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [D, R * E]: weights in random orientations, each with the Gram matrix of `weights_DE`.

    With the thin singular value decomposition U S V^T, each is Q S V^T for a random orthonormal frame Q.
    """
    _, singular_E, rotation_EE = np.linalg.svd(weights_DE.astype(np.float64), full_matrices=False)
    rank = len(singular_E)
    frames = []
    for _ in range(routers):
        q_DE, r_EE = np.linalg.qr(rng.normal(size=(len(weights_DE), rank)))
        q_DE *= np.sign(np.diag(r_EE))  # so that frames are uniform (Mezzadri 2007)
        frames.append(q_DE * singular_E @ rotation_EE)
    return np.concatenate(frames, axis=1).astype(np.float32)


@functools.partial(jax.jit, static_argnames="top_k")
def fitted_biases(states_ND: jax.Array, weights_DX: jax.Array, load_E: jax.Array, top_k: int) -> jax.Array:
    """float32 [R, E]: biases with which the routers' loads on these states are `load_E`, nearly.

    Each round moves a bias by the difference of the loads' logarithms, in ever smaller steps of the logits' deviation.
    """
    experts = load_E.shape[0]
    logits_NRE = (states_ND.astype(jnp.float32) @ weights_DX).reshape(states_ND.shape[0], -1, experts)
    deviation_R1 = jnp.std(logits_NRE, axis=(0, 2))[:, None]
    least = 0.5 / states_ND.shape[0]

    def loads(bias_RE: jax.Array) -> jax.Array:
        scores_NRE = logits_NRE + bias_RE[None]
        least_NR1 = jax.lax.top_k(scores_NRE, top_k)[0][..., -1:]
        return jnp.mean((scores_NRE >= least_NR1).astype(jnp.float32), axis=0)

    def adjust(number: jax.Array, bias_RE: jax.Array) -> jax.Array:
        gap_RE = jnp.log(jnp.maximum(load_E, least))[None] - jnp.log(jnp.maximum(loads(bias_RE), least))
        step = 0.5 / (1.0 + number / 10.0)
        bias_RE = bias_RE + step * deviation_R1 * gap_RE
        return bias_RE - jnp.mean(bias_RE, axis=-1, keepdims=True)

    return jax.lax.fori_loop(0, ROUNDS, adjust, jnp.zeros((logits_NRE.shape[1], experts), jnp.float32))


def random_routers(
    model: Mixtral, states_LND: Any, experts_LNK: np.ndarray, routers: int, seed: int = 0
) -> tuple[jax.Array, jax.Array]:
    """(weights [L, D, R * E], biases [L, R, E]) of the random routers of every layer.

    Args:
      states_LND, experts_LNK: what the real routers read and chose for the tokens of the calibration.
    """
    experts, top_k = model.config.router.num_experts, model.config.router.top_k
    weights, biases = [], []
    for layer, weights_DE in enumerate(router_weights(model)):
        weights_DX = oriented(weights_DE, routers, np.random.default_rng([seed, layer]))
        counts_E = np.bincount(experts_LNK[layer].ravel(), minlength=experts)
        load_E = counts_E.astype(np.float32) / len(experts_LNK[layer])
        weights.append(weights_DX)
        biases.append(np.asarray(fitted_biases(states_LND[layer], weights_DX, load_E, top_k)))
    return jnp.asarray(np.stack(weights)), jnp.asarray(np.stack(biases))
