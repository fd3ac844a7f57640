"""Logits, losses, gradients and decoding equal transformers' MixtralForCausalLM in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax import lax

from bimedix_jax.models.attention import KVCache
from bimedix_jax.models.mixtral import Mixtral

CONFIGS = {
    "plain": {},
    "eight_experts": {"experts": 8},
    "sixteen_experts_top4": {"experts": 16, "top_k": 4},
    "top1": {"top_k": 1},
    "multi_query": {"num_kv_heads": 1},
    "multi_head_wide_head": {"num_heads": 8, "num_kv_heads": 8, "head_dim": 16},
    "odd_ffn": {"intermediate_size": 37},
    "sliding_window": {"sliding_window": 5},
    "tied_odd_vocabulary": {"tie_embeddings": True, "vocab_size": 61},
    "deep_theta_1e6": {"num_layers": 5, "rope_theta": 1e6, "experts": 8, "top_k": 4, "rms_norm_eps": 1e-6},
}


def batch(vocab: int, length: int = 17) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, 0/1 mask) of three rows: padded left, padded right, not padded."""
    tokens = np.random.default_rng(0).integers(0, vocab, (3, length))
    mask = np.ones((3, length), np.int64)
    mask[0, :4] = 0
    mask[1, -5:] = 0
    return tokens, mask


def next_token_loss(model: Mixtral, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    out = model(tokens, mask, groups=1)
    target = mask[:, 1:] * mask[:, :-1]
    logp = jax.nn.log_softmax(out.logits_BTV[:, :-1])
    nll = -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(nll * target) / jnp.sum(target) + 0.05 * out.aux_loss


def torch_loss(hf: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """(loss, transformers' output)."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = hf(input_ids=tokens, attention_mask=mask, position_ids=positions, output_router_logits=True)
    logits = out.logits[:, :-1].reshape(-1, out.logits.shape[-1])
    nll = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].reshape(-1), reduction="none")
    target = (mask[:, 1:] * mask[:, :-1]).reshape(-1)
    return (nll * target).sum() / target.sum() + 0.05 * out.aux_loss, out


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_aux_loss_and_gradients(make_pair, name: str) -> None:
    pair = make_pair(**CONFIGS[name])
    tokens, mask = batch(pair.config.vocab_size)
    loss, out = torch_loss(pair.hf, torch.tensor(tokens), torch.tensor(mask))
    loss.backward()
    graph, state = nnx.split(pair.model)

    @jax.jit
    def evaluate(state):
        out = nnx.merge(graph, state)(tokens, mask, groups=1)
        grads = jax.grad(
            lambda state: next_token_loss(nnx.merge(graph, state), jnp.asarray(tokens), jnp.asarray(mask))
        )(state)
        return out, grads

    got, grads = evaluate(state)
    expected = out.logits.detach().numpy()
    valid = mask.astype(bool)
    assert np.abs(np.asarray(got.logits_BTV) - expected)[valid].max() <= 1e-4 * np.abs(expected[valid]).max()
    assert abs(float(got.aux_loss) - out.aux_loss.item()) <= 1e-5 * max(1.0, out.aux_loss.item())

    reference = pair.tree_of(pair.hf, lambda parameter: parameter.grad)
    for path, variable in nnx.to_flat_state(grads):
        key = ".".join(map(str, path))
        ours, theirs = np.asarray(variable.get_value()), reference.pop(key)
        # under renormalised top-1, the router has no gradient of the language-model loss, only of the aux loss
        scale = max(np.abs(theirs).max(), 1e-2 if key.endswith("router.w") and name == "top1" else 1e-6)
        assert np.abs(ours - theirs).max() <= 1e-3 * scale, key
    assert not reference


@pytest.mark.parametrize("name", ["plain", "sliding_window", "sixteen_experts_top4"])
def test_64_greedy_tokens_with_cache(make_pair, name: str) -> None:
    pair = make_pair(**CONFIGS[name])
    prompt = np.random.default_rng(1).integers(3, pair.config.vocab_size, (2, 7))
    pair.hf.generation_config.eos_token_id = None
    pair.hf.generation_config.pad_token_id = 0
    mask = torch.ones(prompt.shape, dtype=torch.long)
    expected = pair.hf.generate(
        torch.tensor(prompt), attention_mask=mask, max_new_tokens=64, min_new_tokens=64, do_sample=False
    ).numpy()[:, prompt.shape[1] :]

    @nnx.jit
    def decode(model: Mixtral, prompt: jax.Array) -> jax.Array:
        cache = KVCache.zeros(pair.config, prompt.shape[0], prompt.shape[1] + 64, "float32")
        out = model(prompt, cache=cache)
        first = jnp.argmax(out.logits_BTV[:, -1], axis=-1)

        def step(state, _):
            token, cache = state
            out = model(token[:, None], cache=cache)
            return (jnp.argmax(out.logits_BTV[:, -1], axis=-1), out.cache), token

        return lax.scan(step, (first, out.cache), length=64)[1].T

    assert np.array_equal(np.asarray(decode(pair.model, jnp.asarray(prompt))), expected)
