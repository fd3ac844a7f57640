"""Coalitions of base and tuned model against models that are built for each of them, and the split of the gain."""

import dataclasses
import io
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from tiny import TINY

from bimedix_jax import cli
from bimedix_jax.adapters import add_lora, linears
from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.checkpoint.store import save_adapter
from bimedix_jax.commands import eval_run, routes_replay
from bimedix_jax.data.records import Record, conversation, write_jsonl
from bimedix_jax.errors import BimedixError
from bimedix_jax.inference import scoring
from bimedix_jax.inference.planning import Source
from bimedix_jax.inference.scoring import score
from bimedix_jax.kernels import backends
from bimedix_jax.models.config import LoraConfig, RouterConfig
from bimedix_jax.models.init import init_random, with_router
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import Routing, RoutingPlan
from bimedix_jax.quantise import quantise_base
from bimedix_jax.routing import shapley
from bimedix_jax.routing.attribution import attribution, report
from bimedix_jax.routing.coalitions import ATTENTION, EXPERTS, ROUTER, ROUTES, Pair, Routes, factor_of, strings
from bimedix_jax.routing.replay import Players, Replayed, replay
from bimedix_jax.routing.sequences import Sequences

TARGETS = ("q", "k", "v", "o", "w1", "w2", "w3", "router", "lm_head")


@pytest.fixture(autouse=True)
def quick_kernels():
    """Kernels that compile fast; what they compute is tested elsewhere."""
    with backends.use(expert_mlp="composed", grouped_matmul="ragged_dot"):
        yield


def adapted(base: Mixtral, targets: tuple[str, ...] = TARGETS, size: float = 0.3, **options) -> Mixtral:
    """The base with adapters that are not zero."""
    model = add_lora(base, LoraConfig(rank=2, alpha=2.0, targets=targets, **options), seed=1)
    for number, layer in enumerate(linears(model).values()):
        if layer.lora is not None:
            b = layer.lora.b
            b.set_value(size * jax.random.normal(jax.random.key(number), b.get_value().shape))
    return model


def sequences(count: int = 24) -> Sequences:
    """Half English, half Arabic, of different lengths."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 300, length).astype(np.int32) for length in rng.integers(5, 14, count)]
    answer = [np.arange(len(row)) >= 3 for row in ids]
    sources = [Source(f"r{row}", ("en", "ar")[row % 2], ("qa", "chat")[row % 4 // 2]) for row in range(count)]
    return Sequences(ids=ids, answer=answer, sources=sources)


@pytest.fixture(scope="module")
def pair() -> Pair:
    base = init_random(TINY, seed=3, std=0.3)
    return Pair.of(base, adapted(base))


@pytest.fixture(scope="module")
def measured(pair: Pair) -> Replayed:
    with backends.use(expert_mlp="composed", grouped_matmul="ragged_dot"):
        return replay(pair, sequences())


def nll(model: Mixtral, text: Sequences, plan: RoutingPlan | None = None) -> np.ndarray:
    """[N]: what `bimedix eval run` sums, record by record."""
    found = {row: -logprobs_T for row, logprobs_T, _ in score(model, text.ids, text.answer, plan)}
    return np.concatenate([found[row][text.answer[row]] for row in range(len(text.ids))])


def routes_plan(model: Mixtral, text: Sequences) -> RoutingPlan:
    """The model's own routes as a plan by record and position."""
    config, longest = model.config, max(text.lengths)
    shape = (config.num_layers, len(text.ids), longest, config.router.top_k)
    experts, weights = np.full(shape, -1, np.int32), np.full(shape, -1, np.float32)
    for row, _, routing in score(model, text.ids, text.answer, record="choices"):
        assert routing is not None
        span = slice(0, len(text.ids[row]))
        experts[:, row, span], weights[:, row, span] = routing.experts_LBTK[:, 0], routing.weights_LBTK[:, 0]
    return RoutingPlan(experts_LBTK=jnp.asarray(experts), weights_LBTK=jnp.asarray(weights))


