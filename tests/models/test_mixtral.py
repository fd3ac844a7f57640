"""Properties of the model: causality, padding, packing, caches, plans, rematerialisation."""

import dataclasses
from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import GROUPED, tiny

from bimedix_jax.adapters import linears
from bimedix_jax.kernels import backends
from bimedix_jax.kernels.nf4 import NF4Tensor, dequantize, quantize
from bimedix_jax.models.attention import KVCache, positions_in_segments
from bimedix_jax.models.call import Output
from bimedix_jax.models.config import MIXTRAL_8X7B, Remat, RouterConfig
from bimedix_jax.models.init import init_random
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import RoutingPlan
from bimedix_jax.quantise import quantise_base


@pytest.fixture(scope="module")
def model() -> Mixtral:
    config = tiny(GROUPED, hidden_size=64, intermediate_size=128, num_layers=3, max_position_embeddings=64)
    return init_random(config, std=0.2)


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 53, (2, 12))


@nnx.jit
def apply(
    model: Mixtral,
    tokens: jax.Array | np.ndarray,
    segments: jax.Array | np.ndarray | None = None,
    plan: RoutingPlan | None = None,
) -> Output:
    return model(tokens, segments, plan, groups=1)


def close(got: jax.Array, expected: jax.Array, limit: float = 2e-5) -> None:
    assert np.abs(np.asarray(got) - np.asarray(expected)).max() <= limit * np.abs(np.asarray(expected)).max()


def test_causality(model: Mixtral, tokens: np.ndarray) -> None:
    changed = tokens.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 53
    before, after = apply(model, tokens), apply(model, changed)
    close(after.logits_BTV[:, :7], before.logits_BTV[:, :7])
    assert np.abs(after.logits_BTV[:, 7:] - before.logits_BTV[:, 7:]).max() > 1e-3


def test_padding_has_no_effect(model: Mixtral, tokens: np.ndarray) -> None:
    expected = apply(model, tokens)
    for left, right in ((3, 0), (0, 3), (2, 4)):
        pad = ((0, 0), (left, right))
        out = apply(model, np.pad(tokens, pad), np.pad(np.ones_like(tokens), pad))
        inside = slice(left, left + tokens.shape[1])
        close(out.logits_BTV[:, inside], expected.logits_BTV)
        close(out.aux_loss, expected.aux_loss)
        close(out.z_loss, expected.z_loss)
        assert np.array_equal(out.routing.experts_LBTK[:, :, inside], expected.routing.experts_LBTK)


def test_packed_documents_equal_documents_alone(model: Mixtral, tokens: np.ndarray) -> None:
    a, b = tokens[:1, :5], tokens[1:, :9]
    packed = np.concatenate([a, b, np.zeros((1, 2), int)], axis=1)
    segments = np.array([[1] * 5 + [2] * 9 + [0] * 2])
    out = apply(model, packed, segments)
    close(out.logits_BTV[:, :5], apply(model, a).logits_BTV)
    close(out.logits_BTV[:, 5:14], apply(model, b).logits_BTV)


def test_segments_that_continue_one_segment_equal_whole_sequences(model: Mixtral, tokens: np.ndarray) -> None:
    """A context with two continuations between other documents, of which one has its own continuation, and with a third
    one that reads it from a cache."""
    context, rest = tokens[:1, :5], [tokens[1:, :2], tokens[1:, 3:7], tokens[1:, 8:]]
    packed = np.concatenate([tokens[1:, :3], context, rest[0], rest[1], tokens[:1, 5:8], rest[2]], axis=1)
    segments = np.array([[1] * 3 + [2] * 5 + [4] * 2 + [5] * 4 + [3] * 3 + [7] * 4])
    ancestors = np.stack([np.where(segments >= 4, 2, segments), np.where(segments == 7, 5, segments)], axis=-1)
    cache = KVCache.zeros(model.config, 1, 32, "float32")
    out = model.hidden(packed, segments, cache=cache, ancestor_ids_BTA=ancestors)
    later = model.hidden(rest[2], np.full((1, 4), 6), cache=out.cache, ancestor_ids_BTA=np.full((1, 4, 1), 2))
    alone = model.hidden(packed, segments, ancestor_ids_BTA=ancestors)
    close(alone.hidden_BTD, out.hidden_BTD)
    for found, part in (
        (out.hidden_BTD[:, 8:10], rest[0]),
        (out.hidden_BTD[:, 10:14], rest[1]),
        (later.hidden_BTD, rest[2]),
    ):
        close(found, model.hidden(np.concatenate([context, part], axis=1)).hidden_BTD[:, 5:])
    close(out.hidden_BTD[:, 3:8], model.hidden(context).hidden_BTD)
    close(out.hidden_BTD[:, 14:17], model.hidden(tokens[:1, 5:8]).hidden_BTD)
    chain = model.hidden(np.concatenate([context, rest[1], rest[2]], axis=1))
    close(out.hidden_BTD[:, 17:], chain.hidden_BTD[:, 9:])


