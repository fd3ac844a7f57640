"""config.json is read in both spellings, and every key that may change the mathematics is checked."""

import json
from pathlib import Path
from typing import Any

import pytest

from bimedix_jax.checkpoint.hf_config import read_config, read_dense_config, write_config
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.config import MixtralConfig, RouterConfig

OLD: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
"""The config.json of mistralai/Mixtral-8x7B-v0.1."""

EXPECTED = MixtralConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    router=RouterConfig(num_experts=8, top_k=2),
    rope_theta=1e6,
    rms_norm_eps=1e-5,
    sliding_window=None,
    tie_embeddings=False,
    max_position_embeddings=32768,
)


def folder_with(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def new_spelling() -> dict[str, Any]:
    new = {key: value for key, value in OLD.items() if key not in ("rope_theta", "torch_dtype")}
    return {
        **new,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "dtype": "bfloat16",
        "head_dim": None,
    }


def test_null_key_value_heads_mean_one_for_each_query_head(tmp_path: Path) -> None:
    found = read_config(folder_with(tmp_path, {**OLD, "num_key_value_heads": None}))
    assert found.num_kv_heads == found.num_heads


@pytest.mark.parametrize("config", [OLD, new_spelling(), {**OLD, **new_spelling()}], ids=["old", "new", "both"])
def test_old_and_new_spellings(tmp_path: Path, config: dict[str, Any]) -> None:
    assert read_config(folder_with(tmp_path, config)) == EXPECTED


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"surprise": 1}, "unknown key.*surprise.*--ignore-config-key surprise"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"router_jitter_noise": 0.01}, "router_jitter_noise"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scales its rotary"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "scales its rotary"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "two different values"),
        ({"rope_parameters": "default?"}, "scales its rotary"),
        ({"hidden_size": None}, "hidden_size = None, but it should be a valid integer"),
        ({"num_local_experts": "8"}, "num_local_experts = '8', but it should be a valid integer"),
        ({"num_key_value_heads": 7}, "multiple"),
        ({"num_experts_per_tok": 9}, "top_k"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"model_type": "llama"}, "bimedix upcycle"),
        ({"model_type": "gpt2"}, "model_type"),
    ],
)
def test_unsupported_values_raise(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(BimedixError, match=why):
        read_config(folder_with(tmp_path, {**OLD, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "swish"},
        {"attention_bias": None, "mlp_bias": None, "attention_dropout": None, "router_jitter_noise": None},
        {"layer_types": ["full_attention"] * 32},
        {"use_sliding_window": False},
        {"quantization_config": {}},
        {"quantization_config": None},
        {"quantization_config": {"load_in_4bit": False, "load_in_8bit": False, "quant_method": "bitsandbytes"}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": {}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}},
        {"partial_rotary_factor": 1.0},
        {"tie_word_embeddings": None},
        {"an_unknown_key": None},
        {"temperature": 0.7, "top_k": 50, "do_sample": True, "max_length": 20, "torchscript": False},
    ],
)
def test_values_that_change_nothing_are_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert read_config(folder_with(tmp_path, {**OLD, **changes})) == EXPECTED


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers of the type sliding_attention"),
        ({"layer_types": ["full_attention"], "sliding_window": 8}, "layers of the type full_attention"),
        ({"use_sliding_window": True}, "use_sliding_window True, which contradicts"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "needs low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor to 0\.5"),
        ({"norm_topk_prob": False}, "norm_topk_prob to False"),
    ],
)
def test_values_that_change_something_raise(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(BimedixError, match=why):
        read_config(folder_with(tmp_path, {**OLD, **changes}))


def test_one_option_ignores_all_keys(tmp_path: Path) -> None:
    bad = {"foo": 1, "bar": 2, "a b": 3, "e": 4, "hidden_act": "gelu", "attention_dropout": 0.1}
    folder = folder_with(tmp_path, {**OLD, **bad})
    with pytest.raises(BimedixError) as error:
        read_config(folder)
    assert str(error.value).endswith("--ignore-config-key 'a b' bar e foo hidden_act attention_dropout.")
    with pytest.raises(BimedixError) as error:
        read_config(folder, ("foo", "bar"))
    assert str(error.value).endswith("--ignore-config-key foo bar 'a b' e hidden_act attention_dropout.")
    assert read_config(folder, tuple(bad)) == EXPECTED


def test_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(OLD).encode())
    assert read_config(tmp_path) == EXPECTED


def test_keys_can_be_ignored_by_name(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {**OLD, "surprise": 1, "attention_dropout": 0.1})
    assert read_config(folder, ("surprise", "attention_dropout")) == EXPECTED
    with pytest.raises(BimedixError, match="has no key absent"):
        read_config(folder, ("absent",))
    with pytest.raises(BimedixError, match="cannot be ignored"):
        read_config(folder, ("surprise", "hidden_size"))


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"'])
def test_missing_or_invalid_json_raises(tmp_path: Path, text: str) -> None:
    with pytest.raises(BimedixError, match=r"has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BimedixError, match="JSON"):
        read_config(tmp_path)


def test_a_written_config_is_read_back(tmp_path: Path) -> None:
    write_config(tmp_path, EXPECTED, "bfloat16", {**OLD, "rope_scaling": {"type": "dropped"}})
    assert read_config(tmp_path) == EXPECTED
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in OLD} == OLD
    assert "rope_scaling" not in written


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    import transformers

    write_config(tmp_path, EXPECTED, "bfloat16", OLD)
    theirs = transformers.MixtralConfig.from_pretrained(tmp_path)
    assert theirs.to_dict()["rope_parameters"]["rope_theta"] == 1e6
    assert (theirs.num_local_experts, theirs.head_dim, theirs.intermediate_size) == (8, 128, 14336)
    assert str(theirs.dtype).removeprefix("torch.") == "bfloat16"


def test_dense_models(tmp_path: Path) -> None:
    dense = {key: value for key, value in OLD.items() if key not in ("num_local_experts", "num_experts_per_tok")}
    dense |= {"model_type": "llama", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    config = read_dense_config(folder_with(tmp_path, dense))
    assert config.with_router(RouterConfig(num_experts=8, top_k=2)) == EXPECTED
    with pytest.raises(BimedixError, match="attention_bias"):
        read_dense_config(folder_with(tmp_path, {**dense, "attention_bias": True}))
    with pytest.raises(BimedixError, match="dense"):
        read_dense_config(folder_with(tmp_path, OLD))
    del dense["num_key_value_heads"]
    assert read_dense_config(folder_with(tmp_path, dense)).num_kv_heads == 32