def hybrid(pair: Pair, members: list[str]) -> Mixtral:
    """A model with the adapters of these factors only."""
    model = nnx.merge(*nnx.split(pair.tuned), copy=True)
    for path, layer in linears(model).items():
        if layer.lora is not None and factor_of(path) not in members:
            layer.lora = None
    return model


def test_all_coalitions_equal_separate_models_under_a_plan(pair: Pair, measured: Replayed) -> None:
    text = sequences()
    plans = {name: routes_plan(model, text) for name, model in (("base", pair.base), ("tuned", pair.tuned))}
    assert len(measured.game.coalitions) == 8
    for row, coalition in enumerate(measured.game.coalitions):
        members = measured.game.members(coalition)
        expected_N = nll(hybrid(pair, members), text, plans["tuned" if ROUTES in members else "base"])
        np.testing.assert_allclose(measured.nll_CN[row], expected_N, atol=1e-5)
        np.testing.assert_allclose(measured.nll_CN[row].mean(), expected_N.mean(), atol=1e-6)
    assert len({round(nll_N.mean(), 4) for nll_N in measured.nll_CN}) == 8, "all parts matter"


@pytest.mark.parametrize("variant", ["softmax_topk", "sigmoid_bias"])
def test_every_router_variant_is_split_like_separate_models(variant: str) -> None:
    """The other variants than that of the pair above, with a state where they have one."""
    base = with_router(init_random(TINY, seed=3, std=0.3), RouterConfig(num_experts=4, top_k=2, variant=variant))
    if (state := base.layers.moe.state) is not None:
        state.set_value(0.2 * jax.random.normal(jax.random.key(5), state.get_value().shape))
    pair = Pair.of(base, adapted(base))
    test_all_coalitions_equal_separate_models_under_a_plan(pair, replay(pair, sequences()))


def test_the_ends_are_the_models_themselves(pair: Pair, measured: Replayed) -> None:
    text = sequences()
    for row, model in ((0, pair.base), (-1, pair.tuned)):
        np.testing.assert_allclose(measured.nll_CN[row], nll(model, text), atol=1e-5)
        np.testing.assert_array_equal(measured.ends_2N[row], nll(model, text))
    assert (measured.changed_RL > 0).any()


def test_replayed_own_routes_change_no_logit(pair: Pair) -> None:
    tokens_BT = np.asarray(np.random.default_rng(0).integers(1, 300, (2, 12)))
    out = pair.tuned(tokens_BT)
    plan = RoutingPlan(experts_LBTK=out.routing.experts_LBTK, weights_LBTK=out.routing.weights_LBTK)
    np.testing.assert_allclose(pair.tuned(tokens_BT, plan=plan).logits_BTV, out.logits_BTV, atol=1e-6)


def test_parts_add_up_to_the_gain_in_every_group(measured: Replayed) -> None:
    text = sequences()
    found = report(measured, text)
    splits = [found, *found["groups"].values()]
    assert sorted(found["groups"]) == ["ar", "ar/chat", "ar/qa", "en", "en/chat", "en/qa"]
    for split in splits:
        nats = {tuple(row["tuned"]): row["nats"] for row in split["values"]}
        assert split["gain"] == pytest.approx(nats[()] - nats[tuple(found["players"])], rel=1e-12)
        assert sum(split["shapley"].values()) == pytest.approx(split["gain"], rel=1e-9)
        assert split["sum_error"] < 1e-9
        assert split["endpoint_error"] < 1e-6
        for name, (least, most) in split["range_over_orders"].items():
            assert least <= split["shapley"][name] <= most
    low, high = found["groups"]["ar"]["intervals"]["experts"]
    assert low < found["groups"]["ar"]["shapley"]["experts"] < high
    assert np.isnan(found["groups"]["ar/qa"]["intervals"]["experts"]).all(), "six records have no interval"
    assert found["order_dependent"] == bool(found["why"])
    assert 0 < found["flips"]["sets_changed"] <= 1


