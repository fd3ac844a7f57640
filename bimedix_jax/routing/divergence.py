"""How much the experts of a layer differ, adapters included. Experts that are copies of each other cannot
specialise."""

import itertools

import jax.numpy as jnp
import numpy as np

from bimedix_jax.adapters import factor_indices
from bimedix_jax.kernels.nf4 import NF4Tensor, dequantize
from bimedix_jax.models.linear import ExpertLinear
from bimedix_jax.models.mixtral import Mixtral

HARDLY = 0.05
"""Below this distance, expert load shows little about specialisation."""


def expert_distance(model: Mixtral) -> float:
    """Mean over layers and pairs of experts of |Wi - Wj| / |W|, where W is the weights that the model computes with.

    Frobenius norms over w1, w2 and w3; |W| is the root mean square over the experts. Exactly 0 if all experts are
    equal, and for a single expert.
    """
    experts = model.config.router.num_experts
    pairs = list(itertools.combinations(range(experts), 2))
    if not pairs:
        return 0.0
    found = []
    for layer in range(model.config.num_layers):
        squares, norm = np.zeros(len(pairs)), 0.0
        for name in ("w1", "w2", "w3"):
            linear = getattr(model.layers.moe, name)
            weights = [effective_weight(linear, (layer, expert)) for expert in range(experts)]
            norm += sum(float(np.vdot(weight, weight)) for weight in weights) / experts
            for place, (first, second) in enumerate(pairs):
                apart = weights[first] - weights[second]
                squares[place] += float(np.vdot(apart, apart))
        found.append(np.sqrt(squares / norm).mean() if norm else 0.0)
    return float(np.mean(found))


def effective_weight(linear: ExpertLinear, index: tuple[int, int]) -> np.ndarray:
    """float32 [in, out]: the weight of one expert of one layer, dequantised, plus its adapter's delta."""
    held = linear.w.get_value()[index]
    weight = np.asarray(dequantize(held, jnp.float32) if isinstance(held, NF4Tensor) else held, np.float32)
    place = factor_indices(linear).get(index)
    if linear.lora is None or place is None:
        return weight
    a, b = (np.asarray(factor.get_value()[place], np.float32) for factor in (linear.lora.a, linear.lora.b))
    return weight + linear.lora.scale * (a @ b)


def verdict(distance: float) -> str:
    """What the distance between the experts says about their load."""
    if distance == 0:
        return "experts are identical (distance 0), so their load depends on the router alone"
    if distance < HARDLY:
        return f"experts have hardly diverged (mean relative distance {distance:.2g}), so load shows no specialisation"
    return f"experts differ (mean relative distance {distance:.2g})"
