"""The experts' low-rank delta of every backend against NumPy loops and JAX's gradients of a plain formula."""

import functools
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.grouped_low_rank import grouped_low_rank, reference
from bimedix_jax.kernels.grouped_low_rank.api import BACKENDS, MASKED_COLUMNS
from bimedix_jax.kernels.grouped_matmul.api import BACKENDS as GROUPED

RELATIVE = {"float32": 2e-5, "bfloat16": 3e-2}
"""Relative to the largest value; in bfloat16, rows are also rounded between the two factors."""
CASES = {  # rows, D, R, F, group sizes; those of one shape share a program
    "empty_and_unassigned": (50, 33, 3, 17, [10, 0, 25, 5]),
    "one_takes_all": (50, 33, 3, 17, [0, 0, 50, 0]),
    "no_row_owned": (50, 33, 3, 17, [0, 0, 0, 0]),
    "one_row": (1, 16, 2, 8, [0, 1]),
    "one_expert": (23, 9, 4, 31, [23]),
    "64_experts": (130, 16, 4, 24, [i % 4 for i in range(64)]),
}


@functools.cache
def compiled(backend: str):
    """(x, a, b, dy, group sizes) -> (y, (dx, da, db))."""

    def compute(x: jax.Array, a: jax.Array, b: jax.Array, dy: jax.Array, groups: jax.Array) -> tuple:
        y, pullback = jax.vjp(lambda x, a, b: grouped_low_rank(x, a, b, groups, backend=backend), x, a, b)
        return y, pullback(dy)

    return jax.jit(compute)


@jax.jit
def plain_gradients(x: jax.Array, a: jax.Array, b: jax.Array, dy: jax.Array, owner: jax.Array) -> tuple:
    """JAX's gradients of the plain formula; a row without a group has the owner len(a)."""

    def plain(x, a, b):
        delta = jnp.einsum("md,mdr,mrf->mf", x, a[owner % len(a)], b[owner % len(a)])
        return jnp.where((owner < len(a))[:, None], delta, 0)

    return jax.vjp(plain, x, a, b)[1](dy)


def check(compute: Any, rows: int, d: int, r: int, f: int, sizes: list[int], dtype: str) -> None:
    """Rows in `dtype`, factors in float32, as in layers."""
    rng, experts = np.random.default_rng(rows), len(sizes)
    shapes = [(rows, d), (experts, d, r), (experts, r, f), (rows, f)]
    x, a, b, dy = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    x, dy = x.astype(dtype), dy.astype(dtype)
    y, gradients = compute(x, a, b, dy, jnp.asarray(sizes, jnp.int32))
    assert (y.dtype, gradients[0].dtype, gradients[1].dtype) == (x.dtype, x.dtype, a.dtype)
    owner = np.repeat(np.arange(experts + 1), [*sizes, rows - sum(sizes)])
    rounded = [jnp.asarray(np.asarray(value.astype(dtype), np.float32)) for value in (x, a, b)]
    x32, a32, b32 = map(np.asarray, rounded)
    expected = reference.grouped_low_rank(x32, a32, b32, np.array(sizes))
    with jax.default_matmul_precision("highest"):
        wanted = plain_gradients(*rounded, dy.astype(jnp.float32), owner)
    for got, value in zip((y, *gradients), (expected, *wanted), strict=True):
        limit = RELATIVE[dtype] * max(float(np.abs(value).max(initial=0)), 1e-3)
        assert np.abs(np.asarray(got, np.float32) - value).max(initial=0) <= limit


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(backend: str, case: str, dtype: str) -> None:
    check(compiled(backend), *CASES[case], dtype)


@pytest.mark.parametrize("grouped", GROUPED)
def test_two_grouped_products_of_every_backend(grouped: str) -> None:
    with backends.use(grouped_matmul=grouped):
        check(compiled("grouped"), *CASES["empty_and_unassigned"], "float32")


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_skew(backend: str) -> None:
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(0, 30), min_size=5, max_size=5))
    def of_these_sizes(stops: list[int]) -> None:
        check(compiled(backend), 30, 7, 3, 5, np.diff([0, *sorted(stops)]).tolist(), "float32")

    of_these_sizes()


def test_default_backend_depends_on_platform_and_size() -> None:
    groups = jnp.asarray([4, 4], jnp.int32)

    def picked(platform: str, rank: int, **names: str) -> list[str]:
        a, b = jnp.ones((2, 16, rank)), jnp.ones((2, rank, 16))
        with backends.use(platform, **names), backends.recording() as record:
            jax.eval_shape(lambda x: grouped_low_rank(x, a, b, groups), jnp.ones((8, 16)))
        return record.to_dict()["grouped_low_rank"]

    assert picked("cpu", MASKED_COLUMNS // 2) == ["masked"]
    assert picked("cpu", MASKED_COLUMNS // 2 + 1) == ["grouped"]
    assert picked("gpu", 2) == picked("tpu", 2) == ["grouped"]
    assert picked("gpu", 2, grouped_low_rank="masked") == ["masked"]
    with pytest.raises(ValueError, match="Unknown grouped_low_rank backend 'loop'; choose one of grouped, masked"):
        picked("gpu", 2, grouped_low_rank="loop")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "rank"), [(0, 3), (4, 0)])
def test_nothing_to_compute(rows: int, rank: int, backend: str) -> None:
    x, a, b = jnp.ones((rows, 16)), jnp.ones((2, 16, rank)), jnp.ones((2, rank, 8))
    sizes = jnp.asarray([rows, 0], jnp.int32)
    y, pullback = jax.vjp(lambda x, a, b: grouped_low_rank(x, a, b, sizes, backend=backend), x, a, b)
    np.testing.assert_array_equal(y, np.zeros((rows, 8)))
    assert [found.shape for found in pullback(y)] == [x.shape, a.shape, b.shape]