def test_no_coalition_compiles_a_program_of_its_own(pair: Pair, measured: Replayed) -> None:
    compiled: Any = scoring._logprobs_at
    before = compiled._cache_size()
    replay(pair, sequences())
    assert compiled._cache_size() == before


def test_split_gates_cross_sets_and_weights() -> None:
    """Sets of the one model with the weights that the other's router gives them, here in layer 0 only."""
    router = RouterConfig(num_experts=4, top_k=2, variant="softmax_topk")
    base = init_random(dataclasses.replace(TINY, router=router), seed=3, std=0.3)
    pair, text = Pair.of(base, adapted(base, ("router",))), sequences()
    found = replay(pair, text, Players(split_gates=True, layers=2))
    assert len(found.game.coalitions) == 256
    values = {tuple(found.game.members(c)): found.nll_CN[row] for row, c in enumerate(found.game.coalitions)}
    np.testing.assert_array_equal(values[()], values["attention 0:1", "experts 0:1"])
    own, other = routes_plan(pair.base, text), routes_plan(pair.tuned, text)
    assert other.experts_LBTK is not None
    assert own.experts_LBTK is not None
    assert own.weights_LBTK is not None
    first_L = np.array([True, False]).reshape(2, 1, 1, 1)
    crossed = RoutingPlan(
        experts_LBTK=jnp.where(first_L, other.experts_LBTK, own.experts_LBTK),
        weights_LBTK=jnp.where(first_L, -1.0, own.weights_LBTK),  # those of the base model's router
    )
    np.testing.assert_allclose(values["sets 0:1",], nll(pair.base, text, crossed), atol=1e-5)
    assert not np.allclose(values["sets 0:1",], values["sets 0:1", "weights 0:1"])


def test_live_exchanges_the_matrix_of_the_router(pair: Pair) -> None:
    text = sequences()
    found = replay(pair, text, Players(live=True))
    for members in ([ROUTER], [EXPERTS, ROUTER], [ATTENTION, EXPERTS]):
        row = next(row for row, c in enumerate(found.game.coalitions) if found.game.members(c) == members)
        np.testing.assert_allclose(found.nll_CN[row], nll(hybrid(pair, members), text), atol=1e-5)
    other = Pair.of(with_router(pair.base, RouterConfig(num_experts=4, top_k=2, variant="sigmoid_bias")), pair.tuned)
    with pytest.raises(BimedixError, match="another router variant than the base"):
        replay(other, text, Players(live=True))
    with pytest.raises(BimedixError, match="no gates to split"):
        replay(pair, text, Players(live=True, split_gates=True))


def test_layers_have_players_of_their_own(pair: Pair, measured: Replayed) -> None:
    text = sequences()
    found = replay(pair, text, Players(layers=2))
    assert found.game.players == tuple(f"{f} {s}" for s in ("0:1", "1:2") for f in (ATTENTION, EXPERTS, ROUTES))
    assert len(found.game.coalitions) == 64
    everyone_R = np.ones(len(text.ids), bool)
    split = attribution(found, text, everyone_R)
    assert split.gain_3[0] == pytest.approx(attribution(measured, text, everyone_R).gain_3[0], abs=1e-9)
    assert split.sum_error < 1e-9
    both = [found.game.coalitions.index(1 << p | 1 << (p + 3)) for p in range(3)]
    whole = [measured.game.coalitions.index(1 << p) for p in range(3)]
    np.testing.assert_allclose(found.nll_CN[both], measured.nll_CN[whole], atol=1e-6)
    with pytest.raises(BimedixError, match="3 groups of layers do not fit 2 layers"):
        replay(pair, text, Players(layers=3))


def test_many_players_have_sampled_orders(pair: Pair, monkeypatch) -> None:
    text = sequences()
    monkeypatch.setattr(shapley, "EXACT_PLAYERS", 5)
    found = replay(pair, text, Players(layers=2), orders=6)
    split = attribution(found, text, np.ones(len(text.ids), bool))
    assert not found.game.exact
    assert split.error_P is not None
    assert split.error_P.shape == (6,)
    assert split.sum_error < 1e-9
    assert split.endpoint_error < 1e-6


