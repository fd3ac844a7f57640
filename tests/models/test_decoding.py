"""Decoding layer by layer and expert by expert gives the tokens of the stacked model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bimedix_jax.adapters import add_lora
from bimedix_jax.generate import generate
from bimedix_jax.models import decoding
from bimedix_jax.models.attention import KVCache
from bimedix_jax.models.config import LoraConfig, MixtralConfig, RouterConfig
from bimedix_jax.models.mixtral import Mixtral, init_random
from bimedix_jax.quantise import quantise_base

CONFIG = MixtralConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    router=RouterConfig(num_experts=4, top_k=2),
    rope_theta=10_000.0,
    rms_norm_eps=1e-5,
    sliding_window=None,
    tie_embeddings=False,
    max_position_embeddings=64,
)
PROMPTS = [[5, 17, 3, 60, 2], [9], [44, 8, 8]]


def made(kind: str) -> Mixtral:
    if kind == "window":
        return init_random(dataclasses.replace(CONFIG, sliding_window=4), std=0.2)
    if kind == "tied":
        return init_random(dataclasses.replace(CONFIG, tie_embeddings=True), std=0.2)
    dtype = "bfloat16" if kind == "nf4" else kind
    model = init_random(CONFIG, dtype=dtype, std=0.2)
    return quantise_base(model) if kind == "nf4" else model


@pytest.mark.parametrize("kind", ["window", "tied"])
def test_tokens_are_those_of_the_stacked_model(kind, monkeypatch):
    model = made(kind)
    assert decoding.suits(model, len(PROMPTS))
    found = generate(model, PROMPTS, 9)
    monkeypatch.setattr(decoding, "suits", lambda *_: False)
    assert found == generate(model, PROMPTS, 9)


@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
def test_logits_are_those_of_the_stacked_model(kind):
    """16-bit sums are ordered differently, so logits agree to rounding."""
    model, tokens_BT = made(kind), jnp.asarray([[3, 1, 4, 1], [5, 9, 2, 6]])
    cache = model.hidden(tokens_BT, cache=KVCache.zeros(CONFIG, 2, 8, model.dtype)).cache
    assert cache is not None
    token_B = jnp.asarray([7, 50])
    out = model(token_B[:, None], cache=cache)
    graphs, parameters = decoding.separate(model)
    logits_BV, caches = decoding.step(graphs, parameters, token_B, decoding.separate_caches(cache))
    np.testing.assert_allclose(logits_BV, out.logits_BTV[:, 0], rtol=0.05, atol=0.05)
    assert int(caches.length) == 5
    assert out.cache is not None
    np.testing.assert_array_equal(caches.segment_ids_BS, out.cache.segment_ids_BS)


def test_separate_parameters_share_the_models_memory():
    model = init_random(dataclasses.replace(CONFIG, hidden_size=128, intermediate_size=128))
    _, parameters = decoding.separate(model)
    whole = model.layers.moe.w1.w.get_value()
    part = parameters.experts[1][3]["w1"]
    np.testing.assert_array_equal(part, whole[1, 3])
    first, size = whole.unsafe_buffer_pointer(), whole.nbytes
    assert first <= part.unsafe_buffer_pointer() < first + size
    assert model.layers is not None  # the model itself is as it was
    assert not any(x.size == 0 for x in jax.tree.leaves(nnx.state(model)))


def test_many_rows_or_branches_keep_to_the_loop(monkeypatch):
    model = made("float32")
    assert not decoding.suits(model, decoding.MAX_ROWS + 1)
    monkeypatch.setattr(decoding, "MAX_BRANCHES", 7)
    assert not decoding.suits(model, 1)


def test_adapters_keep_to_the_loop():
    assert not decoding.suits(add_lora(made("float32"), LoraConfig(4, 8.0)), 1)
