"""Sums of what routers did, against NumPy over the whole record, and the scopes of the load-balancing loss."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bimedix_jax.models.config import RouterConfig
from bimedix_jax.models.router_sums import (
    Load,
    RouterSums,
    load_balancing_loss,
    load_of,
    router_z_loss,
    sums_of,
)
from bimedix_jax.models.routers import RoutingPlan, decide

L, B, T, E = 2, 3, 6, 4


def logits() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((L, B, T, E)), jnp.float32)


def summed(x: jax.Array, group_BT: jax.Array, groups: int, valid_BT: jax.Array) -> RouterSums:
    """Sums of each layer, stacked like in the loop over layers."""
    layers = [
        sums_of(
            decide(layer, RouterConfig(num_experts=E, top_k=2), RoutingPlan(), valid_BT),
            jnp.where(valid_BT, group_BT, -1),
            groups,
        )
        for layer in x
    ]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)


def everywhere(value: int = 0) -> jax.Array:
    return jnp.full((B, T), value)


def test_sums_equal_those_of_the_record() -> None:
    group = jnp.asarray(np.random.default_rng(1).integers(0, 3, (B, T)))
    valid = jnp.ones((B, T), bool).at[0, 4:].set(False)
    sums = summed(logits(), group, 3, valid)
    x = np.asarray(logits(), np.float64)
    probability = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    ordered = -np.sort(-x, axis=-1)
    chosen = x >= ordered[..., 1:2]
    weight = 1 / (1 + np.exp(ordered[..., 1] - ordered[..., 0]))
    for g in range(3):
        inside = np.asarray((group == g) & valid)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
        close(sums.chosen_LXE[:, g], chosen[:, inside].sum(1))
        close(sums.mass_LXE[:, g], probability[:, inside].sum(1))
        close(sums.entropy_LX[:, g], -(probability * np.log(probability))[:, inside].sum((1, 2)))
        close(sums.margin_LX[:, g], (ordered[..., 1] - ordered[..., 2])[:, inside].sum(1))
        close(sums.top_margin_LX[:, g], (ordered[..., 0] - ordered[..., 1])[:, inside].sum(1))
        close(sums.top_weight_LX[:, g], weight[:, inside].sum(1))
        close(sums.z_LX[:, g], (np.log(np.exp(x).sum(-1)) ** 2)[:, inside].sum(1))
        close(sums.tokens_LX[:, g], inside.sum())


def test_loss_of_balanced_routing_is_top_k() -> None:
    x = 9.0 * jnp.eye(4)[jnp.array([[0, 1, 2, 3]])] + 8.0 * jnp.eye(4)[jnp.array([[1, 2, 3, 0]])]
    sums = sums_of(decide(x, RouterConfig(num_experts=4, top_k=2), RoutingPlan()), jnp.zeros((1, 4), jnp.int32), 1)
    sums = jax.tree.map(lambda leaf: leaf[None], sums)
    for scope in ("micro_batch", "sequence"):
        assert np.isclose(load_balancing_loss(sums, scope), 2.0)


def test_padding_is_not_summed() -> None:
    valid = jnp.ones((B, T), bool).at[1, 2:].set(False).at[2].set(False)
    by_row = jnp.broadcast_to(jnp.arange(B)[:, None], (B, T))
    x = logits()
    changed = x.at[:, 1, 2:].set(9.0).at[:, 2].set(0)

    def losses(y: jax.Array) -> tuple[jax.Array, ...]:
        whole, rows = summed(y, everywhere(), 1, valid), summed(y, by_row, B, valid)
        return load_balancing_loss(whole), load_balancing_loss(rows, "sequence"), router_z_loss(whole)

    np.testing.assert_allclose(losses(changed), losses(x), rtol=1e-5)


def test_global_scope_sums_over_micro_batches_with_exact_gradients() -> None:
    valid = jnp.ones((B, T), bool).at[0, 4:].set(False)
    rows = [slice(i, i + 1) for i in range(B)]

    def whole(x: jax.Array) -> jax.Array:
        return load_balancing_loss(summed(x, everywhere(), 1, valid))

    def parted(x: jax.Array) -> jax.Array:
        parts = [summed(x[:, row], everywhere()[row], 1, valid[row]) for row in rows]
        total = jax.tree.map(lambda *loads: sum(loads), *map(load_of, parts))
        assert isinstance(total, Load)
        total = jax.lax.stop_gradient(total)
        return functools.reduce(operator.add, (load_balancing_loss(part, "global", total) for part in parts))

    got, expected = (jax.jit(jax.value_and_grad(f))(logits()) for f in (parted, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, expected)


def test_global_scope_needs_the_total() -> None:
    sums = summed(logits(), everywhere(), 1, jnp.ones((B, T), bool))
    with pytest.raises(ValueError, match="whole optimiser step"):
        load_balancing_loss(sums, "global")
