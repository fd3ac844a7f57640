"""The gradient of a step: its value, and what it does not depend on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bimedix_jax.adapters import add_lora
from bimedix_jax.experiment import RouterTraining
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.models.config import LoraConfig, Remat
from bimedix_jax.models.init import init_random
from bimedix_jax.quantise import quantise_base
from bimedix_jax.training.optimiser import make_optimiser
from bimedix_jax.training.rows import micro_batches
from bimedix_jax.training.state import init_state, split_params, update_params
from bimedix_jax.training.step import make_gradient, make_train_step

ROUTER = RouterTraining(aux_loss_coef=0.5, z_loss_coef=0.1)
"""Large coefficients, so that a wrong share is visible."""


def adapted(config, spread=0.3, targets=("q", "w2", "router")):
    """A model with nonzero adapters and unbalanced routing. It has few adapters, to compile fast."""
    model = add_lora(init_random(config, std=0.4), LoraConfig(rank=2, alpha=4.0, targets=targets))
    _, params, _ = split_params(model)
    draw = np.random.default_rng(7)
    values = {name: jnp.asarray(draw.normal(0, spread, x.shape), jnp.float32) for name, x in params.items()}
    update_params(model, values)
    return model


def gradients_of(model, batch, accumulation, scope, remat: Remat = "none"):
    structure, params, frozen = split_params(model)
    gradient = jax.jit(make_gradient(structure, dataclasses.replace(ROUTER, aux_scope=scope), remat))
    return gradient(params, frozen, jax.tree.map(jnp.asarray, micro_batches(batch, accumulation)))


def losses_of_record(routing, valid_BT) -> tuple[float, float]:
    """(load-balancing loss, z-loss) from the record of every token, in NumPy float64."""
    logits = np.asarray(routing.logits_LBTE, np.float64)[:, valid_BT]
    exp = np.exp(logits)
    shares = np.eye(logits.shape[-1])[np.asarray(routing.experts_LBTK)[:, valid_BT]].sum(-2).mean((0, 1))
    mass = (exp / exp.sum(-1, keepdims=True)).mean((0, 1))
    return logits.shape[-1] * float(shares @ mass), float((np.log(exp.sum(-1)) ** 2).mean())


def relative(ours, theirs):
    """Largest relative difference over all tensors, relative to each tensor's largest magnitude."""
    worst = 0.0
    for name in ours:
        worst = max(worst, float(jnp.max(jnp.abs(ours[name] - theirs[name])) / jnp.max(jnp.abs(theirs[name]))))
    return worst


@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_accumulation_does_not_change_the_gradient(config, batch, scope):
    """1 x 4 and 4 x 1 rows with uneven documents and an empty row."""
    model, data = adapted(config), batch(4, 12, seed=2)
    data["segment_ids_BT"][2] = 0
    once, once_sums = gradients_of(model, data, 1, scope)
    parts, parts_sums = gradients_of(model, data, 4, scope)
    assert relative(parts, once) < 2e-5
    for name in ("loss", "nll", "aux_loss", "z_loss", "targets", "tokens"):
        np.testing.assert_allclose(parts_sums[name], once_sums[name], rtol=1e-5, err_msg=name)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), parts_sums["router"], once_sums["router"])


def test_only_scope_micro_batch_depends_on_accumulation(config, batch):
    """As in Hugging Face, each micro-batch balances its own tokens."""
    model, data = adapted(config), batch(4, 12, seed=2)
    _, once = gradients_of(model, data, 1, "micro_batch")
    _, parts = gradients_of(model, data, 4, "micro_batch")
    np.testing.assert_allclose(parts["nll"], once["nll"], rtol=1e-5)
    np.testing.assert_allclose(parts["z_loss"], once["z_loss"], rtol=1e-5)
    assert abs(float(parts["aux_loss"]) / float(once["aux_loss"]) - 1) > 0.01
    alone = jax.jit(lambda tokens, segment_ids: model.hidden(tokens, segment_ids, groups=1).aux_loss)
    losses = [alone(data["tokens_BT"][row : row + 1], data["segment_ids_BT"][row : row + 1]) for row in range(4)]
    np.testing.assert_allclose(parts["aux_loss"], np.mean(losses), rtol=1e-5)


def test_the_objective_equals_its_definition(config, batch):
    """Computed from the public output of the model, without chunks or shares."""
    model, data = adapted(config), batch(3, 12, seed=4)
    _, sums = gradients_of(model, data, 1, "global")
    out = jax.jit(lambda data: model(data["tokens_BT"], data["segment_ids_BT"], groups=1))(data)
    logp = jax.nn.log_softmax(out.logits_BTV)
    taken = np.take_along_axis(np.array(logp)[:, :-1], data["tokens_BT"][:, 1:, None], axis=-1)[..., 0]
    same = (data["segment_ids_BT"][:, 1:] == data["segment_ids_BT"][:, :-1]) & (data["segment_ids_BT"][:, 1:] != 0)
    learned = same & data["loss_mask_BT"][:, 1:]
    nll = -(taken * learned).sum() / learned.sum()
    aux, z = losses_of_record(out.routing, data["segment_ids_BT"] != 0)
    np.testing.assert_allclose(sums["nll"], nll, rtol=1e-5)
    np.testing.assert_allclose(sums["loss"], nll + 0.5 * aux + 0.1 * z, rtol=1e-5)
    assert float(sums["targets"]) == learned.sum()