def test_adapters_of_some_matrices_over_4_bits_are_mixed_by_layer() -> None:
    """An adapter of layer 1's expert 2 alone belongs to the experts of layer 1."""
    dense = init_random(dataclasses.replace(TINY, hidden_size=64, intermediate_size=64), std=0.3)
    base = quantise_base(dense)
    tuned = adapted(base, (r"layers.1.moe.experts.2.w1", "q"), train_router=True)
    tuned.layers.moe.router.w.set_value(tuned.layers.moe.router.w.get_value() + 0.1)
    pair, text = Pair.of(base, tuned), sequences()
    found = replay(pair, text, Players(layers=2))
    values = {tuple(found.game.members(c)): found.nll_CN[row] for row, c in enumerate(found.game.coalitions)}
    np.testing.assert_array_equal(values["experts 0:1",], values[()])
    assert not np.allclose(values["experts 1:2",], values[()])
    assert not np.allclose(values["attention 0:1",], values[()])
    np.testing.assert_allclose(values[()], found.ends_2N[0], atol=1e-5)
    np.testing.assert_allclose(values[found.game.players], found.ends_2N[1], atol=1e-5)
    with pytest.raises(BimedixError, match="differently; load both with the same base"):
        Pair.of(dense, tuned)


def record(number: int, language: str) -> Record:
    question, answer = ("What helps?", f"Rest, {number}.") if language == "en" else ("ما العلاج؟", f"الراحة {number}")
    return Record(
        id=f"{language}{number}",
        language=language,  # pyright: ignore
        kind="qa",
        source="test",
        licence="Apache-2.0",
        conversations=conversation(question, answer),
        provenance={"pair": f"p{number}"} if number < 2 else {},
    )


