"""Attention equals NumPy loops and JAX's own gradient of the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bimedix_jax.kernels.attention import attention, reference
from bimedix_jax.kernels.attention.api import visible


def draw(length: int, slots: int, heads: int, groups: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(length)
    shapes = [(2, length, heads, 8), (2, slots, groups, 8), (2, slots, groups, 8)]
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def segments(length: int) -> np.ndarray:
    """Padding left, two documents, padding right; and one document."""
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
