"""Rotary scaling: Llama 3.1's equals transformers', through upcycling and export; what scales nothing is read."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import bimedix_jax as bmx
from bimedix_jax.checkpoint.hf_config import read_config
from bimedix_jax.checkpoint.rope import read_rope
from bimedix_jax.checkpoint.upcycle import UpcycleRecipe, upcycle
from bimedix_jax.models.attention import scaled
from bimedix_jax.models.config import RopeScaling

THETA = 10_000.0
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24)
BLOCK = {
    "rope_type": "llama3",
    "rope_theta": THETA,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
"""At this theta and context some of the 8 frequencies are kept, some divided and some interpolated."""
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 60))


def frequencies(block: dict[str, Any], width: int = 16) -> tuple[np.ndarray, float]:
    """transformers' rotary frequencies and attention factor for a block."""
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(head_dim=width, max_position_embeddings=64, rope_parameters=block)
    values, factor = ROPE_INIT_FUNCTIONS[block["rope_type"]](config, device=None)
    return values.numpy(), factor


def plain(width: int = 16) -> np.ndarray:
    return THETA ** (-np.arange(0, width, 2) / width)


def test_llama3_frequencies_equal_transformers() -> None:
    theirs, factor = frequencies(BLOCK)
    ours = np.asarray(scaled(jnp.asarray(plain(), jnp.float32), SCALING))
    assert factor == 1
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert len({*np.round(ours / plain(), 3)}) > 2  # kept, interpolated and divided ones


def test_an_upcycled_llama_3_equals_the_dense_one_here_and_in_transformers(tmp_path: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        rope_parameters=dict(BLOCK),
    )
    dense = transformers.LlamaForCausalLM(config)
    dense.save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "mixture", UpcycleRecipe(experts=2, top_k=1))

    def logits(model: Any) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(TOKENS)).logits.numpy()

    expected = logits(dense)
    model = bmx.load(tmp_path / "mixture", base="float32")
    assert model.config.rope_scaling == SCALING
    bmx.export_hf(model, tmp_path / "exported")
    found = {"ours": np.asarray(model(TOKENS).logits_BTV)}
    for name in ("mixture", "exported"):
        theirs = transformers.MixtralForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        rope = theirs.config.rope_parameters or {}
        assert {key: rope[key] for key in BLOCK} == BLOCK
        found[name] = logits(theirs)
    bmx.save(model, tmp_path / "native")
    again = bmx.load(tmp_path / "native")
    assert again.config == model.config
    for name, value in found.items():
        np.testing.assert_allclose(value, expected, atol=1e-4 * np.abs(expected).max(), err_msg=name)
    rope = {"rope_type": "default", "rope_theta": THETA}
    unscaled = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config.to_dict(), "rope_parameters": rope}))
    unscaled.load_state_dict(dense.state_dict())
    assert np.abs(logits(unscaled) - expected).max() > 1e-2 * np.abs(expected).max()  # the scaling matters here


@pytest.mark.parametrize("spelling", ["rope_scaling", "type", "rope_parameters", "both"])
def test_llama3_is_read_in_every_spelling(tmp_path: Path, spelling: str) -> None:
    base = json.loads(MIXTRAL)
    block = {key: value for key, value in BLOCK.items() if key != "rope_theta"}
    if spelling == "type":
        block = {"type": "llama3", **{key: value for key, value in block.items() if key != "rope_type"}}
    if spelling in ("rope_scaling", "type", "both"):
        base |= {"rope_theta": THETA, "rope_scaling": block}
    if spelling in ("rope_parameters", "both"):
        base["rope_parameters"] = BLOCK
    (tmp_path / "config.json").write_text(json.dumps(base))
    config = read_config(tmp_path)
    assert (config.rope_theta, config.rope_scaling) == (THETA, SCALING)


MIXTRAL = """{"model_type": "mixtral", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 40,
"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
"num_local_experts": 2, "num_experts_per_tok": 1}"""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
EIGHT = [1.0] * 8


def read(block: Any) -> Any:
    info: Any = SimpleNamespace(field_name="rope_scaling")
    return read_rope(block, info)


@pytest.mark.parametrize(
    "block",
    [
        {"rope_type": "linear", "factor": 1.0},
        {"rope_type": "linear", "factor": 1, "partial_rotary_factor": 1.0},
        {"rope_type": "dynamic", "factor": 1.0},
        {"rope_type": "llama3", "factor": 1.0, **LLAMA3},
        {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 16, "beta_fast": 30.0},
        {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 16, "attention_factor": 1.0},
        {
            "rope_type": "longrope",
            "factor": 1.0,
            "original_max_position_embeddings": 16,
            "short_factor": EIGHT,
            "long_factor": EIGHT,
        },
    ],
)
def test_blocks_that_scale_nothing_are_read_and_do_nothing_in_transformers(block: dict[str, Any]) -> None:
    assert read(block).scaling is None
    assert read({key if key != "rope_type" else "type": value for key, value in block.items()}).scaling is None
    theirs, factor = frequencies({**block, "rope_theta": THETA})
    assert factor == 1
    np.testing.assert_allclose(theirs, plain(), rtol=1e-6)


@pytest.mark.parametrize("block", [None, {}, "default", {"type": None}, {"rope_type": "default", "factor": 1.0}])
def test_empty_and_default_blocks_scale_nothing(block: Any) -> None:
    found = read(block)
    assert found is None or (found.theta, found.scaling) == (None, None)


@pytest.mark.parametrize(
    ("block", "why"),
    [
        ({"rope_type": "linear", "factor": 2.0}, "scales its rotary embeddings .rope_scaling: 'linear', factor 2.0"),
        ({"rope_type": "linear"}, "scales its rotary"),
        ({"rope_type": "default", "factor": 2.0}, "scales its rotary"),
        ({"rope_type": "yarn", "factor": 1.0, "attention_factor": 1.2}, "scales its rotary"),
        ({"rope_type": "longrope", "factor": 1.0, "short_factor": [1.0, 1.1]}, "scales its rotary"),
        ({"rope_type": "surprise", "factor": 1.0}, "scales its rotary"),
        ({"rope_type": "linear", "factor": True}, "scales its rotary"),
        ({"rope_type": ["linear"], "factor": 1.0}, "scales its rotary"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "rotates only a part of each head"),
        ({"rope_type": "llama3", "factor": 8.0}, "needs low_freq_factor"),
        ({"rope_type": "llama3", "factor": "8", **LLAMA3}, "needs factor, a positive number"),
        ({"rope_type": "llama3", "factor": 8.0, **LLAMA3, "surprise": 1}, "unknown key.s. .* surprise"),
        (
            {"rope_type": "llama3", "factor": 8.0, **LLAMA3, "low_freq_factor": 5.0},
            "low_freq_factor < high_freq_factor",
        ),
        ({"rope_type": "llama3", "factor": 8.0, **LLAMA3, "original_max_position_embeddings": 16.5}, "whole number"),
        ({"rope_theta": "x"}, "needs rope_theta, a positive number"),
    ],
)
def test_other_blocks_raise(block: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read(block)