def test_positions_restart_in_each_segment() -> None:
    segments = jnp.array([[0, 0, 3, 3, 3, 1, 0], [1, 2, 2, 2, 2, 2, 2]])
    assert positions_in_segments(segments).tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5]]


def test_cache_continues_left_padded_prompts(model: Mixtral, tokens: np.ndarray) -> None:
    expected = apply(model, tokens)
    segments = np.ones_like(tokens)
    short = np.pad(tokens[:, :6], ((0, 0), (3, 0)))
    cache = KVCache.zeros(model.config, 2, 16, "float32")
    out = model(short, np.pad(segments[:, :6], ((0, 0), (3, 0))), cache=cache)
    close(out.logits_BTV[:, 3:], expected.logits_BTV[:, :6])
    for t in range(6, 12):
        out = model(tokens[:, t : t + 1], cache=out.cache)
        close(out.logits_BTV[:, 0], expected.logits_BTV[:, t])


def test_too_long_inputs_raise(model: Mixtral) -> None:
    with pytest.raises(ValueError, match="max_position_embeddings 64; use shorter"):
        model(np.zeros((1, 65), int))


def test_any_integer_dtype(model: Mixtral, tokens: np.ndarray) -> None:
    expected = apply(model, tokens).logits_BTV
    for dtype in (np.int64, np.int32, np.uint8):
        assert np.array_equal(apply(model, tokens.astype(dtype)).logits_BTV, expected)


def test_routing_record(model: Mixtral, tokens: np.ndarray) -> None:
    routing = apply(model, tokens).routing
    assert routing.experts_LBTK.shape == (3, 2, 12, 2)
    assert routing.logits_LBTE.shape == (3, 2, 12, 4)
    assert np.allclose(routing.weights_LBTK.sum(-1), 1, atol=1e-6)
    best = np.argsort(-np.asarray(routing.logits_LBTE), axis=-1)[..., :2]
    assert np.array_equal(routing.experts_LBTK, best)


def vary(plan: RoutingPlan, field: str, change: Callable[[jax.Array], jax.Array]) -> RoutingPlan:
    return dataclasses.replace(plan, **{field: change(getattr(plan, field))})


def test_neutral_plans_have_no_effect_and_new_values_do_not_recompile(model: Mixtral, tokens: np.ndarray) -> None:
    plan = RoutingPlan.neutral(model.config)
    expected = apply(model, tokens)
    graph, state = nnx.split(model)
    traces = 0

    @jax.jit
    def planned(state: nnx.State, plan: RoutingPlan) -> Output:
        nonlocal traces
        traces += 1
        return nnx.merge(graph, state)(tokens, plan=plan)

    assert np.array_equal(planned(state, plan).logits_BTV, expected.logits_BTV)
    banned = planned(state, vary(plan, "bias_LBTE", lambda bias: bias.at[:, :, :, 1].set(-1e9)))
    assert not (banned.routing.experts_LBTK == 1).any()
    hot = planned(state, vary(plan, "temperature_LBT", lambda temperature: temperature * 1e6))
    assert np.allclose(hot.routing.weights_LBTK, 0.5, atol=1e-4)
    forced = planned(state, vary(plan, "experts_LBTK", lambda experts: experts.at[1].set(jnp.array([3, 0]))))
    assert (np.asarray(forced.routing.experts_LBTK[1]) == [3, 0]).all()
    assert np.array_equal(forced.routing.experts_LBTK[0], expected.routing.experts_LBTK[0])
    half_forced = planned(state, vary(plan, "experts_LBTK", lambda experts: experts.at[..., 0].set(2)))
    assert (half_forced.routing.experts_LBTK[..., 0] == 2).all()
    assert (half_forced.routing.experts_LBTK[..., 1] != 2).all()
    weighted = planned(state, vary(plan, "weights_LBTK", lambda weights: weights.at[2].set(0.25)))
    assert (weighted.routing.weights_LBTK[2] == 0.25).all()
    fewer = planned(state, vary(plan, "active_LBT", lambda active: active.at[1].set(1)))
    assert (fewer.routing.experts_LBTK[1, ..., 1] == -1).all()
    silent = planned(state, vary(plan, "gain_LBTE", lambda gain: gain.at[..., 2].set(0)))
    assert np.array_equal(silent.routing.experts_LBTK[0], expected.routing.experts_LBTK[0])
    assert not np.array_equal(silent.logits_BTV, expected.logits_BTV)
    assert traces == 1


