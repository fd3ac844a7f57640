"""The dense and NF4 product, and the grouped low-rank delta, against NumPy: forward and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bimedix_jax.kernels.grouped_low_rank import grouped_low_rank
from bimedix_jax.kernels.grouped_low_rank import reference as low_rank_reference
from bimedix_jax.kernels.grouped_low_rank.api import METHODS
from bimedix_jax.kernels.nf4 import dequantize, quantize
from bimedix_jax.kernels.nf4_matmul import matmul, reference

RELATIVE = {"float32": 2e-5, "bfloat16": 1.6e-2}


def close(got: jax.Array, expected: np.ndarray, dtype: str) -> None:
    assert np.abs(np.asarray(got, np.float32) - expected).max() <= RELATIVE[dtype] * np.abs(expected).max()


def draw(*shapes: tuple[int, ...], dtype: str = "float32") -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", RELATIVE)
def test_dense_product_and_gradients(dtype: str) -> None:
    x, w, dy = draw((2, 3, 16), (16, 24), (2, 3, 24), dtype=dtype)
    y, pullback = jax.vjp(matmul, x, w)
    dx, dw = pullback(dy)
    x32, w32, dy32 = (np.asarray(value, np.float32) for value in (x, w, dy))
    close(y, reference.matmul(x32, w32), dtype)
    close(dx, dy32 @ w32.T, dtype)
    close(dw, x32.reshape(-1, 16).T @ dy32.reshape(-1, 24), dtype)
    assert y.dtype == dx.dtype == x.dtype
    assert dw.dtype == w.dtype
    assert matmul(x, w, "float32").dtype == jnp.float32


@pytest.mark.parametrize("width", [128, 50])
@pytest.mark.parametrize("transposed", [True, False])
def test_nf4_product_and_gradient(transposed: bool, width: int) -> None:
    x, w, dy = draw((5, 128), (width, 128) if transposed else (128, width), (5, width))
    t = quantize(w).mT if transposed else quantize(w)
    y, pullback = jax.vjp(lambda x: matmul(x, t), x)
    values = np.asarray(dequantize(t))
    close(y, reference.matmul(np.asarray(x), values), "float32")
    close(pullback(dy)[0], np.asarray(dy) @ values.T, "float32")


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, w = draw((5, 8), (9, 4))
    with pytest.raises((ValueError, TypeError)):
        matmul(x, w)


@pytest.mark.parametrize("sizes", [[4, 0, 9, 2], [0, 0, 20, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize("method", METHODS)
def test_low_rank_delta_and_gradients(method: str, sizes: list[int]) -> None:
    x, a, b, dy = draw((20, 12), (4, 12, 3), (4, 3, 7), (20, 7))
    groups = jnp.asarray(sizes, jnp.int32)
    y, pullback = jax.vjp(lambda x, a, b: grouped_low_rank(x, a, b, groups, method=method), x, a, b)
    expected = low_rank_reference.grouped_low_rank(np.asarray(x), np.asarray(a), np.asarray(b), np.array(sizes))
    assert np.allclose(y, expected, atol=2e-5)

    def plain(x, a, b):
        owner = jnp.asarray(np.repeat(np.arange(5), [*sizes, 20 - sum(sizes)]))
        rows = jnp.einsum("md,mdr,mrf->mf", x, a[owner % 4], b[owner % 4])
        return jnp.where((owner < 4)[:, None], rows, 0)

    for got, wanted in zip(pullback(dy), jax.vjp(plain, x, a, b)[1](dy), strict=True):
        assert np.allclose(got, wanted, atol=5e-5)