def test_the_commands_of_the_page_equal_eval_run(pair: Pair, tmp_path, monkeypatch, capsys, bytes_tokenizer) -> None:
    """They run as docs/routing.md has them, on few records."""
    export_hf(pair.base, tmp_path / "runs/noisy", tokenizer_from=bytes_tokenizer.folder)
    save_adapter(pair.tuned, tmp_path / "runs/tuned/adapter")
    write_jsonl(tmp_path / "few", [record(number, language) for number in range(11) for language in ("en", "ar")])
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).resolve().parents[2] / "docs/routing.md").read_text("utf-8")
    commands = [line.split()[1:] for line in page.splitlines() if line.startswith("bimedix routes replay")]
    results = []
    for words in commands:
        words = ["few" if word == "sample" else word for word in words if word != "--json"]
        assert cli.main([*words, "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert [len(x["players"]) for x in results] == [3, 4, 3, 6]
    found = results[0]
    assert {"shapley", "manifest"} <= json.loads(Path("split.json").read_text()).keys()
    for row, adapter in ((0, None), (-1, Path("runs/tuned/adapter"))):
        config = eval_run.Config(model="runs/noisy", base="float32", heldout="few", adapter=adapter)
        scored = eval_run.run(config, Console(file=io.StringIO()))["heldout"]["nats_per_token"]
        for name, split in found["groups"].items():
            assert split["values"][row]["nats"] == pytest.approx(scored[name], abs=1e-6)
    assert set(found["groups"]) == {"en", "en/qa", "ar", "ar/qa"}
    assert (found["records"], found["clusters"]) == (22, 20), "translations of each other are one cluster"
    assert all(x["endpoint_error"] < 1e-6 and x["sum_error"] < 1e-9 for x in results)
    assert all(value is not None for value in found["intervals"]["gain"])
    assert set(found["shapley"]) == {"attention", "experts", "routes"}
    assert len({x["manifest"]["hash"] for x in results}) == len(results)
    with np.load("nll.npz") as saved:
        assert saved["nll"].shape == (8, found["tokens"])
        assert saved["nll"].mean(1).tolist() == pytest.approx([row["nats"] for row in found["values"]])
        assert list(saved["tuned"][:2]) == ["", "attention"]
    table = routes_replay.split_table("all records", found)
    screen = io.StringIO()
    Console(file=screen, width=120).print(table)
    assert "all records: " in screen.getvalue()
    assert cli.main([*commands[0], "--json"]) == 1
    assert "split.json exists" in json.loads(capsys.readouterr().out)["error"]
    for words, message in (
        (["--out", "x.npz", "--tokens", "x.npz"], "give two names"),
        (["--batch-tokens", "0"], "--batch-tokens is 0"),
        (["--seed", "-1"], "--seed is -1; give at least 0"),
        (["--data", "runs"], "runs is a folder"),
    ):
        plain = ["routes", "replay", "--model", "runs/noisy", "--adapter", "runs/tuned/adapter", "--data", "few"]
        plain = [word for word in plain if "--data" not in words or word not in ("--data", "few")]
        assert cli.main([*plain, *words, "--json"]) != 0
        assert message in json.loads(capsys.readouterr().out)["error"]
    page = (Path(__file__).resolve().parents[2] / "docs/formats.md").read_text("utf-8")
    assert [key for key in found if f"`{key}`" not in page and f"`{key}." not in page and f"`{key}[" not in page] == []


def test_rounding_does_not_make_a_split_depend_on_the_order(measured: Replayed) -> None:
    split = attribution(measured, sequences(), np.ones(24, bool))
    steady = dataclasses.replace(
        split,
        least_P=np.array([-1e-7, 0.1, 0.1]),
        most_P=np.full(3, 0.2),
        endpoint_error=7e-8,
        interaction_X3=np.zeros((3, 3)),
    )
    assert steady.doubts(measured.game.players) == []
    assert dataclasses.replace(steady, endpoint_error=0.0).doubts(measured.game.players) != []


def test_rounding_of_another_program_is_no_route(pair: Pair) -> None:
    """Where the base model chooses alike in the program of the tuned model, it has the weights of that program."""
    experts_LBTK = jnp.array([[[[0, 1], [2, 3]]]])
    own = Routing(experts_LBTK, jnp.array([[[[0.5, 0.5], [0.75, 0.25]]]]), jnp.zeros((1, 1, 2, 4)))
    like = Routing(experts_LBTK.at[..., 1, 1].set(0), own.weights_LBTK + 1e-7, own.logits_LBTE + 1)
    found = Routes(own, own, pair).settled(like).base
    np.testing.assert_array_equal(found.experts_LBTK, own.experts_LBTK)
    np.testing.assert_array_equal(found.weights_LBTK[0, 0, 0], like.weights_LBTK[0, 0, 0])
    np.testing.assert_array_equal(found.weights_LBTK[0, 0, 1], own.weights_LBTK[0, 0, 1])
    np.testing.assert_array_equal(found.logits_LBTE[0, 0, :, 0], [1, 0])


def test_other_architectures_are_refused(pair: Pair) -> None:
    with pytest.raises(BimedixError, match="differ in architecture"):
        Pair.of(init_random(dataclasses.replace(TINY, num_layers=3)), pair.tuned)


def test_factors_cover_all_parameters(pair: Pair) -> None:
    found = {strings(one.path): factor_of(strings(one.path)) for one in pair.parameters}
    assert found["embed", "table"] == found["lm_head", "w"] == found["layers", "moe_norm", "scale"] == ATTENTION
    assert found["layers", "moe", "w2", "lora", "b"] == EXPERTS
    assert found["layers", "moe", "router", "lora", "a"] == ROUTER
    for size in itertools.product([False, True], repeat=2):
        state = pair.state(dict.fromkeys((ATTENTION, EXPERTS, ROUTER), np.array(size)))
        assert len(nnx.to_flat_state(state)) == len(pair.parameters)
