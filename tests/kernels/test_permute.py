"""Dispatch and combine equal NumPy loops; the permutation is a bijection; gradients equal JAX's own."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from bimedix_jax.kernels.permute import combine, dispatch, reference, sort_by_expert


@functools.partial(jax.jit, static_argnames="experts")
def sorted_and_combined(x: jax.Array, weights: jax.Array, chosen: jax.Array, owned: int, experts: int) -> tuple:
    """(the permutation, x in its order, the weighted sums of its first `owned` rows)."""
    permutation = sort_by_expert(chosen, experts)
    rows = dispatch(x, permutation)
    kept = jnp.where(jnp.arange(rows.shape[0])[:, None] < owned, rows, 0)
    return permutation, rows, combine(kept, weights, permutation)


# tokens, experts, top_k; few, because each is compiled
@settings(max_examples=60, deadline=None)
@given(st.sampled_from([(0, 3, 2), (1, 1, 1), (1, 5, 3), (9, 2, 2), (12, 4, 1), (11, 64, 3)]), st.integers(0, 2**31))
def test_equals_the_reference(shape: tuple[int, int, int], seed: int) -> None:
    tokens, experts, top_k = shape
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, 4)).astype(np.float32)
    chosen = rng.integers(0, experts + 1, (tokens, top_k)).astype(np.int32)  # id `experts` means no expert
    weights = rng.random((tokens, top_k)).astype(np.float32)
    rows, sizes = reference.dispatch(x, chosen, experts)
    permutation, sorted_rows, combined = sorted_and_combined(x, weights, chosen, len(rows), experts)
    assert np.array_equal(permutation.group_sizes_E, sizes)
    assert np.array_equal(sorted_rows[: len(rows)], rows)
    assert np.array_equal(permutation.order_M[permutation.inverse_M], np.arange(tokens * top_k))
    owned = np.where(np.arange(tokens * top_k)[:, None] < len(rows), sorted_rows, 0)
    expected = reference.combine(owned, weights, chosen, experts)
    assert np.allclose(combined, expected, atol=1e-6)


@jax.jit
def gradients(x: jax.Array, weights: jax.Array, chosen: jax.Array) -> tuple:
    """Gradients of x and of the weights: of our operations in the dtype of x, and of plain indexing in float32."""
    permutation = sort_by_expert(chosen, 4)

    def ours(x, weights):
        y = combine(jnp.tanh(dispatch(x, permutation)), weights, permutation)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    def plain(x, weights):
        y = jnp.tanh(x[permutation.order_M // 2])[permutation.inverse_M].reshape(7, 2, 3)
        return jnp.sum(jnp.sin(jnp.sum(y * weights[..., None], axis=1)))

    return jax.grad(ours, (0, 1))(x, weights), jax.grad(plain, (0, 1))(x.astype(jnp.float32), weights)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 3e-2)])
def test_gradients_equal_those_of_plain_indexing(dtype: str, tolerance: float) -> None:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 2**31))
    def check(seed: int) -> None:
        rng = np.random.default_rng(seed)
        x, weights = jnp.asarray(rng.standard_normal((7, 3)), dtype), jnp.asarray(rng.random((7, 2)), jnp.float32)
        got, expected = gradients(x, weights, jnp.asarray(rng.integers(0, 5, (7, 2)), jnp.int32))
        assert got[0].dtype == x.dtype
        for ours, plain in zip(got, expected, strict=True):
            assert np.allclose(
                np.asarray(ours, np.float32), plain, atol=tolerance * max(1, float(jnp.abs(plain).max()))
            )

    check()


def test_gradients_of_no_token() -> None:
    permutation = sort_by_expert(jnp.zeros((0, 2), jnp.int32), 4)
    weights = jnp.zeros((0, 2))
    gradient = jax.grad(lambda x: jnp.sum(combine(dispatch(x, permutation), weights, permutation)))(jnp.zeros((0, 3)))
    assert gradient.shape == (0, 3)


def test_operands_that_do_not_fit() -> None:
    permutation = sort_by_expert(jnp.zeros((6, 2), jnp.int32), 4)
    with pytest.raises(ValueError, match=r"permutation of K pairs for each row of x \(5, 3\), got 12 pairs"):
        dispatch(jnp.zeros((5, 3)), permutation)
    for rows, shape in ((11, (6, 2)), (12, (6, 1))):
        with pytest.raises(ValueError, match="a row and a weight for each of 12 pairs"):
            combine(jnp.zeros((rows, 3)), jnp.zeros(shape), permutation)
