"""Every function that runs a model follows a plan: banning an expert equals a model without that expert."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from bimedix_jax.adapters import add_lora
from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.checkpoint.store import save_adapter
from bimedix_jax.commands import eval_run
from bimedix_jax.data.encoding import encode_chat
from bimedix_jax.data.records import write_jsonl
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.heldout import heldout_loss
from bimedix_jax.evals.multiple_choice import multiple_choice
from bimedix_jax.inference.chat import Chat, ChatOptions
from bimedix_jax.inference.generate import generate, stream
from bimedix_jax.inference.padding import pad_right
from bimedix_jax.kernels import backends
from bimedix_jax.models.config import LoraConfig, RouterConfig
from bimedix_jax.models.init import init_random
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import NO_EXPERT, ROUTERS, RoutingPlan
from bimedix_jax.routing.interventions import Interventions
from bimedix_jax.routing.load import expert_load
from bimedix_jax.training.state import split_params, update_params

BANNED = 2
PROMPTS = [[5, 17, 3, 60, 2], [9], [44, 8, 8]]

every_variant = pytest.mark.parametrize("variant", ROUTERS)


@pytest.fixture
def quick_kernels():
    """Kernels that compile fast; what they compute is tested elsewhere."""
    with backends.use(expert_mlp="composed", grouped_matmul="ragged_dot"):
        yield


@pytest.fixture(scope="module")
def models():
    """models(variant) -> (a model, the same one without expert BANNED)."""

    def without(model: Mixtral) -> Mixtral:
        router = dataclasses.replace(model.config.router, num_experts=model.config.router.num_experts - 1)
        smaller = init_random(dataclasses.replace(model.config, router=router))
        kept = jnp.array([e for e in range(model.config.router.num_experts) if e != BANNED])
        for name in ("embed", "norm", "lm_head"):
            setattr(smaller, name, getattr(model, name))
        for name in ("attention_norm", "attention", "moe_norm"):
            setattr(smaller.layers, name, getattr(model.layers, name))
        theirs, ours = model.layers.moe, smaller.layers.moe
        ours.router.w.set_value(theirs.router.w.get_value()[..., kept])
        for one, other in ((ours.w1, theirs.w1), (ours.w2, theirs.w2), (ours.w3, theirs.w3)):
            one.w.set_value(other.w.get_value()[:, kept])
        if theirs.state is not None and ours.state is not None:
            ours.state.set_value(theirs.state.get_value()[:, kept])
        return smaller

    found = {}

    def make(config, variant: str) -> tuple[Mixtral, Mixtral]:
        if variant not in found:
            router = RouterConfig(num_experts=config.router.num_experts, top_k=config.router.top_k, variant=variant)
            model = init_random(dataclasses.replace(config, router=router), seed=3, std=0.3)
            if model.layers.moe.state is not None:
                model.layers.moe.state.set_value(
                    jnp.asarray(np.random.default_rng(0).normal(0, 0.1, (2, 4)), jnp.float32)
                )
            found[variant] = model, without(model)
        return found[variant]

    return make


def ban(model: Mixtral) -> RoutingPlan:
    return RoutingPlan.ban(model.config, BANNED)


@pytest.mark.usefixtures("quick_kernels")
def test_heldout_loss_under_a_ban(model, models, tokenizer, mixed):
    whole, smaller = models(model.config, "softmax_topk")
    banned = heldout_loss(whole, tokenizer, mixed, plan=ban(whole), record="choices")
    expected = heldout_loss(smaller, tokenizer, mixed)
    for group, loss in expected.nats_per_token.items():
        assert banned.nats_per_token[group] == pytest.approx(loss, rel=1e-5)
    assert banned.nats_per_token["en"] != pytest.approx(
        heldout_loss(whole, tokenizer, mixed).nats_per_token["en"], rel=1e-4
    )
    assert banned.routing is not None
    for number, record in enumerate(mixed):
        ids, _ = encode_chat(tokenizer, record.conversations)
        experts = banned.routing[number].experts_LBTK
        assert experts.shape == (2, 1, len(ids), 2)
        assert (experts != BANNED).all()
        alone = whole(np.array([ids]), plan=ban(whole)).routing
        np.testing.assert_array_equal(experts, alone.experts_LBTK)


@pytest.mark.usefixtures("quick_kernels")
def test_multiple_choice_under_a_ban(model, models, tokenizer, mcqa):
    whole, smaller = models(model.config, "sigmoid_bias")
    banned = multiple_choice(whole, tokenizer, mcqa, plan=ban(whole), record="choices")
    expected = multiple_choice(smaller, tokenizer, mcqa)
    for ours, theirs in zip(banned.predictions, expected.predictions, strict=True):
        assert ours.letters == pytest.approx(theirs.letters, rel=1e-4)
        assert ours.texts == pytest.approx(theirs.texts, rel=1e-4)
        assert ours.chosen == theirs.chosen
    assert banned.routing is not None
    for routing in banned.routing:
        parts = [routing.prompt, *(part for part in routing.candidates if part is not None)]
        assert all((part.experts_LBTK != BANNED).all() for part in parts)
        assert all((part.experts_LBTK != NO_EXPERT).all() for part in parts)


@every_variant
def test_generation_under_a_ban(model, models, variant):
    whole, smaller = models(model.config, variant)
    expected = generate(smaller, PROMPTS, 9)
    tokens, routing = generate(whole, PROMPTS, 9, plan=ban(whole), record="full")
    assert tokens == expected != generate(whole, PROMPTS, 9)
    assert routing.experts_LBTK.shape == (2, 3, 5 + 9, 2)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, tokens, strict=True)):
        alone = whole(np.array([prompt + answer]), plan=ban(whole)).routing
        length = len(prompt) + len(answer)
        np.testing.assert_array_equal(routing.experts_LBTK[:, row, :length], alone.experts_LBTK[:, 0])
        np.testing.assert_allclose(routing.logits_LBTE[:, row, :length], alone.logits_LBTE[:, 0], rtol=1e-3, atol=1e-5)
        assert (routing.experts_LBTK[:, row, length:] == NO_EXPERT).all()
        assert (routing.weights_LBTK[:, row, length:] == 0).all()


def test_streams_and_chats_follow_the_plan(model, models, tokenizer):
    whole, smaller = models(model.config, "topk")
    assert list(stream(whole, PROMPTS[0], 6, plan=ban(whole))) == generate(smaller, PROMPTS[0], 6)
    tokens, parts = zip(*stream(whole, PROMPTS[0], 6, plan=ban(whole), record="choices"), strict=True)
    assert list(tokens) == generate(smaller, PROMPTS[0], 6)
    assert [part.experts_LBTK.shape[2] for part in parts] == [5, 1, 1, 1, 1, 1]
    options = ChatOptions(max_new_tokens=5, temperature=0.0, top_p=None)
    reply = Chat(whole, tokenizer, options=options, plan=ban(whole), record="choices").ask("I cough.")
    assert reply.text == Chat(smaller, tokenizer, options=options).ask("I cough.").text
    assert reply.routing is not None
    assert (reply.routing.experts_LBTK != BANNED).all()


def test_stopped_rows_are_padding_in_the_record(model):
    tokens = generate(model, PROMPTS, 6)
    stop = tokens[0][2]
    cut, routing = generate(model, PROMPTS, 6, stop_tokens=[stop], record="choices")
    for row, (prompt, answer) in enumerate(zip(PROMPTS, cut, strict=True)):
        present = (routing.experts_LBTK[0, row, :, 0] != NO_EXPERT).sum()
        assert present == len(prompt) + len(answer)


@pytest.mark.usefixtures("quick_kernels")
def test_expert_load_under_a_ban(model, models, tokenizer, mixed):
    whole, smaller = models(model.config, "topk")
    banned, expected = expert_load(whole, tokenizer, mixed, plan=ban(whole)), expert_load(smaller, tokenizer, mixed)
    for group, counts in expected.counts.items():
        np.testing.assert_array_equal(np.delete(banned.counts[group], BANNED, axis=1), counts)
        assert (banned.counts[group][:, BANNED] == 0).all()


@pytest.mark.usefixtures("quick_kernels")
def test_rules_in_multiple_choice(model, tokenizer, mcqa):
    """By role, which must cover prompts and candidates, and with routes of another pass over both."""

    def logprobs(base, *rules):
        interventions = dataclasses.replace(Interventions.of(*rules), base=base)
        found = multiple_choice(model, tokenizer, mcqa, plan=interventions, record="choices")
        assert found.routing is not None
        return np.array([x for row in found.predictions for x in row.texts]), found.routing

    free, _ = logprobs(None, {"op": "gain", "experts": [0], "value": 1})
    banned, _ = logprobs(None, {"op": "ban", "experts": [BANNED]})
    parts = [{"role": ["first", "template"]}, {"role": "prompt"}, {"role": "answer"}]
    by_role, routing = logprobs(None, *({"op": "ban", "experts": [BANNED], "where": part} for part in parts))
    np.testing.assert_allclose(by_role, banned, rtol=1e-5)
    assert all((part.prompt.experts_LBTK != BANNED).all() for part in routing)
    assert np.abs(banned - free).max() > 1e-3
    frozen, _ = logprobs(model, {"op": "freeze"})
    np.testing.assert_allclose(frozen, free, rtol=1e-4)
    shuffled, _ = logprobs(None, {"op": "shuffle"})
    assert np.abs(shuffled - free).max() > 1e-3
    load = expert_load(model, tokenizer, mcqa, plan=Interventions.of({"op": "ban", "experts": [BANNED]}))
    assert all((counts[:, BANNED] == 0).all() for counts in load.counts.values())


@pytest.mark.usefixtures("quick_kernels")
def test_the_command_applies_rules_and_reports_them(tmp_path, model, tokenizer, mixed):
    """`freeze` uses the model without the adapter. A rule without a token gives a warning."""
    records = [record for record in mixed if record.choices is None]
    adapted = add_lora(model, LoraConfig(rank=2, alpha=4.0, targets=("q", "router", "w2")))
    _, params, _ = split_params(adapted)
    rng = np.random.default_rng(0)
    update_params(adapted, {name: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32) for name, x in params.items()})
    export_hf(model, tmp_path / "base", tokenizer_from=tokenizer.folder)
    save_adapter(adapted, tmp_path / "adapter")
    write_jsonl(tmp_path / "records.jsonl", records)
    rules = [{"op": "freeze", "layers": [0]}, {"op": "uniform", "where": {"positions": "500:"}}]
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    given = {"heldout": str(tmp_path / "records.jsonl"), "intervene": tmp_path / "rules.json"}
    with pytest.raises(BimedixError, match="has the op freeze, which uses the routes of the base of an adapter"):
        eval_run.run(eval_run.Config(model=str(tmp_path / "base"), **given), Console())
    written = io.StringIO()
    screen = Console(file=written, width=200)
    config = eval_run.Config(model=str(tmp_path / "base"), base="float32", adapter=tmp_path / "adapter", **given)
    result = eval_run.run(config, screen)
    assert "rule 1 was applied to no token" in written.getvalue()
    tokens = sum(len(encode_chat(tokenizer, record.conversations)[0]) for record in records)
    assert [part["tokens"] for part in result["intervene"]["rules"]] == [tokens, 0]
    assert result["intervene"]["rules"][0]["rule"] == rules[0]
    interventions = dataclasses.replace(Interventions.of(*rules), base=model)
    expected = heldout_loss(adapted, tokenizer, records, plan=interventions, record="choices")
    assert result["heldout"]["nats_per_token"] == pytest.approx(expected.nats_per_token, rel=1e-5)
    assert expected.routing is not None
    base = heldout_loss(model, tokenizer, records, plan=Interventions.of({"op": "uniform"}), record="choices").routing
    assert base is not None
    for number, routing in expected.routing.items():
        np.testing.assert_array_equal(routing.experts_LBTK[0], base[number].experts_LBTK[0])


@pytest.mark.usefixtures("quick_kernels")
@pytest.mark.parametrize("base", ["same", "other"])
def test_recorded_routes_replay_by_row_and_position(model, tokenizer, mixed, base):
    """With fields that differ at every token of every record, in any batch."""
    source = model if base == "same" else init_random(model.config, seed=9, std=0.3)
    recorded = heldout_loss(source, tokenizer, mixed, record="choices")
    assert recorded.routing is not None
    lengths = [part.experts_LBTK.shape[2] for part in recorded.routing.values()]
    shape = (2, len(mixed), max(lengths), 2)
    experts, weights = np.full(shape, -1, np.int32), np.full(shape, -1, np.float32)
    for number, part in recorded.routing.items():
        experts[:, number, : lengths[number]] = part.experts_LBTK[:, 0]
        weights[:, number, : lengths[number]] = part.weights_LBTK[:, 0]
    plan = RoutingPlan(experts_LBTK=jnp.asarray(experts), weights_LBTK=jnp.asarray(weights))
    replayed = heldout_loss(model, tokenizer, mixed, plan=plan, record="choices", batch_tokens=600)
    assert replayed.routing is not None
    for number, part in replayed.routing.items():
        np.testing.assert_array_equal(part.experts_LBTK, recorded.routing[number].experts_LBTK)
    if base == "same":
        assert replayed.nats_per_token == pytest.approx(recorded.nats_per_token, rel=1e-5)


def test_a_generation_replays_from_its_own_record(model):
    """Index 0 of the plan is the first token of a prompt, after its padding."""
    tokens, routing = generate(model, PROMPTS, 6, plan=RoutingPlan.noisy(model.config, 0.5, seed=1), record="choices")
    experts = jnp.asarray(np.where(routing.experts_LBTK == NO_EXPERT, -1, routing.experts_LBTK))
    plan = RoutingPlan(experts_LBTK=experts, weights_LBTK=jnp.asarray(routing.weights_LBTK))
    again, record = generate(model, PROMPTS, 6, plan=plan, record="choices")
    assert again == tokens
    np.testing.assert_array_equal(record.experts_LBTK, routing.experts_LBTK)
    assert tokens != generate(model, PROMPTS, 6)
    # noise follows the row and the position, not the batch
    one, _ = generate(model, PROMPTS[:1], 6, plan=RoutingPlan.noisy(model.config, 0.5, seed=1), record="choices")
    assert one[0] == tokens[0]


def test_every_field_acts_on_the_same_tokens_while_decoding(model):
    rng = np.random.default_rng(0)
    lead, experts = (2, len(PROMPTS), 5 + 6), model.config.router.num_experts
    plan = RoutingPlan(
        deviations_LBTE=jnp.asarray(rng.normal(0, 1, (*lead, experts)), jnp.float32),
        active_LBT=jnp.asarray(rng.integers(1, 3, lead), jnp.int32),
        map_LBTE=jnp.asarray(rng.permuted(np.tile(np.arange(experts), (*lead, 1)), axis=-1), jnp.int32),
        gain_LBTE=jnp.asarray(rng.uniform(0, 2, (*lead, experts)), jnp.float32),
    )
    tokens, routing = generate(model, PROMPTS, 6, plan=plan, record="choices")
    assert tokens != generate(model, PROMPTS, 6)
    ids_BT, segments_BT = pad_right([prompt + answer for prompt, answer in zip(PROMPTS, tokens, strict=True)], 5 + 6)
    alone = model(ids_BT, segments_BT, plan).routing
    np.testing.assert_array_equal(routing.experts_LBTK, alone.experts_LBTK)
    np.testing.assert_allclose(routing.weights_LBTK, alone.weights_LBTK, rtol=1e-3, atol=1e-5)


def test_a_plan_of_another_length_raises(model, tokenizer, mixed):
    plan = RoutingPlan(temperature_LBT=jnp.ones((2, 1, 7)))
    with pytest.raises(ValueError, match=r"temperature_LBT has shape \(2, 1, 7\)"):
        generate(model, PROMPTS, 9, plan=plan)
    with pytest.raises(ValueError, match=r"temperature_LBT has shape \(2, 1, 7\)"):
        heldout_loss(model, tokenizer, mixed, plan=plan)


def test_adapters_are_banned_with_their_expert(model):
    adapted = add_lora(model, LoraConfig(rank=2, alpha=4.0))
    _, params, _ = split_params(adapted)
    rng = np.random.default_rng(0)
    update_params(adapted, {name: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32) for name, x in params.items()})
    tokens, routing = generate(adapted, PROMPTS, 6, plan=ban(adapted), record="choices")
    assert (routing.experts_LBTK != BANNED).all()
    longest = jax.tree.map(lambda x: x[:, :1], routing)
    alone = adapted(np.array([PROMPTS[0] + tokens[0]]), plan=ban(adapted)).routing
    np.testing.assert_array_equal(longest.experts_LBTK, alone.experts_LBTK)
