"""Tiny checkpoints that transformers itself wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MIXTRAL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_theta": 12345.0, "rope_type": "default"},
    "initializer_range": 0.3,
}


def saved_mixtral(folder: Path, dtype: str = "bfloat16", shard: str = "5GB", **changes: Any) -> Path:
    """A random Mixtral, saved by transformers; `changes` to its configuration."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**{**MIXTRAL, **changes}))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="session")
def write_mixtral() -> Callable[..., Path]:
    """`saved_mixtral`: writes a Mixtral of the given configuration."""
    return saved_mixtral


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 Mixtral in one file; read-only."""
    return saved_mixtral(tmp_path_factory.mktemp("hub") / "mixtral")


@pytest.fixture
def changed(mixtral: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copy of `mixtral` with tensors changed by a function on {name: torch tensor}."""
    import shutil

    from safetensors.torch import load_file, save_file

    def change(edit: Callable[[dict[str, Any]], object]) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(mixtral, folder)
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return change


@pytest.fixture(scope="session")
def trained() -> Callable[..., Any]:
    """trained(model, config): the model with adapters as after training: no B is zero, trained routers have moved."""
    import jax.numpy as jnp
    import numpy as np

    from bimedix_jax.adapters import add_lora, linears

    def make(model: Any, config: Any) -> Any:
        random, adapted = np.random.default_rng(1), add_lora(model, config)
        for layer in linears(adapted).values():
            if layer.lora is not None:
                shape = layer.lora.b.get_value().shape
                layer.lora.b.set_value(jnp.asarray(random.normal(0, 0.1, shape), jnp.float32))
        if config.train_router:
            weight = adapted.layers.moe.router.w
            noise = random.normal(0, 0.1, weight.get_value().shape)
            weight.set_value(weight.get_value() + jnp.asarray(noise, jnp.float32))
        return adapted

    return make


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 Mixtral; read-only."""
    return saved_mixtral(tmp_path_factory.mktemp("float32") / "base", dtype="float32")


@pytest.fixture(scope="session")
def model(base: Path) -> Any:
    """`base`, loaded; adapters go onto copies that share it."""
    import bimedix_jax as bmx

    return bmx.load(base, base="float32")
