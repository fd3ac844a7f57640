"""Adapters: what they compute, what trains, how single matrices are targeted, and errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import GROUPED

from bimedix_jax.adapters import add_lora, coverage, has_lora, is_trainable, linears, matrix_names
from bimedix_jax.checkpoint.store import leaves_of, load_adapter, restore, save, save_adapter
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.config import (
    LORA_TARGETS,
    MIXTRAL_8X7B,
    LoraConfig,
    LoraOverride,
)
from bimedix_jax.models.init import init_random
from bimedix_jax.models.linear import with_dropout
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.quantise import quantise_base

EVERYTHING = LoraConfig(rank=3, alpha=6.0, targets=LORA_TARGETS)


@pytest.fixture(scope="module")
def model() -> Mixtral:
    return init_random(GROUPED, std=0.2)


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 53, (2, 12))


def run(model: Mixtral, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(model(tokens).logits_BTV)


def trained(model: Mixtral, seed: int = 0) -> Mixtral:
    """Sets random factors, as after training, in place."""
    random = np.random.default_rng(seed)
    for layer in linears(model).values():
        if layer.lora is not None:
            for factor in (layer.lora.a, layer.lora.b):
                factor.set_value(jnp.asarray(0.2 * random.standard_normal(factor.get_value().shape), jnp.float32))
    return model


def by_hand(model: Mixtral) -> Mixtral:
    """The model without adapters, with the deltas added to its weights matrix by matrix."""
    merged = init_random(model.config)
    for path, layer in linears(model).items():
        weight = np.array(layer.w.get_value()).reshape(-1, *layer.w.get_value().shape[-2:])
        if layer.lora is not None:
            a = np.asarray(layer.lora.a.get_value()).reshape(-1, *layer.lora.a.get_value().shape[-2:])
            b = np.asarray(layer.lora.b.get_value()).reshape(-1, *layer.lora.b.get_value().shape[-2:])
            for i, slot in enumerate(layer.lora.slots or range(len(weight))):
                weight[slot] += layer.lora.scale * a[i] @ b[i]
        linears(merged)[path].w.set_value(jnp.asarray(weight.reshape(layer.w.get_value().shape)))
    merged.embed, merged.norm = model.embed, model.norm
    merged.layers.attention_norm, merged.layers.moe_norm = model.layers.attention_norm, model.layers.moe_norm
    return merged


@pytest.mark.parametrize(
    "config",
    [
        EVERYTHING,
        LoraConfig(rank=3, alpha=6.0, targets=("lm_head",)),
        LoraConfig(rank=3, alpha=6.0, targets=(r"layers\.1\.moe\.experts\.2\.w[13]", "router")),
        LoraConfig(rank=3, alpha=6.0, targets=(r"layers\.0\..*", r".*\.experts\.3\.w2"), rank_stabilised=True),
        LoraConfig(
            rank=3,
            alpha=6.0,
            targets=("q", "w1", "w2"),
            overrides=(LoraOverride(target="q", rank=5), LoraOverride(target="w2", rank=2, alpha=9.0)),
        ),
    ],
    ids=["everything", "head", "experts of a layer", "one layer", "overrides"],
)
def test_adapters_equal_their_definition(model: Mixtral, tokens: np.ndarray, config: LoraConfig) -> None:
    adapted = trained(add_lora(model, config))
    ours, expected = run(adapted, tokens), run(by_hand(adapted), tokens)
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(ours - run(model, tokens)).max() > 1e-2


def test_patterns_choose_single_matrices(model: Mixtral) -> None:
    adapted = add_lora(
        model, LoraConfig(rank=2, alpha=4.0, targets=(r"layers\.1\.moe\.experts\.[02]\.w1", r"layers\.0\.attention\.."))
    )
    rows = {row.name: row for row in coverage(adapted).rows}
    w1 = adapted.layers.moe.w1.lora
    assert w1 is not None
    assert w1.slots == (4, 6)
    assert (rows["layers.moe.w1.w"].adapted, rows["layers.moe.w1.w"].matrices) == (2, 8)
    assert rows["layers.moe.w1.w"].trainable == 2 * 2 * (32 + 48)
    assert rows["layers.attention.o.w"].adapted == 1
    assert rows["layers.moe.w2.w"].rank is None


def test_a_pattern_for_all_is_the_name(model: Mixtral) -> None:
    named, matched = (
        add_lora(model, LoraConfig(rank=2, alpha=4.0, targets=(t,)))
        for t in ("w2", r"layers\.\d+\.moe\.experts\.\d+\.w2")
    )
    jax.tree.map(np.testing.assert_array_equal, leaves_of(named), leaves_of(matched))
    assert matrix_names(("layers", "moe", "w2"), (2, 4))[5] == "layers.1.moe.experts.1.w2"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(rank=2, alpha=4.0, targets=("q", r"layers\.7\..*")), r"Target layers.* matched no layer"),
        (
            LoraConfig(rank=2, alpha=4.0, targets=("q",), overrides=(LoraOverride(target="w1", rank=4),)),
            "override of w1 changes no adapter",
        ),
    ],
)
def test_a_target_without_match_raises(model: Mixtral, config: LoraConfig, message: str) -> None:
    with pytest.raises(BimedixError, match=message):
        add_lora(model, config)


def test_a_tied_head_cannot_be_a_target() -> None:
    with pytest.raises(BimedixError, match=r"lm_head matched no layer.*tied embeddings"):
        add_lora(Mixtral(dataclasses.replace(GROUPED, tie_embeddings=True)), EVERYTHING)


def test_a_fully_trained_router(model: Mixtral, tokens: np.ndarray) -> None:
    adapted = add_lora(
        init_random(GROUPED, dtype="bfloat16"), LoraConfig(rank=2, alpha=4.0, targets=("q",), train_router=True)
    )
    graph, params, frozen = nnx.split(adapted, is_trainable(adapted), ...)
    names = {".".join(map(str, path)): v for path, v in nnx.to_flat_state(params)}
    assert set(names) == {"layers.attention.q.lora.a", "layers.attention.q.lora.b", "layers.moe.router.w"}
    assert names["layers.moe.router.w"].get_value().dtype == jnp.float32, "bfloat16 swallows small updates"
    grads = jax.grad(lambda p: nnx.merge(graph, p, frozen)(tokens).logits_BTV.std())(params)
    assert np.abs(grads["layers"]["moe"]["router"]["w"].get_value()).max() > 0
    row = next(row for row in coverage(adapted).rows if row.name == "layers.moe.router.w")
    assert (row.trainable, row.bits, row.rank) == (row.parameters, 32, None)


def test_dropout_is_unbiased_and_off_outside_training(model: Mixtral, tokens: np.ndarray) -> None:
    config = LoraConfig(rank=4, alpha=8.0, targets=("lm_head",), dropout=0.5)
    adapted = trained(add_lora(model, config))
    plain = trained(add_lora(model, dataclasses.replace(config, dropout=0.0)))
    expected = run(plain, tokens)
    assert np.array_equal(run(adapted, tokens), expected)
    graph, state = nnx.split(adapted)

    @jax.jit
    def dropped(key: jax.Array) -> jax.Array:
        model = nnx.merge(graph, state)
        with_dropout(model, key)
        return model(tokens).logits_BTV

    draws = np.stack([dropped(key) for key in jax.random.split(jax.random.key(0), 400)])
    assert np.array_equal(draws[0], dropped(jax.random.split(jax.random.key(0), 400)[0]))
    error = np.abs(draws.mean(0) - expected) / np.maximum(draws.std(0), 1e-6)
    assert error.max() < 5 / 400**0.5
    assert draws.std(0).max() > 0.01


def test_dropout_differs_by_layer_and_expert_row(model: Mixtral, tokens: np.ndarray) -> None:
    adapted = trained(add_lora(model, LoraConfig(rank=4, alpha=8.0, targets=("q", "w1", "router"), dropout=0.3)))
    base = run(adapted, tokens)
    with_dropout(adapted, jax.random.key(1))
    assert adapted.layers.moe.w1.lora is not None
    assert adapted.layers.moe.w1.lora.key is not None
    assert adapted.layers.moe.w1.lora.key.get_value().shape == (2,)
    one = run(adapted, tokens)
    with_dropout(adapted, jax.random.key(2))
    assert not np.array_equal(one, base)
    assert not np.array_equal(one, run(adapted, tokens))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(
            rank=3,
            alpha=5.0,
            targets=("w1", r"layers\.1\..*", "lm_head"),
            rank_stabilised=True,
            dropout=0.1,
            overrides=(LoraOverride(target="w1", rank=2),),
        ),
        LoraConfig(rank=3, alpha=5.0, targets=("q",), train_router=True),
    ],
    ids=["some matrices", "router in full"],
)
def test_every_kind_of_adapter_is_kept(model: Mixtral, tokens: np.ndarray, tmp_path, config: LoraConfig) -> None:
    adapted = trained(add_lora(model, config))
    if config.train_router:
        adapted.layers.moe.router.w.set_value(adapted.layers.moe.router.w.get_value() * 1.5)
    save_adapter(adapted, tmp_path / "adapter")
    save(adapted, tmp_path / "whole")
    for kept in (load_adapter(model, tmp_path / "adapter"), restore(tmp_path / "whole")):
        assert kept.lora == config
        jax.tree.map(np.testing.assert_array_equal, leaves_of(kept), leaves_of(adapted))
        assert np.array_equal(run(kept, tokens), run(adapted, tokens))


def test_an_adapter_of_other_weights_raises(model: Mixtral, tmp_path) -> None:
    """Equal shapes do not make it the same base."""
    save_adapter(add_lora(model, EVERYTHING), tmp_path / "adapter")
    load_adapter(quantise_base(model), tmp_path / "adapter")
    with pytest.raises(BimedixError, match="another base of the same architecture"):
        load_adapter(init_random(GROUPED, seed=1, std=0.2), tmp_path / "adapter")
    rerouted = nnx.merge(*nnx.split(model), copy=True)
    rerouted.layers.moe.router.w.set_value(-model.layers.moe.router.w.get_value())
    with pytest.raises(BimedixError, match="its routers differ"):
        load_adapter(rerouted, tmp_path / "adapter")


def test_a_factor_that_is_not_finite_raises(model: Mixtral, tmp_path) -> None:
    adapted = add_lora(model, LoraConfig(rank=2, alpha=4.0, targets=("q",)))
    lora = adapted.layers.attention.q.lora
    assert lora is not None
    lora.b.set_value(lora.b.get_value().at[0, 0, 0].set(jnp.nan))
    save_adapter(adapted, tmp_path / "adapter")
    with pytest.raises(BimedixError, match=r"NaN or infinity in layers\.attention\.q\.lora\.b"):
        load_adapter(model, tmp_path / "adapter")


def test_new_adapters_change_nothing_and_only_they_train(model: Mixtral, tokens: np.ndarray) -> None:
    base = quantise_base(model)
    adapted = add_lora(base, LoraConfig(rank=4, alpha=8.0))
    assert has_lora(adapted)
    assert not has_lora(base)
    assert np.array_equal(run(adapted, tokens), run(base, tokens))
    graph, adapters, frozen = nnx.split(adapted, is_trainable(adapted), ...)
    grads = jax.jit(jax.grad(lambda a: nnx.merge(graph, a, frozen)(tokens).logits_BTV.std()))(adapters)
    flat = nnx.to_flat_state(grads)
    assert {path[-1] for path, _ in flat} == {"a", "b"}
    assert {path[-3] for path, _ in flat} == {"q", "k", "v", "w1", "w2", "w3", "router"}
    assert all(np.abs(v.get_value()).max() > 0 for path, v in flat if path[-1] == "b")


def test_initial_factors_depend_only_on_names(model: Mixtral) -> None:
    few = add_lora(model, LoraConfig(rank=4, alpha=8.0, targets=("w2", "q"))).layers.moe.w2.lora
    many = add_lora(model, LoraConfig(rank=4, alpha=8.0, targets=("q", "k", "w2"))).layers.moe.w2.lora
    assert few is not None
    assert many is not None
    assert np.array_equal(few.a.get_value(), many.a.get_value())


def test_coverage_of_the_papers_recipe() -> None:
    table = coverage(add_lora(quantise_base(Mixtral(MIXTRAL_8X7B)), LoraConfig(rank=128, alpha=64.0)))
    assert table.trainable_parameters == 1_904_246_784
    assert table.total_parameters == 46_702_792_704
    rows = {row.name: row for row in table.rows}
    assert rows["layers.moe.w1.w"].bits <= 4.13
    assert rows["layers.moe.router.w"].bits == 16
    assert rows["layers.moe.router.w"].full_rank
    assert not rows["layers.moe.w1.w"].full_rank
    assert rows["layers.attention.o.w"].rank is None


def test_adding_adapters_twice_raises(model: Mixtral) -> None:
    adapted = add_lora(model, LoraConfig(rank=2, alpha=2.0))
    with pytest.raises(BimedixError, match="already has adapters"):
        add_lora(adapted, LoraConfig(rank=2, alpha=2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"targets": ("q", "gate")}, "Unknown target gate"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": ("q", "q")}, "duplicates"),
        ({"targets": (r"layers\.(0",)}, "not a regular expression"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"train_router": True}, "router cannot be a target as well"),
        ({"overrides": (LoraOverride(target="q", rank=2), LoraOverride(target="q", rank=3))}, "names a target twice"),
    ],
)
def test_invalid_lora_configs_raise(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**{"rank": 4, "alpha": 4.0, **change})


def test_the_table_shows_partly_adapted_tensors(model: Mixtral) -> None:
    table = coverage(add_lora(model, LoraConfig(rank=2, alpha=4.0, targets=(r"layers\.1\..*\.w2", "q")))).table()
    assert str(table.caption).endswith("part: layers.moe.w2.w has 4 of 8 matrices adapted")


@pytest.mark.parametrize(
    ("stabilised", "scales"), [(False, (2.0, 1.2, 4.5)), (True, (12**0.5, 6 / 5**0.5, 9 / 2**0.5))]
)
def test_scales_are_alpha_over_rank_or_over_its_square_root(
    model: Mixtral, stabilised: bool, scales: tuple[float, ...]
) -> None:
    overrides = (LoraOverride(target="q", rank=5), LoraOverride(target="w2", rank=2, alpha=9.0))
    config = LoraConfig(rank=3, alpha=6.0, targets=("w1", "q", "w2"), rank_stabilised=stabilised, overrides=overrides)
    layers = linears(add_lora(model, config))
    found = {path[-1]: layer.lora.scale for path, layer in layers.items() if layer.lora is not None}
    assert [found[name] for name in config.targets] == pytest.approx(scales)
