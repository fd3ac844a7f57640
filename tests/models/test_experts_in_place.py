"""On a CPU the loop over layers does not slice dense experts from their stack, unless their gradient is taken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.expert_mlp import LayerOf
from bimedix_jax.kernels.layer_scan import InPlace, layers
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.models.init import init_random
from bimedix_jax.models.linear import read_in_place
from bimedix_jax.presets import smoke
from bimedix_jax.quantise import quantise_base


def config() -> MixtralConfig:
    tiny = smoke().model.random
    assert tiny is not None
    return dataclasses.replace(tiny, num_layers=3)


@pytest.mark.parametrize("base", ["bfloat16", "float32"])
def test_experts_are_sliced_only_for_gradients(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With enough rows for the fused backend. The layers differ, so that reading a wrong layer fails."""
    graph, weights = nnx.split(init_random(config(), dtype=base))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config().vocab_size, (2, 64)))
    seen = []
    monkeypatch.setattr(layers, "LayerOf", lambda *place: seen.append(place) or LayerOf(*place))

    def logits(weights: nnx.State) -> jax.Array:
        return nnx.merge(graph, weights)(tokens).logits_BTV

    with backends.use(expert_mlp="xla"):
        in_place = jax.jit(logits)(weights)
        assert seen, "the experts of a dense model are read in place"
        assert len(seen) % 3 == 0, "w1, w2 and w3 of a layer"
        found = len(seen)
        copied, _ = jax.vjp(logits, weights)
    assert len(seen) == found, "the backward pass slices them"
    off = jnp.linalg.norm(in_place - copied) / jnp.linalg.norm(copied)
    assert off < (1e-5 if base == "float32" else 1e-2)


def test_experts_and_packed_weights_are_marked() -> None:
    for packed in (False, True):
        model = init_random(config(), dtype="bfloat16")
        model = quantise_base(model) if packed else model
        read_in_place(model.layers, "layers")
        moe, attention = model.layers.moe, model.layers.attention
        assert all(isinstance(layer.w.get_value(), InPlace) for layer in (moe.w1, moe.w2, moe.w3))
        assert isinstance(attention.q.w.get_value(), InPlace) == packed
        assert not isinstance(moe.router.w.get_value(), InPlace)
