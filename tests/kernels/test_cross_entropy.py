"""Losses from hidden states equal the reference; gradients equal JAX's for the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.cross_entropy import api, cross_entropy
from bimedix_jax.kernels.cross_entropy.reference import cross_entropy as reference


def plain(x, w, targets):
    logits = jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32))
    return jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]


def made(rows: int, width: int, vocabulary: int, dtype, scale: float = 1.0):
    random = np.random.default_rng(0)
    x, w = random.standard_normal((rows, width)), scale * random.standard_normal((width, vocabulary))
    targets = random.integers(0, vocabulary, rows)
    targets[: min(rows, 2)] = [0, vocabulary - 1][: min(rows, 2)]
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(targets, jnp.int32)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(api, "MIN_TILE", 16)
    monkeypatch.setattr(api, "TILE_LOGITS", 16)


@pytest.mark.parametrize(("rows", "vocabulary"), [(5, 37), (1, 16), (3, 7), (8, 64)])
def test_losses_equal_the_reference(rows, vocabulary):
    x, w, targets = made(rows, 12, vocabulary, jnp.float32)
    expected = reference(np.asarray(x), np.asarray(w), np.asarray(targets))
    np.testing.assert_allclose(jax.jit(cross_entropy)(x, w, targets), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("scale", [0.3, 8.0])  # uncertain and almost certain predictions
def test_gradients_equal_those_of_the_plain_formula(dtype, tolerance, scale):
    x, w, targets = made(6, 24, 45, dtype, scale)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(6), jnp.float32)

    def gradients(function):
        return jax.jit(jax.grad(lambda x, w: jnp.sum(weights * function(x, w, targets)), (0, 1)))(x, w)

    for found, expected in zip(gradients(cross_entropy), gradients(plain), strict=True):
        assert found.dtype == x.dtype
        difference = np.linalg.norm(np.asarray(found - expected, np.float32))
        assert difference <= tolerance * np.linalg.norm(np.asarray(expected, np.float32))


def test_losses_and_gradients_in_avx512(monkeypatch, avx512_machine):
    monkeypatch.setattr(api, "MIN_TILE", 64)
    x, w, targets = made(9, 64, 160, "bfloat16")

    def both(function):
        y, pull = jax.vjp(lambda x, w: function(x, w, targets), x, w)
        return y, *pull(jnp.cos(y))

    with backends.use(nf4_matmul="avx512"):
        assert "bimedix_linear" in str(jax.make_jaxpr(lambda x: cross_entropy(x, w, targets))(x))
        found = both(cross_entropy)
    for ours, expected in zip(found, both(plain), strict=True):
        difference = np.linalg.norm(np.asarray(ours - expected, np.float32))
        assert difference <= 2e-2 * np.linalg.norm(np.asarray(expected, np.float32))


def test_a_certain_token_keeps_its_small_gradient():
    """p of the target rounds to 1 in bfloat16; its gradient must not become 0 or noise."""
    x = jnp.ones((1, 4), jnp.bfloat16)
    w = jnp.asarray([[2.0, 0.0, -1.0]] * 4, jnp.bfloat16)
    first = jnp.zeros((1,), jnp.int32)
    found = jax.grad(lambda x: cross_entropy(x, w, first)[0])(x)
    expected = jax.grad(lambda x: plain(x, w, first)[0])(x)
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(expected, np.float32), rtol=0.01)


def test_the_backward_pass_of_a_frozen_head_has_no_loop():
    """The forward pass computed the gradient of x, and the unused gradient of w is removed."""
    x, w, targets = made(6, 24, 45, "float32")
    _, pull = jax.vjp(lambda x: cross_entropy(x, w, targets), x)
    text = jax.jit(pull).lower(jnp.ones(6)).compile().as_text() or ""
    assert "ENTRY" in text
    assert "while" not in text
    assert " dot(" not in text


def test_no_row():
    x, w, targets = jnp.ones((0, 24)), jnp.ones((24, 45)), jnp.zeros(0, jnp.int32)
    losses, pullback = jax.vjp(lambda x, w: cross_entropy(x, w, targets), x, w)
    assert losses.shape == (0,)
    assert [found.shape for found in pullback(losses)] == [x.shape, w.shape]


def test_operands_that_do_not_fit():
    x, w, targets = made(6, 24, 45, "float32")
    wrong = [(x[:5], w, targets), (x[None], w, targets), (x, w.T, targets), (x, w, targets.astype(jnp.float32))]
    for operands in (*wrong, (x, w[:, :0], targets)):
        with pytest.raises(ValueError, match=r"cross_entropy needs x \[N, D\], w \[D, V\]"):
            api.check(*operands)
