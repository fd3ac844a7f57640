"""Attention equals NumPy loops and JAX's own gradient of the plain formula."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bimedix_jax.kernels.attention import HeadMajor, api, attention, reference, write
from bimedix_jax.kernels.attention.api import visible


def draw(length: int, slots: int, heads: int, groups: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(length)
    shapes = [(2, length, heads, 8), (2, slots, groups, 8), (2, slots, groups, 8)]
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def segments(length: int) -> np.ndarray:
    """Two rows: padding on both sides of two documents; one document."""
    ids = np.ones((2, length), np.int32)
    ids[0, : length // 5] = 0
    ids[0, length // 2 :] = 2
    ids[0, -2:] = 0
    return ids


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
def test_equals_the_reference(heads: int, groups: int, window: int | None) -> None:
    q, k, v = draw(19, 19, heads, groups)
    ids = segments(19)
    got = attention(*map(jnp.asarray, (q, k, v, ids, ids)), window=window)
    assert np.allclose(got, reference.attention(q, k, v, ids, ids, 0, window), atol=2e-6)


def test_with_a_cache_offset() -> None:
    q, k, v = draw(2, 10, 4, 2)
    ids = segments(10)
    got = attention(*map(jnp.asarray, (q, k, v, ids[:, 5:7], ids)), offset=jnp.asarray(5, jnp.int32))
    assert np.allclose(got, reference.attention(q, k, v, ids[:, 5:7], ids, 5), atol=2e-6)


@pytest.mark.parametrize("window", [None, 100])
def test_chunks_and_gradients(window: int | None) -> None:
    q, k, v = map(jnp.asarray, draw(600, 600, 2, 1))  # three chunks, the last one shorter
    ids = jnp.asarray(segments(600))

    def plain(q, k, v):
        scores = jnp.einsum("bthd,bsd->bhts", q, k[:, :, 0]) * 8**-0.5
        seen = visible(ids, ids, 0, 0, window)
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1)
        return jnp.einsum("bhts,bsd->bthd", weights, v[:, :, 0])

    def ours(q, k, v):
        return attention(q, k, v, ids, ids, window=window)

    assert np.allclose(ours(q, k, v), plain(q, k, v), atol=2e-6)
    got, expected = (jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1, 2))(q, k, v) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 1)])
def test_both_cache_layouts_equal_the_reference(heads: int, groups: int, length: int, window: int | None) -> None:
    q, k, v = draw(length, 12, heads, groups)
    ids, start = segments(12), 5
    end = start + length
    expected = reference.attention(q, k, v, ids[:, start:end], ids, start, window)
    for layout in (lambda x: x, HeadMajor.of):

        @jax.jit
        def attend(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, offset: jax.Array, layout: Any = layout):
            new_k, new_v = (jax.lax.dynamic_slice_in_dim(x, offset, length, 1) for x in (k, v))
            before_k, before_v = (layout(x.at[:, start:end].set(7)) for x in (k, v))
            cached = write(before_k, new_k, offset), write(before_v, new_v, offset)
            return cached, attention(q, *cached, ids[:, start:end], ids, offset=offset, window=window)

        cached, found = attend(*map(jnp.asarray, (q, k, v, ids, np.int32(start))))
        for x, whole in zip(cached, (k, v), strict=True):
            assert x.shape == whole.shape
            np.testing.assert_array_equal(x.array() if isinstance(x, HeadMajor) else x, whole)
        assert np.allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("length", [1, 8])
def test_cache_layouts_agree_in_every_dtype(length: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit on scores, so that groups of heads run one after another."""
    monkeypatch.setattr(api, "CPU_SCORES", 2 * length * 10)
    q, k, v = (jnp.asarray(x, dtype) for x in draw(length, 10, 4, 2))
    ids = jnp.asarray(segments(10))
    operands = (ids[:, 2 : 2 + length], ids)
    expected = attention(q, k, v, *operands, offset=jnp.int32(2))
    found = attention(q, HeadMajor.of(k), HeadMajor.of(v), *operands, offset=jnp.int32(2))
    assert found.dtype == expected.dtype == dtype
    np.testing.assert_array_equal(found, expected)
    assert HeadMajor.of(k).bits_BGSH.dtype == ("float32" if dtype == "float32" else "uint16")


def test_cache_and_queries_of_different_dtypes() -> None:
    q, k, v = map(jnp.asarray, draw(2, 10, 4, 2))
    ids = jnp.asarray(segments(10))
    k16, v16 = (x.astype("bfloat16") for x in (k, v))
    expected = attention(q, k16.astype("float32"), v16.astype("float32"), ids[:, 5:7], ids, offset=jnp.int32(5))
    for layout in (lambda x: x, HeadMajor.of):
        found = attention(q, layout(k16), layout(v16), ids[:, 5:7], ids, offset=jnp.int32(5))
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, expected)
        written = write(layout(k16), k[:, :1], jnp.int32(3))
        assert written.dtype == "bfloat16"


def test_decoding_does_not_convert_the_cache_to_float32() -> None:
    """One token's attention reads the 16-bit cache as stored, and writes its slot in place."""
    q, k, v = (jnp.asarray(x, "bfloat16") for x in draw(1, 64, 4, 2))
    ids = jnp.ones((2, 64), jnp.int32)

    def step(k: HeadMajor, v: HeadMajor, q: jax.Array, new: jax.Array, offset: jax.Array) -> tuple:
        written = write(k, new, offset), write(v, new, offset)
        return written, attention(q, *written, ids[:, :1], ids, offset=offset)

    operands = (HeadMajor.of(k), HeadMajor.of(v), q, k[:, :1], jnp.int32(9))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*operands).compile()
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    assert "f32[2,2,64,8]" not in text
    assert "f32[4,64,8]" not in text
    assert memory is not None
    assert memory.alias_size_in_bytes == 2 * k.nbytes


def test_layers_of_a_cache_are_its_parts() -> None:
    k = jnp.asarray(draw(1, 10, 4, 2)[1], "bfloat16")
    stacked = HeadMajor.of(jnp.stack([k, 2 * k]))
    assert (stacked.shape, stacked.ndim) == ((2, *k.shape), 5)
    one = jax.tree.map(lambda leaf: leaf[1], stacked)
    np.testing.assert_array_equal(one.array(), 2 * k)
