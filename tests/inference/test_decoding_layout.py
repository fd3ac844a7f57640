"""Decoding with unstacked layers and experts gives the tokens of the stacked model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import GROUPED, tiny

from bimedix_jax.adapters import add_lora, linears
from bimedix_jax.inference import decoding_layout
from bimedix_jax.inference.generate import generate
from bimedix_jax.kernels import backends
from bimedix_jax.kernels.by_output import ByOutput
from bimedix_jax.kernels.expert_mlp import few_rows
from bimedix_jax.models.attention import KVCache
from bimedix_jax.models.config import LoraConfig
from bimedix_jax.models.init import init_random
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import RoutingPlan
from bimedix_jax.quantise import quantise_base
from bimedix_jax.training.state import split_params, update_params

DEFAULT_KERNELS = True
CONFIG = tiny(GROUPED, hidden_size=64, intermediate_size=64)
PROMPTS = [[5, 17, 3, 60, 2], [9], [44, 8, 8]]


def made(kind: str) -> Mixtral:
    if kind == "window":
        return init_random(dataclasses.replace(CONFIG, sliding_window=4), std=0.2)
    if kind == "tied":
        return init_random(dataclasses.replace(CONFIG, tie_embeddings=True), std=0.2)
    if kind.startswith("adapters"):
        targets = (
            ("q", r"layers\.1\.moe\.experts\.[13]\.w[12]") if kind == "adapters on some" else ("q", "w2", "router")
        )
        model = add_lora(init_random(CONFIG, std=0.2), LoraConfig(rank=4, alpha=8.0, targets=targets))
        draw = np.random.default_rng(0)
        _, params, _ = split_params(model)
        values = {name: jnp.asarray(draw.normal(0, 0.3, x.shape), jnp.float32) for name, x in params.items()}
        update_params(model, values)
        return model
    dtype = "bfloat16" if kind == "nf4" else kind
    model = init_random(CONFIG, dtype=dtype, std=0.2)
    return quantise_base(model) if kind == "nf4" else model


@pytest.mark.parametrize("kind", ["window", "tied", "adapters", "adapters on some"])
def test_tokens_are_those_of_the_stacked_model(kind, monkeypatch):
    model = made(kind)
    plan = RoutingPlan.noisy(model.config, 0.3) if kind == "window" else None
    assert decoding_layout.is_faster(model, len(PROMPTS))
    with backends.recording() as picked:
        found = generate(model, PROMPTS, 9, plan=plan)
    assert "few_rows" in picked.to_dict()["expert_mlp"]
    assert "unrolled" in picked.to_dict()["layer_scan"]
    monkeypatch.setattr(decoding_layout, "is_faster", lambda *_: False)
    assert found == generate(model, PROMPTS, 9, plan=plan)


@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
def test_logits_are_those_of_the_stacked_model(kind):
    """16-bit sums are ordered differently, so logits agree to rounding. Both models round at the same places."""
    model, tokens_BT = made(kind), jnp.asarray([[3, 1, 4, 1], [5, 9, 2, 6]])
    cache = model.hidden(tokens_BT, cache=KVCache.zeros(CONFIG, 2, 8, model.dtype)).cache
    assert cache is not None
    token_B1 = jnp.asarray([[7], [50]])
    with backends.use(expert_mlp="composed"):
        out = model(token_B1, cache=cache)
    other = decoding_layout.unstack_model(model)(token_B1, cache=decoding_layout.unstack_cache(cache))
    np.testing.assert_allclose(other.logits_BTV, out.logits_BTV, rtol=0.05, atol=0.05)
    assert out.cache is not None
    assert other.cache is not None
    assert int(other.cache.length) == 5
    np.testing.assert_array_equal(other.cache.segment_ids_BS, out.cache.segment_ids_BS)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_matrices_stored_by_output_compute_the_same(rows, monkeypatch):
    """Also where pairs of a row and an expert run one by one, and where they do not (5 rows, as set here)."""
    monkeypatch.setattr(few_rows, "PAIRS_PER_EXPERT", 4 * CONFIG.router.top_k / CONFIG.router.num_experts)
    model = add_lora(made("bfloat16"), LoraConfig(rank=4, alpha=8.0, targets=("q", "w2")))
    cache = model.hidden(jnp.ones((rows, 4), jnp.int32), cache=KVCache.zeros(CONFIG, rows, 8, model.dtype)).cache
    assert cache is not None
    token_B1 = jnp.arange(3, 3 + rows)[:, None]
    unstacked = decoding_layout.unstack_model(model)
    expected = unstacked(token_B1, cache=decoding_layout.unstack_cache(cache)).logits_BTV
    decoding_layout.store_by_output(unstacked)
    assert isinstance(unstacked.layers.moe.w1.w.get_value()[1][0], ByOutput)
    found = unstacked(token_B1, cache=decoding_layout.unstack_cache(cache)).logits_BTV
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.05)


def test_many_steps_of_few_rows_run_by_output(monkeypatch):
    """And fewer steps, more rows, or larger models do not; the tokens are the same."""
    model, stored = made("bfloat16"), []
    store = decoding_layout.store_by_output
    monkeypatch.setattr(decoding_layout, "store_by_output", lambda model: (stored.append(1), store(model)))
    monkeypatch.setattr(decoding_layout, "STEPS_BY_OUTPUT", 5)
    few = generate(model, PROMPTS[:1], 4)
    assert not stored
    assert generate(model, PROMPTS[:1], 9)[0][:4] == few[0]
    assert stored
    monkeypatch.setattr(decoding_layout, "MOST_BY_OUTPUT", 1000)
    whole = decoding_layout.unstack_model(model)
    store(whole)
    assert not isinstance(whole.layers.moe.w1.w.get_value()[1][0], ByOutput)


def test_factors_in_the_dtype_of_the_computation_compute_the_same():
    """What a GPU decodes: A and scale * B, which would otherwise be cast for each token."""
    model = made("adapters on some")
    before = np.asarray(model(np.array([PROMPTS[0]])).logits_BTV)
    decoding_layout.store_factors(model)
    assert {layer.lora.scale for layer in linears(model).values() if layer.lora is not None} == {1.0}
    np.testing.assert_allclose(model(np.array([PROMPTS[0]])).logits_BTV, before, atol=1e-4)
    model.dtype = "bfloat16"
    decoding_layout.store_factors(model)
    assert {layer.lora.b[...].dtype for layer in linears(model).values() if layer.lora is not None} == {
        jnp.dtype("bfloat16")
    }


def test_generation_casts_factors_once_in_a_copy(monkeypatch):
    """As on a GPU. The model itself is unchanged."""
    model = made("adapters")
    monkeypatch.setattr(decoding_layout, "is_faster", lambda *_: False)
    expected, before = generate(model, PROMPTS, 5), jax.tree.leaves(nnx.state(model))
    monkeypatch.setattr(decoding_layout, "casts_factors", lambda model: model.lora is not None)
    assert generate(model, PROMPTS, 5) == expected
    assert {lora.scale for lora in decoding_layout.adapters_of(model)} == {2.0}
    assert all(one is other for one, other in zip(jax.tree.leaves(nnx.state(model)), before, strict=True))


def test_factors_are_cast_where_a_step_would_cast_them():
    model = made("adapters")
    assert not decoding_layout.casts_factors(model), "on a CPU"
    with backends.use("gpu"):
        assert decoding_layout.casts_factors(model)
        assert not decoding_layout.casts_factors(decoding_layout.with_stored_factors(model))
        assert not decoding_layout.casts_factors(made("float32")), "without adapters"


def test_unstacked_parameters_share_the_models_memory():
    model = init_random(dataclasses.replace(CONFIG, hidden_size=128, intermediate_size=128))
    whole = model.layers.moe.w1.w.get_value()
    parts: Any = decoding_layout.unstack_model(model).layers.moe.w1.w.get_value()
    part = parts[1][3]
    np.testing.assert_array_equal(part, whole[1, 3])
    first, size = whole.unsafe_buffer_pointer(), whole.nbytes
    assert first <= part.unsafe_buffer_pointer() < first + size
    assert isinstance(model.layers.moe.w1.w.get_value(), jax.Array), "the model itself is unchanged"
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(nnx.state(model)))


def test_many_rows_or_branches_use_the_loop(monkeypatch):
    model = made("float32")
    assert not decoding_layout.is_faster(model, few_rows.MAX_ROWS + 1)
    monkeypatch.setattr(decoding_layout, "MAX_BRANCHES", 7)
    assert not decoding_layout.is_faster(model, 1)
