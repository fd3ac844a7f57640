"""Dispatch and combine equal NumPy loops; the permutation is a bijection; gradients equal JAX's own."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from bimedix_jax.kernels.permute import combine, dispatch, reference, sort_by_expert


# tokens, experts, top_k; few, since each is a compilation
@settings(max_examples=60, deadline=None)
@given(st.sampled_from([(1, 1, 1), (1, 5, 3), (9, 2, 2), (12, 4, 1), (11, 5, 3)]), st.integers(0, 2**31))
def test_equals_the_reference(shape: tuple[int, int, int], seed: int) -> None:
    tokens, experts, top_k = shape
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, 4)).astype(np.float32)
    chosen = rng.integers(0, experts + 1, (tokens, top_k)).astype(np.int32)  # id `experts` belongs to nobody
    weights = rng.random((tokens, top_k)).astype(np.float32)
    permutation = sort_by_expert(jnp.asarray(chosen), experts)
    rows, sizes = reference.dispatch(x, chosen, experts)
    sorted_rows = dispatch(jnp.asarray(x), permutation)
    assert np.array_equal(permutation.group_sizes_E, sizes)
    assert np.array_equal(sorted_rows[: len(rows)], rows)
    assert np.array_equal(permutation.order_M[permutation.inverse_M], np.arange(tokens * top_k))
    owned = jnp.where(jnp.arange(tokens * top_k)[:, None] < len(rows), sorted_rows, 0)
    expected = reference.combine(np.asarray(owned), weights, chosen, experts)
    assert np.allclose(combine(owned, jnp.asarray(weights), permutation), expected, atol=1e-6)


def test_gradients_equal_those_of_plain_indexing() -> None:
    rng = np.random.default_rng(0)
    x, weights = jnp.asarray(rng.standard_normal((7, 3))), jnp.asarray(rng.random((7, 2)))
    permutation = sort_by_expert(jnp.asarray(rng.integers(0, 4, (7, 2)), jnp.int32), 4)

    def ours(x, weights):
        return jnp.sum(jnp.sin(combine(jnp.tanh(dispatch(x, permutation)), weights, permutation)))

    def plain(x, weights):
        y = jnp.tanh(x[permutation.order_M // 2])[permutation.inverse_M].reshape(7, 2, 3)
        return jnp.sum(jnp.sin(jnp.sum(y * weights[..., None], axis=1)))

    for got, expected in zip(jax.grad(ours, (0, 1))(x, weights), jax.grad(plain, (0, 1))(x, weights), strict=True):
        assert np.allclose(got, expected, atol=1e-6)
