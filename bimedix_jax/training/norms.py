"""Norms of gradients by part of the model and by expert, and how far training has moved each expert."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from bimedix_jax.adapters import linears
from bimedix_jax.models.linear import ExpertLinear
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.sharding.layout import Layout
from bimedix_jax.training.state import Params, Structure

PARTS = {"attention": ".attention.", "router": ".moe.router.", "experts": ".moe.w"}
"""The parts of a model, and what the names of their parameters contain. All others are `other`."""


def part_of(name: str) -> str:
    return next((part for part, mark in PARTS.items() if mark in name), "other")


def experts_of(model: Mixtral) -> dict[str, ExpertLinear]:
    """The layers of the experts, by the beginning of the names of their parameters."""
    return {".".join(path): x for path, x in linears(model).items() if isinstance(x, ExpertLinear)}


def gradient_norms(gradients: Params, model: Mixtral, layout: Layout | None) -> dict[str, Any]:
    """`grad_norm` of all gradients, `grad_norms` by part, and `expert_grad_norm` [L, E] where experts train.

    Every gradient is read once: the sums by expert add up to the others.
    """
    squares, experts_LE = {}, jnp.zeros(())
    owners = {name: layer for prefix, layer in experts_of(model).items() for name in gradients if inside(name, prefix)}
    for name, gradient in sorted(gradients.items()):
        if name in owners:
            own = by_matrix(gradient)
            squares[name] = jnp.sum(own)
            experts_LE = experts_LE + whole_stack(own, owners[name])
        else:
            squares[name] = jnp.sum(gradient * gradient)
    parts = sorted({part_of(name) for name in squares})
    found = {
        "grad_norm": jnp.sqrt(sum(squares.values())),
        "grad_norms": {
            part: jnp.sqrt(sum(square for name, square in squares.items() if part_of(name) == part)) for part in parts
        },
    }
    return found | ({"expert_grad_norm": replicated(jnp.sqrt(experts_LE), layout)} if owners else {})


def inside(name: str, prefix: str) -> bool:
    return name.startswith(f"{prefix}.")


def by_matrix(x: jax.Array) -> jax.Array:
    """Sum of the squares of each matrix: the last two axes are gone."""
    return jnp.sum(x * x, axis=(-2, -1))


def whole_stack(x: jax.Array, layer: ExpertLinear) -> Float[Array, "L E"]:
    """[L, E] of a value by matrix; 0 where a matrix has no adapter."""
    lead = layer.w.get_value().shape[:-2]
    slots = None if layer.lora is None else layer.lora.slots
    if slots is None or x.shape == lead:
        return x
    return jnp.zeros(int(np.prod(lead)), x.dtype).at[jnp.asarray(slots)].set(x, unique_indices=True).reshape(lead)


def replicated(x: jax.Array, layout: Layout | None) -> jax.Array:
    """On every device, since each process reads the whole value."""
    return x if layout is None else jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, P()))


def make_weight_change(structure: Structure) -> Callable[[Params, Params, dict[str, Any]], jax.Array | None]:
    """Returns change(params, first, frozen) -> [L, E]: the Frobenius norm of what training added to each expert.

    `first` has the parameters before the first step. w1, w2 and w3 count together. What an adapter adds is
    scale * (a b - a0 b0); without adapters it is w - w0. None where no expert trains.
    """

    def change(params: Params, first: Params, frozen: dict[str, Any]) -> jax.Array | None:
        total, found = jnp.zeros(()), False
        for prefix, layer in experts_of(structure.merge(params, frozen)).items():
            a, b, w = (f"{prefix}.{name}" for name in ("lora.a", "lora.b", "w"))
            if a in params and layer.lora is not None:
                own = by_matrix_of_product(params[a], params[b], first[a], first[b]) * layer.lora.scale**2
                total, found = total + whole_stack(own, layer), True
            if w in params:
                total, found = total + by_matrix(params[w].astype(jnp.float32) - first[w].astype(jnp.float32)), True
        return replicated(jnp.sqrt(total), structure.layout) if found else None

    return jax.jit(change)


def by_matrix_of_product(a: jax.Array, b: jax.Array, a0: jax.Array, b0: jax.Array) -> jax.Array:
    """Sum of the squares of a b - a0 b0 for each matrix, from products of rank by rank.

    a b - a0 b0 = (a - a0) b + a0 (b - b0) = [a - a0, a0] [b; b - b0], and the squared norm of x y is the sum of the
    elements of (x^T x) * (y y^T). Near the start the differences are small, and no large terms cancel.
    """
    x, y = jnp.concatenate([a - a0, a0], axis=-1), jnp.concatenate([b, b - b0], axis=-2)
    precise = jax.lax.Precision.HIGHEST
    left = jnp.einsum("...dr,...ds->...rs", x, x, precision=precise)
    right = jnp.einsum("...rf,...sf->...rs", y, y, precision=precise)
    return jnp.maximum(jnp.sum(left * right, axis=(-2, -1)), 0.0)
