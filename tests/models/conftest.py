"""Random Hugging Face Mixtrals as the reference, and our models with the same weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tiny import GROUPED

from bimedix_jax.models.config import MixtralConfig, RouterConfig
from bimedix_jax.models.mixtral import Mixtral


def hugging_face(config: MixtralConfig, seed: int = 0) -> transformers.MixtralForCausalLM:
    """A random float32 model of this architecture, with weights large enough for clear routing decisions."""
    torch.manual_seed(seed)
    # torch's grouped_mm rejects odd widths; the constructor accepts both names but does not declare them
    eager: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    hf_config = transformers.MixtralConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_local_experts=config.router.num_experts,
        num_experts_per_tok=config.router.top_k,
        rope_parameters={"rope_theta": config.rope_theta, "rope_type": "default"},
        rms_norm_eps=config.rms_norm_eps,
        sliding_window=config.sliding_window,
        tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=config.max_position_embeddings,
        initializer_range=0.15,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        **eager,
    )
    return transformers.MixtralForCausalLM(hf_config).eval()


def tree_of(hf: transformers.MixtralForCausalLM, of: Callable[[Any], torch.Tensor | None]) -> dict[str, np.ndarray]:
    """`of(parameter)`, such as the value or the gradient, of every weight, with our names and shapes."""
    layers, width = hf.model.layers, hf.config.intermediate_size

    def array(parameter: Any) -> np.ndarray:
        value = of(parameter)
        return (torch.zeros_like(parameter) if value is None else value).detach().numpy()

    def stack(pick: Callable[[Any], Any]) -> np.ndarray:
        return np.stack([array(pick(layer)) for layer in layers])

    gate_up = stack(lambda layer: layer.mlp.experts.gate_up_proj)
    tree = {
        "embed.table": array(hf.model.embed_tokens.weight),
        "norm.scale": array(hf.model.norm.weight),
        "layers.attention_norm.scale": stack(lambda layer: layer.input_layernorm.weight),
        "layers.moe_norm.scale": stack(lambda layer: layer.post_attention_layernorm.weight),
        "layers.moe.router.w": stack(lambda layer: layer.mlp.gate.weight).swapaxes(-1, -2),
        "layers.moe.w1.w": gate_up[:, :, :width].swapaxes(-1, -2),
        "layers.moe.w3.w": gate_up[:, :, width:].swapaxes(-1, -2),
        "layers.moe.w2.w": stack(lambda layer: layer.mlp.experts.down_proj).swapaxes(-1, -2),
    }
    for name in "qkvo":
        weight = stack(lambda layer, name=name: getattr(layer.self_attn, f"{name}_proj").weight)
        tree[f"layers.attention.{name}.w"] = weight.swapaxes(-1, -2)
    if not hf.config.tie_word_embeddings:
        tree["lm_head.w"] = array(hf.lm_head.weight).T
    return tree


def ours(config: MixtralConfig, tree: dict[str, np.ndarray]) -> Mixtral:
    """Our model with these weights."""
    from flax import nnx

    model = Mixtral(config, "float32")
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = tree.pop(".".join(map(str, path)))
        assert value.shape == variable.get_value().shape, (path, value.shape)
        variable.set_value(jnp.asarray(value))
    assert not tree, f"left over: {list(tree)}"
    return model


@dataclasses.dataclass(frozen=True)
class Pair:
    """The reference and our model, with the same weights."""

    config: MixtralConfig
    hf: transformers.MixtralForCausalLM
    model: Mixtral
    tree_of: Callable[..., dict[str, np.ndarray]] = tree_of


@pytest.fixture
def base_config() -> MixtralConfig:
    return GROUPED


@pytest.fixture
def make_pair() -> Callable[..., Pair]:
    """make_pair(**overrides): experts, top_k and any MixtralConfig field."""

    def make(seed: int = 0, experts: int = 4, top_k: int = 2, **overrides: Any) -> Pair:
        config = dataclasses.replace(GROUPED, router=RouterConfig(num_experts=experts, top_k=top_k), **overrides)
        hf = hugging_face(config, seed)
        return Pair(config, hf, ours(config, tree_of(hf, lambda parameter: parameter.data)))

    return make