@pytest.mark.parametrize("expert_mlp", ["xla", "composed"])
def test_permuting_experts_equals_permuting_their_weights(model: Mixtral, tokens: np.ndarray, expert_mlp: str) -> None:
    """Outputs, sums and gradients, and the gradient of every expert's gain, also of a silenced one."""
    order = jnp.array([2, 0, 3, 1])
    graph, state = nnx.split(model)
    gain = jnp.ones((3, 1, 1, 4)).at[1, ..., 2].set(0.0)
    tangent = jnp.asarray(np.random.default_rng(0).standard_normal(gain.shape), jnp.float32)

    def loss(experts: list[jax.Array], gain: jax.Array, order: jax.Array) -> tuple[jax.Array, Output]:
        moved = nnx.merge(graph, state, copy=True)
        for layer, w in zip((moved.layers.moe.w1, moved.layers.moe.w2, moved.layers.moe.w3), experts, strict=True):
            layer.w.set_value(w)
        plan = RoutingPlan(map_LBTE=jnp.broadcast_to(order, (3, 1, 1, 4)), gain_LBTE=gain)
        out = moved(tokens, plan=plan, groups=1)
        return jnp.mean(jnp.sin(out.logits_BTV)) + out.aux_loss, out

    moe = model.layers.moe
    experts = [layer.w.get_value() for layer in (moe.w1, moe.w2, moe.w3)]
    with backends.use(expert_mlp=expert_mlp, grouped_matmul="xla" if expert_mlp == "xla" else "ragged_dot"):
        graded = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (_, out), (found, by_gain) = graded(experts, gain, order)
        moved = [w[:, order] for w in experts]
        (_, expected), (theirs, their_gain) = graded(moved, gain[..., order], jnp.arange(4))
        ends = [graded(experts, gain + sign * 1e-2 * tangent, order)[0][0] for sign in (1, -1)]
    close(out.logits_BTV, expected.logits_BTV)
    assert np.array_equal(out.routing.experts_LBTK, order[expected.routing.experts_LBTK])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), out.sums, expected.sums)
    for ours, other in zip(found, theirs, strict=True):
        close(ours[:, order], other)
    close(by_gain[..., order], their_gain)
    np.testing.assert_allclose(jnp.vdot(by_gain, tangent), (ends[0] - ends[1]) / 2e-2, rtol=1e-2)
    assert np.abs(by_gain[1, ..., 2]).max() > 0


def test_replaying_the_record_reproduces_the_run(model: Mixtral, tokens: np.ndarray) -> None:
    expected = apply(model, tokens)
    record = expected.routing
    other = apply(model, tokens, None, RoutingPlan(bias_LBTE=jnp.full((3, 1, 1, 4), 0.0).at[..., 0].set(-1e9)))
    assert np.abs(other.logits_BTV - expected.logits_BTV).max() > 1e-3
    replayed = apply(
        model, tokens, None, RoutingPlan(experts_LBTK=record.experts_LBTK, weights_LBTK=record.weights_LBTK)
    )
    assert np.array_equal(replayed.routing.experts_LBTK, record.experts_LBTK)
    close(replayed.logits_BTV, expected.logits_BTV)


def test_plans_of_wrong_shape_raise(model: Mixtral, tokens: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"temperature_LBT has shape \(3, 5, 1\)"):
        model(tokens, plan=RoutingPlan(temperature_LBT=jnp.ones((3, 5, 1))))


def test_remat_does_not_change_gradients(model: Mixtral, tokens: np.ndarray) -> None:
    graph, state = nnx.split(model)

    def spread(state: nnx.State, remat: Remat) -> jax.Array:
        return nnx.merge(graph, state)(tokens, remat=remat).logits_BTV.std()

    first, *others = (jax.jit(jax.grad(spread), static_argnums=1)(state, remat) for remat in get_args(Remat))
    for other in others:
        jax.tree.map(close, other, first)


def test_nf4_base_equals_the_dequantised_base(model: Mixtral, tokens: np.ndarray) -> None:
    packed = quantise_base(model)
    w = model.layers.moe.w1.w.get_value()
    t = packed.layers.moe.w1.w.get_value()
    assert isinstance(t, NF4Tensor)
    assert t.shape == w.shape
    assert isinstance(w, jax.Array)
    # PyTorch stores (out, in) matrices, and so do the packed bytes
    assert np.array_equal(t.packed[1, 2], quantize(w[1, 2].T).packed)
    restored = nnx.merge(*nnx.split(packed), copy=True)
    for layer in linears(restored).values():
        if isinstance(value := layer.w.get_value(), NF4Tensor):
            layer.w.set_value(dequantize(value))
    close(apply(packed, tokens).logits_BTV, apply(restored, tokens).logits_BTV)


def test_invalid_configurations_raise() -> None:
    with pytest.raises(ValueError, match="top_k must be between 1 and num_experts=4"):
        RouterConfig(num_experts=4, top_k=5)
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        dataclasses.replace(MIXTRAL_8X7B, num_kv_heads=5)
