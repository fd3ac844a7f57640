"""Routers in training: every step follows the plan, and state that is learned without a gradient is saved."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.checkpoint.load import load
from bimedix_jax.checkpoint.peft_write import export_peft
from bimedix_jax.checkpoint.store import load_adapter
from bimedix_jax.data.encoding import ROLES
from bimedix_jax.data.pack import Row, Segment
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import RouterTraining
from bimedix_jax.inference.generate import generate
from bimedix_jax.inference.planning import UNKNOWN
from bimedix_jax.kernels import backends
from bimedix_jax.models.config import RouterConfig
from bimedix_jax.models.init import init_random
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import RoutingPlan
from bimedix_jax.routing.plans import read_plan
from bimedix_jax.sharding.placement import place
from bimedix_jax.sharding.rules import make_mesh
from bimedix_jax.training.interventions import tokens_of_rows
from bimedix_jax.training.loop import train
from bimedix_jax.training.metrics_file import read_metrics
from bimedix_jax.training.optimiser import make_optimiser
from bimedix_jax.training.prepare import prepare_model, replicated_plan
from bimedix_jax.training.rows import micro_batches
from bimedix_jax.training.state import init_state, split_params
from bimedix_jax.training.step import make_gradient, make_train_step

BIAS = "layers.moe.state"
SIGMOID = RouterTraining(variant="sigmoid_bias", bias_rate=0.05)


@pytest.fixture(autouse=True)
def quick_kernels():
    """Kernels that compile fast. Their results are tested elsewhere."""
    with backends.use(expert_mlp="composed", grouped_matmul="ragged_dot"):
        yield


def state_of(model: Mixtral) -> np.ndarray:
    """The state that the router learned without a gradient."""
    assert model.layers.moe.state is not None
    return np.asarray(model.layers.moe.state.get_value())


def stacked(data: dict, parts: int) -> dict:
    return jax.tree.map(jnp.asarray, micro_batches(data, parts))


@pytest.mark.parametrize("variant", ["topk", "softmax_topk"])
def test_banning_an_expert_equals_removing_it(config, batch, variant) -> None:
    """The gradients of all parameters. Router losses are off, since they depend on the logits of the banned expert."""
    banned, kept = 1, jnp.array([0, 2, 3])
    router = RouterConfig(num_experts=4, top_k=2, variant=variant)
    whole = init_random(dataclasses.replace(config, router=router), std=0.4)
    smaller = init_random(dataclasses.replace(config, router=dataclasses.replace(router, num_experts=3)))
    _, params, _ = split_params(whole)

    def without(name: str, x: jax.Array) -> jax.Array:
        if name == "layers.moe.router.w":
            return x[..., kept]
        return x[:, kept] if ".moe.w" in name else x

    fewer = {name: without(name, x) for name, x in params.items()}
    losses = RouterTraining(aux_loss_coef=0.0)
    data = stacked(batch(4, 12, seed=2), 2)
    gradient = jax.jit(make_gradient(split_params(whole)[0], losses, "layer"))
    ours, sums = gradient(params, {}, data, None, RoutingPlan.ban(whole.config, banned))
    theirs, expected = jax.jit(make_gradient(split_params(smaller)[0], losses, "layer"))(fewer, {}, data)
    np.testing.assert_allclose(sums["nll"], expected["nll"], rtol=1e-5)
    for name, other in theirs.items():
        np.testing.assert_allclose(without(name, ours[name]), other, rtol=1e-4, atol=1e-6, err_msg=name)
    assert (ours["layers.moe.w1.w"][:, banned] == 0).all()
    free, _ = gradient(params, {}, data, None, RoutingPlan())
    assert (free["layers.moe.w1.w"][:, banned] != 0).any()


def test_a_plan_can_have_values_for_each_row(config, batch) -> None:
    model = init_random(config, std=0.4)
    structure, params, frozen = split_params(model)
    bias = np.zeros((2, 4, 1, 4), np.float32)
    bias[:, 1, 0, 3] = bias[:, 2, 0, 0] = -1e9
    plan, data = RoutingPlan(bias_LBTE=jnp.asarray(bias)), batch(4, 12, seed=2)
    gradient = jax.jit(make_gradient(structure, RouterTraining(), "none"))
    _, once = gradient(params, frozen, stacked(data, 1), None, plan)
    _, parts = gradient(params, frozen, stacked(data, 4), None, plan)
    np.testing.assert_allclose(once["nll"], parts["nll"], rtol=1e-5)
    np.testing.assert_allclose(once["router"].chosen_LXE, parts["router"].chosen_LXE)
    with pytest.raises(ValueError, match="3 rows, a step has 4"):
        gradient(params, frozen, stacked(data, 1), None, RoutingPlan(bias_LBTE=jnp.asarray(bias[:, :3])))


def test_a_plan_is_the_same_on_a_mesh(config, batch) -> None:
    """A ban, other fields for each row and position, and noise, which depends on the row and not on the device."""
    model, data = init_random(config, std=0.4), stacked(batch(8, 12, seed=2), 2)
    rng = np.random.default_rng(0)
    plan = dataclasses.replace(
        RoutingPlan.noisy(config, 1.0),
        bias_LBTE=RoutingPlan.ban(config, 1).bias_LBTE,
        temperature_LBT=jnp.asarray(rng.uniform(0.5, 2.0, (2, 8, 12)), jnp.float32),
        deviations_LBTE=jnp.asarray(rng.normal(0, 0.5, (2, 8, 1, 4)), jnp.float32),
        active_LBT=jnp.asarray(rng.integers(1, 3, (2, 8, 12)), jnp.int32),
        map_LBTE=jnp.asarray(rng.permuted(np.tile(np.arange(4), (2, 8, 12, 1)), axis=-1), jnp.int32),
        gain_LBTE=jnp.asarray(rng.uniform(0, 2, (2, 1, 12, 4)), jnp.float32),
    )
    structure, params, frozen = split_params(model)
    expected, sums = jax.jit(make_gradient(structure, RouterTraining(), "none"))(params, frozen, data, None, plan)
    mesh = make_mesh(fsdp=2, expert=2, devices=jax.devices()[:4])
    structure, params, frozen = split_params(place(model, mesh))
    plan = replicated_plan(plan, structure.layout)
    found, sharded = jax.jit(make_gradient(structure, RouterTraining(), "none"))(params, frozen, data, None, plan)
    np.testing.assert_allclose(sharded["router"].chosen_LXE, sums["router"].chosen_LXE)
    np.testing.assert_allclose(sharded["loss"], sums["loss"], rtol=1e-5)
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, rtol=2e-4, atol=2e-6, err_msg=name)


def test_the_balancing_bias_uses_the_load_of_the_whole_step(config, batch, experiment) -> None:
    """On one device and on a mesh, with micro-batches and padding."""
    router = RouterConfig(num_experts=4, top_k=2, variant="sigmoid_bias", bias_rate=0.05)
    model = init_random(dataclasses.replace(config, router=router), std=0.4)
    data, plan = batch(8, 12, seed=2), experiment(lora=None)
    out = model(data["tokens_BT"], data["segment_ids_BT"], record="choices")
    counts = np.stack([np.bincount(layer[layer >= 0], minlength=4) for layer in np.asarray(out.routing.experts_LBTK)])
    expected = 0.05 * np.sign(counts.mean(1, keepdims=True) - counts)
    for placed in (model, place(model, make_mesh(fsdp=2, devices=jax.devices()[:2]))):
        structure, params, frozen = split_params(placed)
        optimiser = make_optimiser(plan.optimiser, 6)
        state = init_state(params, optimiser, structure.router_state(frozen))
        state, _ = make_train_step(structure, plan, 6, optimiser)(state, frozen, stacked(data, 2))
        np.testing.assert_allclose(state.router[BIAS], expected, rtol=1e-6)
    with pytest.raises(ValueError, match="learns without a gradient"):
        make_train_step(structure, plan, 6, optimiser)(init_state(params, optimiser), frozen, stacked(data, 2))


def test_a_run_saves_the_variant_and_the_bias(tmp_path, experiment) -> None:
    """After an interruption the bias is bitwise the same, and `load` restores the model from the folder."""
    run = experiment(router=SIGMOID, steps=4, checkpoint_every=2)
    whole = train(run, tmp_path / "whole")
    train(run, tmp_path / "parts")
    for folder in ("checkpoints/00000004", "adapter"):  # as if the run had ended after its second step
        target = tmp_path / "parts" / folder
        target.rename(target.with_name(f"gone-{target.name}"))
    train(run, tmp_path / "parts", resume=True)
    trained = state_of(whole.model)
    assert len(np.unique(trained)) > 1
    assert np.abs(trained).max() <= 4 * 0.05 + 1e-6
    for folder in ("whole", "parts"):
        model = load(tmp_path / folder)
        assert model.config.router == RouterConfig(num_experts=4, top_k=2, variant="sigmoid_bias", bias_rate=0.05)
        np.testing.assert_array_equal(state_of(model), trained)
    tokens = np.arange(1, 9)[None]
    np.testing.assert_allclose(model(tokens).logits_BTV, whole.model(tokens).logits_BTV, rtol=1e-5, atol=1e-6)
    answer, routing = generate(model, [3, 4, 5], 4, plan=RoutingPlan.ban(model.config, 2), record="choices")
    assert len(answer) == 4
    assert (routing.experts_LBTK != 2).all()


def test_an_adapter_includes_its_router(tmp_path, config, experiment, caplog) -> None:
    result = train(experiment(router=SIGMOID, steps=2), tmp_path / "run")
    assert "with the router" not in caplog.text, "a random model has no router to replace"
    for export in (export_hf, export_peft):
        with pytest.raises(BimedixError, match="this model's router is sigmoid_bias"):
            export(result.model, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    base = init_random(config, seed=0)
    adapted = load_adapter(base, result.trained)
    assert adapted.config.router.variant == "sigmoid_bias"
    assert base.config.router.variant == "topk"
    np.testing.assert_array_equal(state_of(adapted), state_of(result.model))
    plain = load(tmp_path / "run", router="topk")
    assert "was trained with the router sigmoid_bias and runs with topk" in caplog.text
    assert plain.layers.moe.state is None
    with pytest.raises(BimedixError, match="there is no router best"):
        load(tmp_path / "run", router="best")


def test_a_given_model_gets_the_router_of_the_experiment(config, experiment, caplog) -> None:
    model = prepare_model(experiment(router=SIGMOID), init_random(config), None)
    assert model.config.router.variant == "sigmoid_bias"
    assert "the given model has the router topk and trains with sigmoid_bias" in caplog.text
    with pytest.raises(BimedixError, match="'topk' does not read scale"):
        prepare_model(experiment(router=RouterTraining(scale=2.0)), init_random(config), None)


def test_a_run_saves_its_plan_and_resuming_with_another_raises(tmp_path, config, experiment) -> None:
    run, plan = experiment(steps=4, checkpoint_every=2), RoutingPlan.ban(config, 3)
    train(run, tmp_path / "run", plan=plan)
    assert read_plan(tmp_path / "run/plan.safetensors").digest() == plan.digest()
    assert json.loads((tmp_path / "run/run.json").read_text("utf-8"))["plan"] == plan.digest()
    free, banned = (train(run, tmp_path / "free"), read_metrics(tmp_path / "run"))
    assert free.metrics["nll"] != banned[-1]["nll"]
    assert max(line["load_entropy"][0] for line in banned) < np.log(3) / np.log(4) + 1e-6, "only three experts are used"
    for other in (None, RoutingPlan.ban(config, 1)):
        with pytest.raises(BimedixError, match=r"was started with plan .*, and is resumed with"):
            train(run, tmp_path / "run", plan=other, resume=True)
    with pytest.raises(BimedixError, match="was started with no routing plan"):
        train(run, tmp_path / "free", plan=plan, resume=True)
    train(run, tmp_path / "run", plan=plan, resume=True)


def test_a_run_follows_rules_and_resuming_with_others_raises(tmp_path, config, experiment) -> None:
    """The same as a plan where rules say the same for all tokens; by token, also for noise."""
    rules = tmp_path / "rules.json"

    def run(name: str, *given: dict, plan: RoutingPlan | None = None, resume: bool = False) -> list[float]:
        rules.write_text(json.dumps(given))
        one = experiment(steps=2, checkpoint_every=2, intervene=str(rules) if given else None)
        train(one, tmp_path / name, plan=plan, resume=resume)
        return [line["nll"] for line in read_metrics(tmp_path / name)]

    ban = {"op": "ban", "experts": [3]}
    banned = run("rules", ban)
    np.testing.assert_allclose(banned, run("plan", plan=RoutingPlan.ban(config, 3)), rtol=1e-6)
    parts = [{**ban, "where": {"positions": span}} for span in (":3", "3:")]
    np.testing.assert_allclose(run("parts", *parts), banned, rtol=1e-5)
    assert json.loads((tmp_path / "rules/config.json").read_text("utf-8"))["intervene"] == str(rules)
    with pytest.raises(BimedixError, match=r"intervene differs from that of the run .* rules have changed"):
        run("rules", {**ban, "experts": [2]}, resume=True)
    for given, message in (
        ({"op": "shuffle"}, "shuffle needs another pass of a model in every step"),
        ({"op": "uniform", "where": {"language": "ar"}}, "language, which is not available: packed rows lack it"),
        ({"op": "ban", "experts": [4]}, "names expert 4"),
    ):
        with pytest.raises(BimedixError, match=message):
            run("wrong", given)
    with pytest.raises(BimedixError, match="a routing plan and the experiment has intervene; give one of them"):
        run("wrong", ban, plan=RoutingPlan.ban(config, 3))
    assert not (tmp_path / "wrong").exists()


def test_rules_know_the_records_of_packed_rows() -> None:
    segments = (Segment(1, "a", "en", "qa", "s", 6, 1), Segment(2, "b", "ar", "chat", "s", 3, 1))
    ids, learned = np.array([1, 1, 1, 1, 1, 1, 2, 2, 2, 0]), np.array([0, 0, 0, 0, 0, 1, 0, 0, 1, 0], bool)
    tokens, sources = tokens_of_rows([Row(np.arange(10), ids, learned, segments)])
    assert tokens.positions_BT.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, -1]]
    assert tokens.items_BT[0, :9].tolist() == [0] * 6 + [1] * 3
    assert [(source.id, source.language, source.kind) for source in sources] == [("a", "en", "qa"), ("b", "ar", "chat")]
    roles = [source.roles.tolist() for source in sources if source.roles is not None]
    first, answer = ROLES.index("first"), ROLES.index("answer")
    assert roles == [[first] * 4 + [UNKNOWN, answer], [first] * 3]


def test_a_plan_that_does_not_fit_raises(tmp_path, config, experiment) -> None:
    with pytest.raises(BimedixError, match="does not fit this run"):
        train(experiment(), tmp_path / "run", plan=RoutingPlan(temperature_LBT=jnp.ones((2, 1, 5))))
    assert not (tmp_path / "run").exists()


def test_sums_by_group(config, batch) -> None:
    """Sums and losses by group add up to those of all tokens, with and without groups by row, and on a mesh."""
    model = init_random(dataclasses.replace(config, num_kv_heads=2), std=0.4)  # which two shards can divide
    data = batch(4, 12, seed=2)
    structure, params, frozen = split_params(model)
    plain = {**data, "group_BT": np.random.default_rng(0).integers(0, 3, (4, 12), dtype=np.int32)}
    for scope in ("sequence", "global"):
        router = RouterTraining(aux_scope=scope)
        _, found = jax.jit(make_gradient(structure, router, "none", named=2))(params, frozen, stacked(plain, 2))
        _, expected = jax.jit(make_gradient(structure, router, "none"))(params, frozen, stacked(data, 2))
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)
        assert found["router"].chosen_LXE.shape == (2, 3, 4)
        for x in range(3):
            tokens = ((plain["group_BT"] == x) & (data["segment_ids_BT"] != 0)).sum()
            assert found["router"].tokens_LX[0, x] == tokens
        np.testing.assert_allclose(found["router"].chosen_LXE.sum(1), expected["router"].chosen_LXE[:, 0])
        np.testing.assert_allclose(found["group_losses"][:, 0].sum() / expected["targets"], expected["nll"], rtol=1e-5)
        assert found["group_losses"][:, 1].sum() == expected["targets"]
    structure, params, frozen = split_params(place(model, make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])))
    gradient = make_gradient(structure, RouterTraining(aux_scope="global"), "none", named=2)
    _, sharded = jax.jit(gradient)(params, frozen, stacked(plain, 2))
    np.testing.assert_allclose(sharded["group_losses"], found["group_losses"], rtol=1e-4)
    np.testing.assert_allclose(sharded["keys"], found["keys"])


def test_noise_differs_between_steps_and_micro_batches(config, batch) -> None:
    plan, data = RoutingPlan.noisy(config, 3.0), batch(2, 12)
    twice = {name: np.concatenate([x, x]) for name, x in data.items()}  # the same rows in both micro-batches
    structure, params, frozen = split_params(init_random(config, std=0.4))
    gradient = jax.jit(make_gradient(structure, RouterTraining(), "none"))
    _, one = gradient(params, frozen, stacked(data, 1), None, plan)
    _, two = gradient(params, frozen, stacked(twice, 2), None, plan)
    assert not np.allclose(2 * one["router"].chosen_LXE, two["router"].chosen_LXE)
    _, other = gradient(params, frozen, stacked(data, 1), None, plan.fold_in(1))
    assert not np.allclose(one["router"].chosen_LXE, other["router"].chosen_LXE)