def test_the_gradient_equals_finite_differences(config, batch):
    """Along a random direction."""
    model, data = adapted(config, spread=0.1), batch(2, 12, seed=4)
    structure, params, frozen = split_params(model)
    gradient = jax.jit(make_gradient(structure, RouterTraining(aux_loss_coef=0.0, z_loss_coef=0.1), "none"))
    stacked = jax.tree.map(jnp.asarray, micro_batches(data, 1))
    gradients, _ = gradient(params, frozen, stacked)
    draw = np.random.default_rng(0)
    direction = {name: jnp.asarray(draw.normal(size=x.shape), jnp.float32) for name, x in params.items()}
    slope = sum(float(jnp.vdot(gradients[name], direction[name])) for name in params)

    def loss(distance):
        return float(gradient({n: x + distance * direction[n] for n, x in params.items()}, frozen, stacked)[1]["loss"])

    # the loss jumps where a token changes its experts, so the step is small
    estimate = (loss(2e-4) - loss(-2e-4)) / 4e-4
    np.testing.assert_allclose(estimate, slope, rtol=0.02, atol=0.02)


def test_remat_only_changes_rounding(config, batch):
    model, data = adapted(config), batch(2, 12, seed=1)
    kept, _ = gradients_of(model, data, 1, "micro_batch", remat="none")
    again, _ = gradients_of(model, data, 1, "micro_batch", remat="layer")
    assert relative(again, kept) < 1e-5


def test_only_adapters_train(config, batch, experiment):
    """A 4-bit base does not change, and has no optimiser state."""
    model = add_lora(quantise_base(init_random(config)), LoraConfig(rank=2, alpha=4.0))
    structure, params, frozen = split_params(model)
    assert params
    assert all(".lora." in name and x.dtype == jnp.float32 for name, x in params.items())
    assert isinstance(frozen["layers.moe.w1.w"], NF4Tensor)
    plan = experiment()
    optimiser = make_optimiser(plan.optimiser, 6)
    state = init_state(params, optimiser)
    moments = [leaf for leaf in jax.tree.leaves(state.optimiser) if leaf.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in params.values())
    before = jax.tree.map(np.array, frozen)
    step = make_train_step(structure, plan, 6, optimiser)
    state, _ = step(state, frozen, jax.tree.map(jnp.asarray, micro_batches(batch(2, 12), 1)))
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    assert not np.array_equal(state.params["layers.moe.w1.lora.b"], params["layers.moe.w1.lora.b"])


def test_arrays_of_the_model_are_not_donated(config, batch, experiment):
    model = adapted(config)
    structure, params, frozen = split_params(model)
    optimiser = make_optimiser(experiment().optimiser, 6)
    step = make_train_step(structure, experiment(), 6, optimiser)
    step(init_state(params, optimiser), frozen, jax.tree.map(jnp.asarray, micro_batches(batch(2, 12), 1)))
    assert all(np.isfinite(x).all() for x in params.values())


def test_every_parameter_trains_without_adapters(config):
    _, params, frozen = split_params(init_random(config))
    assert not frozen
    assert {"embed.table", "lm_head.w", "layers.moe.router.w", "norm.scale"} <= set(params)


def test_a_step_without_any_target_is_finite(config, batch):
    data = batch(2, 12)
    data["loss_mask_BT"][:] = False
    gradients, sums = gradients_of(adapted(config), data, 2, "micro_batch")
    assert float(sums["nll"]) == 0
    assert all(np.isfinite(x).all() for x in gradients.values())


def test_dropout_differs_between_steps(config, batch, experiment):
    """Without a key there is no dropout."""
    model = add_lora(init_random(config, std=0.4), LoraConfig(rank=2, alpha=4.0, targets=("q", "w2"), dropout=0.5))
    structure, params, frozen = split_params(model)
    data = jax.tree.map(jnp.asarray, micro_batches(batch(2, 12), 2))
    gradient = jax.jit(make_gradient(structure, dataclasses.replace(ROUTER, aux_scope="global"), "layer"))
    plain, _ = gradient(params, frozen, data)
    one, _ = gradient(params, frozen, data, jax.random.key(1))
    again, _ = gradient(params, frozen, data, jax.random.key(1))
    other, _ = gradient(params, frozen, data, jax.random.key(2))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert relative(one, plain) > 0.1
    assert relative(one, other) > 0.1
    asked = experiment(lora=model.lora)
    fixed = optax.set_to_zero()
    still = make_train_step(structure, asked, 10, fixed)
    state, first = still(init_state(params, fixed), frozen, data)
    _, second = still(state, frozen, data)
    assert float(first["grad_norm"]) != float(second["grad_norm"]), "the same parameters and rows, but another mask"
