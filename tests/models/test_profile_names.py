"""Stages have names in compiled programs, so that a profile shows which stage of the model an operation belongs to."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import GROUPED

from bimedix_jax.adapters import add_lora
from bimedix_jax.kernels import backends
from bimedix_jax.models.attention import KVCache
from bimedix_jax.models.config import LoraConfig, RouterConfig
from bimedix_jax.models.init import init_random
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.training.losses import next_token_loss

STAGES = {
    "embedding",
    "norm",
    "attention/qkv",
    "attention/rope",
    "attention/scores",
    "attention/output",
    "router/steer",
    "router/score",
    "router/choose",
    "router/weigh",
    "dispatch",
    "experts/w1_w3",
    "experts/w2",
    "combine",
}
BACKWARD = {"norm", "attention/qkv", "attention/scores", "attention/output", "experts/w1_w3", "experts/w2"}
TOKENS = np.arange(12)[None] % 31


@pytest.fixture(scope="module")
def model() -> Mixtral:
    router = RouterConfig(num_experts=4, top_k=2, variant="softmax_topk")  # scores of `topk` need no operation
    config = dataclasses.replace(GROUPED, router=router)
    return add_lora(init_random(config, std=0.2), LoraConfig(rank=4, alpha=8.0))


def stages(names: set[str]) -> set[str]:
    """Stages in operation names such as `jit(f)/transpose(jvp(attention))/qkv/dot_general`."""
    cleaned = {f"/{re.sub(r'jvp|transpose|vmap|jit', '', name).replace('(', '/').replace(')', '/')}/" for name in names}
    cleaned = {re.sub("/+", "/", name) for name in cleaned}
    return {stage for stage in STAGES | {"head", "loss", "cache"} if any(f"/{stage}/" in name for name in cleaned)}


def lowered_names(lowered: jax.stages.Lowered) -> set[str]:
    return set(re.findall(r'loc\("([^"]+)"', lowered.as_text(debug_info=True)))


@pytest.mark.parametrize("backend", ["xla", "composed"])
def test_forward_pass_names_every_stage(model: Mixtral, backend: str) -> None:
    graph, state = nnx.split(model)
    with backends.use(expert_mlp=backend):
        lowered = jax.jit(lambda state: nnx.merge(graph, state)(TOKENS).logits_BTV).lower(state)
    assert stages(lowered_names(lowered)) == STAGES | {"head"}


def test_decoding_names_the_cache(model: Mixtral) -> None:
    graph, state = nnx.split(model)
    cache = KVCache.zeros(model.config, 1, 16, "float32")
    lowered = jax.jit(lambda state, cache: nnx.merge(graph, state)(TOKENS[:, :1], cache=cache)).lower(state, cache)
    assert stages(lowered_names(lowered)) == STAGES | {"head", "cache"}


@pytest.mark.parametrize("backend", ["xla", "composed"])
def test_compiled_gradient_keeps_the_names(model: Mixtral, backend: str) -> None:
    graph, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    ones = jnp.ones_like(jnp.asarray(TOKENS))

    def loss(adapters: nnx.State, rest: nnx.State) -> jax.Array:
        merged = nnx.merge(graph, adapters, rest)
        hidden = merged.hidden(TOKENS).hidden_BTD
        return next_token_loss(merged.head, hidden, jnp.asarray(TOKENS), ones, ones == 1)[0]

    with backends.use(expert_mlp=backend):
        compiled = jax.jit(jax.grad(loss)).lower(adapters, rest).compile()
    names = set(re.findall(r'op_name="([^"]+)"', compiled.as_text() or ""))
    assert STAGES | {"loss"} <= stages(names)
    assert stages({name for name in names if "transpose(" in name}) >= BACKWARD
