"""Attention in C++ equals the plain formula in float32, forward and backward, to the rounding of its operands."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bimedix_jax.kernels import backends, native
from bimedix_jax.kernels.attention import HeadMajor, attention
from bimedix_jax.kernels.attention.xla import visible

pytestmark = pytest.mark.usefixtures("avx512_machine")


Operands = tuple[jax.Array, jax.Array, jax.Array]


def draw(length: int, slots: int, heads: int, groups: int, width: int) -> Operands:
    """Values that bfloat16 holds, in float32."""
    rng = np.random.default_rng(length)

    def values(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16).astype(jnp.float32)

    return values(2, length, heads, width), values(2, slots, groups, width), values(2, slots, groups, width)


def rounded(operands: Operands) -> Operands:
    q, k, v = (x.astype(jnp.bfloat16) for x in operands)
    return q, k, v


def formula(operands: Operands, seen_BTS: jax.Array) -> jax.Array:
    q, k, v = operands
    shared = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, shared, axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen_BTS[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def close(got: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        assert np.abs(a - b).max() <= 1.5e-2 * max(1.0, np.abs(b).max())


def packed(length: int) -> np.ndarray:
    """Several documents in a row, padding at its end; one document."""
    ids = np.ones((2, length), np.int32)
    ids[0] += np.arange(length) * 4 // length
    ids[0, -3:] = 0
    return ids


@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize(
    ("length", "heads", "groups", "width"),
    [(1, 2, 1, 32), (16, 2, 2, 64), (48, 4, 2, 32), (65, 3, 1, 96), (200, 4, 1, 128), (129, 2, 2, 256)],
)
def test_forward_and_backward(length: int, heads: int, groups: int, width: int, window: int | None) -> None:
    operands = draw(length, length, heads, groups, width)
    ids = jnp.asarray(packed(length))
    seen = visible(ids, ids, 0, 0, window)
    expected, pullback = jax.vjp(lambda operands: formula(operands, seen), operands)
    dout = jnp.cos(expected).astype(jnp.bfloat16)

    @jax.jit
    def ours(operands: Operands) -> Any:
        def attend(operands: Operands) -> jax.Array:
            q, k, v = operands
            return attention(q, k, v, ids, ids, window=window, backend="avx512")

        out, pullback = jax.vjp(attend, operands)
        return out, pullback(dout)

    got = ours(rounded(operands))
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("bfloat16")}
    close(got, (expected, pullback(dout.astype(jnp.float32))))


@pytest.mark.parametrize("layout", [lambda x: x, HeadMajor.of])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("length", [16, 50])
def test_with_a_cache(length: int, window: int | None, layout: Any) -> None:
    q, k, v = draw(length, 130, 4, 2, 32)
    ids, start = packed(130), 70
    query_ids = jnp.asarray(ids[:, start : start + length])
    expected = formula((q, k, v), visible(query_ids, jnp.asarray(ids), start, 0, window))

    @jax.jit
    def ours(q: jax.Array, k: Any, v: Any, offset: jax.Array) -> jax.Array:
        return attention(q, k, v, query_ids, jnp.asarray(ids), offset=offset, window=window, backend="avx512")

    q, k, v = rounded((q, k, v))
    close(ours(q, layout(k), layout(v), jnp.int32(start)), expected)


def test_gradients_with_an_offset() -> None:
    """As where rows are split over devices, and each has its part of the queries and all keys."""
    q, k, v = draw(50, 130, 4, 2, 32)
    ids = jnp.asarray(packed(130))
    for start, window in ((0, None), (60, None), (80, 30)):
        query_ids = ids[:, start : start + 50]
        seen = visible(query_ids, ids, start, 0, window)
        expected, pullback = jax.vjp(lambda *qkv, seen=seen: formula(qkv, seen), q, k, v)

        def attend(*qkv: jax.Array, query_ids: jax.Array = query_ids, start: int = start, window: Any = window):
            q, k, v = qkv
            return attention(
                q, k, v, query_ids, ids, offset=jnp.int32(start), window=window, ancestor_ids_BTA=None, backend="avx512"
            )

        out, ours = jax.vjp(attend, *rounded((q, k, v)))
        close((out, ours(out)), (expected, pullback(out.astype(jnp.float32))))


def test_trees() -> None:
    """Options that continue a question, whose continuations see both."""
    length = 150
    operands = draw(length, length, 2, 1, 32)
    ids = np.ones((2, length), np.int32)
    ids[:, 60:90], ids[:, 90:120], ids[1, 120:] = 2, 3, 4
    ancestors = np.stack([np.where(ids > 1, 1, ids), np.where(ids == 4, 2, ids)], axis=-1)
    ids, ancestors = jnp.asarray(ids), jnp.asarray(ancestors)
    seen = visible(ids, ids, 0, 0, None, ancestors)
    assert not seen[1, 130, 100]
    assert seen[1, 130, 70]
    expected, pullback = jax.vjp(lambda operands: formula(operands, seen), operands)

    @jax.jit
    def ours(operands: Operands) -> Any:
        def attend(operands: Operands) -> jax.Array:
            q, k, v = operands
            return attention(q, k, v, ids, ids, ancestor_ids_BTA=ancestors, backend="avx512")

        out, pullback = jax.vjp(attend, operands)
        return out, pullback(out)

    got = ours(rounded(operands))
    close(got, (expected, pullback(got[0].astype(jnp.float32))))


def test_any_ids() -> None:
    """Ids that return, that fall, that are negative."""
    length = 40
    exact = draw(length, length, 2, 1, 32)
    q, k, v = rounded(exact)
    ours = jax.jit(lambda ids: attention(q, k, v, ids, ids, window=11, backend="avx512"))

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(-2, 2), min_size=2 * length, max_size=2 * length))
    def check(values: list[int]) -> None:
        ids = jnp.asarray(np.asarray(values, np.int32).reshape(2, length))
        close(ours(ids), formula(exact, visible(ids, ids, 0, 0, 11)))

    check()


def test_scores_of_any_size() -> None:
    """Large scores do not overflow, and a query may see only keys with very small ones."""
    q, k, v = draw(20, 20, 2, 1, 32)
    ids = jnp.ones((2, 20), jnp.int32)
    for factor in (100.0, -100.0):
        large = rounded((factor * q, 10 * k, v))
        exact = (large[0].astype(jnp.float32), large[1].astype(jnp.float32), v)
        expected = formula(exact, visible(ids, ids, 0, 0, None))
        close(attention(large[0], large[1], large[2], ids, ids, backend="avx512"), expected)


def test_it_is_chosen_for_bfloat16_and_enough_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_flags", lambda: native.AVX512_NEEDS)  # without matrix units
    for dtype, length, expected in (("bfloat16", 16, "avx512"), ("bfloat16", 15, "xla"), ("float32", 16, "xla")):
        q, k, v = (x.astype(dtype) for x in draw(length, length, 2, 1, 32))
        ids = jnp.ones((2, length), jnp.int32)
        with backends.recording() as choices:
            attention(q, k, v, ids, ids)
        assert choices.to_dict()["attention"] == [expected]
    with backends.use("gpu"), pytest.raises(NotImplementedError, match="it is for x86 processors"):
        attention(q.astype("bfloat16"), k, v, ids, ids, backend="avx512")
