"""How much the experts of a layer differ, adapters included, and what the divergence gate says of their load."""

import itertools

import jax.numpy as jnp
import numpy as np

from bimedix_jax.adapters import factor_indices
from bimedix_jax.kernels.nf4 import NF4Tensor, dequantize
from bimedix_jax.models.linear import ExpertLinear
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.routing.claims import Gate
from bimedix_jax.routing.clusters import MIN_CLUSTERS


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


def verdict(gate: Gate, distance: float) -> str:
    """What may be said of expert load: the divergence gate decides. `distance` is that of `expert_distance`."""
    if distance == 0:
        return (
            "divergence gate fails: experts are identical (distance 0), so shuffled routes cost exactly 0 nats, and "
            "the load depends on the router alone"
        )
    apart = f"experts are {distance:.2g} apart (relative distance)"
    cost = f"shuffled routes cost {gate.delta_nll:.2g} nats per token"
    if gate.low is None or gate.high is None:
        return (
            f"divergence gate not tested: {apart}, {cost}, but there is no interval below {MIN_CLUSTERS} records, so "
            "the load says nothing about what experts do"
        )
    cost += f" [{gate.low:.2g}, {gate.high:.2g}]"
    if not gate.diverged:
        return (
            f"divergence gate fails: {apart}, but {cost}, not above the noise of {gate.floor:.2g}, so the load says "
            "nothing about what experts do"
        )
    return (
        f"divergence gate holds: {apart}, and {cost}, so it matters which experts a token gets; the load does not say "
        "why languages differ"
    )
