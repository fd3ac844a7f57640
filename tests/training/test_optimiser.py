"""The schedule, and AdamW against that of torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import OptimiserConfig
from bimedix_jax.training.optimiser import clip, make_optimiser, round_stochastically, schedule


def test_schedule():
    rate = schedule(OptimiserConfig(learning_rate=2.0, warmup_steps=4, final_fraction=0.1), 20)
    rates = np.array([rate(count) for count in range(20)])
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0])
    assert np.all(np.diff(rates[3:]) < 0)
    assert 0.2 < rates[-1] < 0.25, "the last step still learns"
    np.testing.assert_allclose(rate(20), 0.2, rtol=1e-6)
    np.testing.assert_allclose(schedule(OptimiserConfig(warmup_steps=0), 5)(0), 2e-4, rtol=0.1)


def test_more_warm_up_than_steps_raises():
    with pytest.raises(BimedixError, match="warmup_steps"):
        schedule(OptimiserConfig(warmup_steps=10), 10)


def test_clip():
    gradients = {"a": jnp.asarray([3.0]), "b": jnp.asarray([[4.0]])}
    clipped, norm = clip(gradients, 1.0)
    assert float(norm) == 5.0
    np.testing.assert_allclose(optax.tree.norm(clipped), 1.0, rtol=1e-6)
    assert clip(gradients, 10.0)[0]["a"] == gradients["a"]
    assert clip(gradients, None)[0]["a"] == gradients["a"]
    assert np.isfinite(clip({"a": jnp.zeros(3)}, 1.0)[0]["a"]).all()


def test_adamw_equals_torch():
    """Five steps with decay on the matrix and none on the norm."""
    import torch

    config = OptimiserConfig(learning_rate=0.1, warmup_steps=0, final_fraction=1.0, weight_decay=0.3, beta2=0.95)
    random = np.random.default_rng(0)
    start = {"w": random.normal(size=(3, 2)).astype(np.float32), "norm.scale": np.ones((2, 3), np.float32)}
    gradients = [{name: random.normal(size=x.shape).astype(np.float32) for name, x in start.items()} for _ in range(5)]

    theirs = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
    groups = [{"params": [theirs["w"]], "weight_decay": 0.3}, {"params": [theirs["norm.scale"]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    ours = {name: jnp.asarray(x) for name, x in start.items()}
    optimiser = make_optimiser(config, 100)
    state = optimiser.init(ours)
    for gradient in gradients:
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name])
        adamw.step()
        updates, state = optimiser.update({name: jnp.asarray(x) for name, x in gradient.items()}, state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
    for name, parameter in theirs.items():
        np.testing.assert_allclose(ours[name], parameter.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_routers_have_a_separate_rate():
    """Three steps with decay. Router parameters move as in a run with their rate, the others as without it."""
    start = {"layers.moe.router.lora.b": jnp.ones((2, 3)), "layers.moe.w1.lora.b": jnp.ones((2, 3))}
    gradient = jax.tree.map(lambda x: 0.3 * x, start)

    def moved(config):
        optimiser = make_optimiser(config, 10)
        params, state = start, optimiser.init(start)
        for _ in range(3):
            updates, state = optimiser.update(gradient, state, params)
            params = jax.tree.map(jnp.add, params, updates)
        return params

    slow = OptimiserConfig(learning_rate=0.01, warmup_steps=2, weight_decay=0.1)
    both = moved(dataclasses.replace(slow, router_learning_rate=0.05))
    fast = moved(dataclasses.replace(slow, learning_rate=0.05))
    name, other = start
    np.testing.assert_allclose(both[name], fast[name], rtol=1e-6)
    np.testing.assert_array_equal(both[other], moved(slow)[other])
    with pytest.raises(BimedixError, match="leave them out"):
        OptimiserConfig(router_learning_rate=0.0)


def test_stochastic_rounding_is_exact_on_average():
    x = jnp.asarray(np.random.default_rng(0).normal(size=256).astype(np.float32)) * 1e-3
    counts = jnp.arange(4096)
    rounded = jax.jit(jax.vmap(lambda count: round_stochastically(x, count)))(counts).astype(jnp.float32)
    spacing = jnp.abs(x) * 2**-7
    assert bool(jnp.all(jnp.abs(rounded - x[None]) <= spacing[None])), "rounds to a neighbour"
    np.testing.assert_allclose(jnp.mean(rounded - x[None], axis=0) / spacing, 0, atol=0.04)
    special = jnp.asarray([0.0, jnp.inf, -jnp.inf, 1.5])
    np.testing.assert_array_equal(round_stochastically(special, jnp.int32(7)).astype(jnp.float32), special)
    assert bool(jnp.isnan(round_stochastically(jnp.float32(jnp.nan), jnp.int32(7))))


def test_bfloat16_moments_halve_memory_and_still_decay():
    """With beta2 0.999 a step changes the second moment by less than bfloat16 resolves."""
    start = {"w": jnp.zeros((16, 16))}
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(50, 16, 16)).astype(np.float32))

    def optimise(dtype):
        optimiser = make_optimiser(OptimiserConfig(learning_rate=1e-3, warmup_steps=0, state_dtype=dtype), 1000)

        def step(carry, gradient):
            params, state = carry
            updates, state = optimiser.update({"w": gradient}, state, params)
            return (jax.tree.map(jnp.add, params, updates), state), None

        gradients = jnp.concatenate([noise, jnp.zeros((650, 16, 16))])
        (params, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, gradients))((start, optimiser.init(start)))
        return params["w"], state

    (exact, full), (close, half) = optimise("float32"), optimise("bfloat16")
    moments, halves = ([x for x in jax.tree.leaves(state) if x.ndim == 2] for state in (full, half))
    assert [x.dtype for x in halves] == [jnp.bfloat16] * 2
    assert sum(x.nbytes for x in halves) * 2 == sum(x.nbytes for x in moments)
    second, rounded = moments[1], halves[1].astype(jnp.float32)
    assert float(jnp.mean(rounded) / jnp.mean(second)) == pytest.approx(1, abs=0.02)
    assert float(jnp.linalg.norm(close - exact) / jnp.linalg.norm(exact)) < 0.05
