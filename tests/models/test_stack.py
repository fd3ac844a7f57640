"""A stack of layers computes what lax.scan does, forward and backward, without moving 16-bit floats as float32."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.expert_mlp import LayerOf
from bimedix_jax.models import stack
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.models.mixtral import init_random
from bimedix_jax.models.moe import is_expert_matrix
from bimedix_jax.presets import smoke
from bimedix_jax.quantise import quantise_base

LAYERS, WIDTH = 3, 8


def config() -> MixtralConfig:
    tiny = smoke().model.random
    assert tiny is not None
    return replace(tiny, num_layers=LAYERS)


def body(constants, x, layer):
    weight, shift, pick = layer
    y = jnp.tanh(x @ weight.astype(x.dtype) + constants[0][None]) + shift[pick][None]
    return y, {"mean": jnp.mean(y.astype(jnp.float32), axis=0), "state": y}


def made(dtype: str):
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), dtype)  # noqa: E731
    layers = (draw(LAYERS, WIDTH, WIDTH), draw(LAYERS, 4, WIDTH), jnp.asarray([2, 0, 3], jnp.int32))
    return (draw(WIDTH),), draw(5, WIDTH), layers


def objective(run, constants, x, weights, pick):
    x, out = run(body, constants, x, (*weights, pick))
    return jnp.sum(x.astype(jnp.float32) ** 2) + jnp.sum(out["mean"] ** 2) + jnp.sum(out["state"].astype(jnp.float32))


def plain(body, constants, x, layers):
    return lax.scan(lambda x, layer: body(constants, x, layer), x, layers)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_and_gradients_are_those_of_a_scan(dtype, checkpointed):
    constants, x, (*weights, pick) = made(dtype)

    def run(body, *rest):
        return stack.run_stack(jax.checkpoint(body) if checkpointed else body, *rest)

    def measured(way):
        return jax.value_and_grad(lambda x, *weights: objective(way, constants, x, weights, pick), (0, 1, 2))

    found, expected = (jax.jit(measured(way))(x, *weights) for way in (run, plain))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        tolerance = 1e-5 if dtype == "float32" else 0.02
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=tolerance, atol=tolerance
        )


def test_outputs_keep_their_dtypes():
    constants, x, layers = made("bfloat16")
    last, out = stack.run_stack(body, constants, x, layers)
    assert last.dtype == out["state"].dtype == jnp.bfloat16
    assert out["mean"].dtype == jnp.float32
    assert out["state"].shape == (LAYERS, 5, WIDTH)


def test_no_stack_becomes_float32():
    """XLA:CPU would convert all weights before the loop, and all of what is kept at each layer."""
    constants, x, (*weights, pick) = made("bfloat16")
    step = jax.jit(jax.grad(lambda x: objective(stack.run_stack, constants, x, weights, pick)))
    text = step.lower(x).compile().as_text() or ""
    assert f"[{LAYERS},{WIDTH},{WIDTH}]" in text
    assert f"f32[{LAYERS},{WIDTH},{WIDTH}]" not in text
    assert f"f32[{LAYERS},5,{WIDTH}]" not in text


@pytest.mark.parametrize("base", ["bfloat16", "float32"])
def test_experts_stay_in_the_stack_only_without_gradients(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many rows as the fused experts take; the layers differ, so that reading a wrong one shows."""
    model = init_random(config(), dtype=base)
    graph, weights = nnx.split(model)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 64)))
    seen = []
    monkeypatch.setattr(stack, "LayerOf", lambda *place: seen.append(place) or LayerOf(*place))

    def logits(weights: nnx.State) -> jax.Array:
        return nnx.merge(graph, weights)(tokens).logits_BTV

    with backends.use(expert_mlp="xla"):
        in_place = jax.jit(logits)(weights)
        assert len(seen) % 3 == 0, "w1, w2 and w3 of a layer"
        assert seen, "a dense model's experts are read where they lie"
        found = len(seen)
        copied, _ = jax.vjp(logits, weights)
    assert len(seen) == found, "the backward pass takes them out"
    off = jnp.linalg.norm(in_place - copied) / jnp.linalg.norm(copied)
    assert off < (1e-5 if base == "float32" else 1e-2)


def test_packed_experts_have_no_place_in_a_stack() -> None:
    layers = nnx.split(quantise_base(init_random(config(), dtype="bfloat16")).layers)[1]
    assert not any(is_expert_matrix(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path((layers, None)))
