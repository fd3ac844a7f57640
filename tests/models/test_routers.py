"""Properties that every router variant has, and the load-balancing loss's scopes."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bimedix_jax.models.config import RouterConfig
from bimedix_jax.models.routers import (
    ROUTERS,
    Load,
    Routing,
    RoutingPlan,
    load_balancing_loss,
    load_of,
    route,
    router_z_loss,
)


def logits(experts: int = 4, layers: int | None = None) -> jax.Array:
    lead = (3, 6) if layers is None else (layers, 3, 6)
    return jnp.asarray(np.random.default_rng(0).standard_normal((*lead, experts)), jnp.float32)


@pytest.mark.parametrize("variant", ROUTERS)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_invariants(variant: str, top_k: int) -> None:
    routing = route(logits(), RouterConfig(4, top_k, variant), RoutingPlan())
    experts = np.asarray(routing.experts_LBTK)
    assert experts.shape == (3, 6, top_k)
    assert routing.weights_LBTK.dtype == jnp.float32
    assert ((experts >= 0) & (experts < 4)).all()
    assert all(len(set(chosen)) == top_k for chosen in experts.reshape(-1, top_k))
    assert np.allclose(routing.weights_LBTK.sum(-1), 1, atol=1e-6)
    assert (routing.weights_LBTK >= 0).all()
    assert np.array_equal(routing.logits_LBTE, logits())


def test_weights_equal_the_renormalised_softmax_over_all() -> None:
    routing = route(logits(8), RouterConfig(8, 2), RoutingPlan())
    probabilities = jax.nn.softmax(logits(8), axis=-1)
    chosen = jnp.take_along_axis(probabilities, routing.experts_LBTK, axis=-1)
    assert np.allclose(routing.weights_LBTK, chosen / chosen.sum(-1, keepdims=True), atol=1e-6)


def test_unknown_variant() -> None:
    with pytest.raises(ValueError, match="Unknown router variant 'best'"):
        route(logits(), RouterConfig(4, 2, "best"), RoutingPlan())


def routed(layers: int = 2, top_k: int = 2) -> Routing:
    x = logits(layers=layers)
    experts = jax.lax.top_k(x, top_k)[1].astype(jnp.int32)
    return Routing(experts, jnp.full(experts.shape, 1 / top_k, jnp.float32), x)


def test_balanced_routing_costs_top_k() -> None:
    x = jnp.zeros((1, 1, 4, 4))
    experts = jnp.array([[[[0, 1], [2, 3], [1, 0], [3, 2]]]], jnp.int32)
    valid = jnp.ones((1, 4), bool)
    for scope in ("micro_batch", "sequence"):
        assert np.isclose(load_balancing_loss(Routing(experts, experts * 0.5, x), valid, scope), 2.0)


def test_padding_counts_nowhere() -> None:
    routing = routed()
    valid = jnp.ones((3, 6), bool).at[1, 2:].set(False).at[2].set(False)
    for scope in ("micro_batch", "sequence"):
        flat = [x.at[:, 1, 2:].set(x[:, :1, :1][:, 0]).at[:, 2].set(0) for x in jax.tree.leaves(routing)]
        changed = jax.tree.unflatten(jax.tree.structure(routing), flat)
        assert np.isclose(load_balancing_loss(changed, valid, scope), load_balancing_loss(routing, valid, scope))
    assert np.isclose(router_z_loss(changed.logits_LBTE, valid), router_z_loss(routing.logits_LBTE, valid))


def test_global_scope_adds_up_over_micro_batches_and_its_gradient_is_exact() -> None:
    routing, valid = routed(), jnp.ones((3, 6), bool).at[0, 4:].set(False)

    def part(x: jax.Array, rows: slice) -> Routing:
        return Routing(routing.experts_LBTK[:, rows], routing.weights_LBTK[:, rows], x[:, rows])

    def whole(x: jax.Array) -> jax.Array:
        return load_balancing_loss(part(x, slice(None)), valid, "micro_batch")

    def summed(x: jax.Array) -> jax.Array:
        slices = [slice(i, i + 1) for i in range(3)]
        loads = [load_of(part(routing.logits_LBTE, rows), valid[rows]) for rows in slices]
        total = jax.tree.map(lambda *parts: sum(parts), *loads)
        assert isinstance(total, Load)
        losses = [load_balancing_loss(part(x, rows), valid[rows], "global", total) for rows in slices]
        return functools.reduce(operator.add, losses)

    got, expected = (jax.value_and_grad(f)(routing.logits_LBTE) for f in (summed, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, expected)


def test_global_scope_needs_the_total() -> None:
    with pytest.raises(ValueError, match="whole optimiser step"):
        load_balancing_loss(routed(), jnp.ones((3, 6), bool), "global")
