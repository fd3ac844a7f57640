"""Cross entropy over a large vocabulary, in tiles. The forward pass also computes the gradient of the states.

The gradient of a state is (sum over v of p_v w_v) - w_target. This is attention of the state over the vocabulary: keys
and values are the columns of w. One pass over tiles with a running maximum, as in FlashAttention (arXiv 2205.14135),
gives both loss and gradient. The logits of a tile stay in the cache, and the backward pass only scales the gradient. If
w is trained, the backward pass also computes the tiles again, for the gradient of w.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from bimedix_jax.kernels.nf4_matmul.api import dense_dot
from bimedix_jax.kernels.products import dot_rows, from_bits, to_bits

TILE_LOGITS, MIN_TILE = 1280 * 1024, 256
"""Logits of a tile (5 MiB in float32, for two cores with 1 MiB of L2 each and 32 MiB of L3); its minimum of columns."""


def tile_at(w_DV: jax.Array, tile: jax.Array, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(w of a tile [D, width], its first column, a mask of the columns that no earlier tile has)."""
    start = jnp.minimum(tile * width, w_DV.shape[1] - width)  # the last tile overlaps the one before it
    w = from_bits(lax.dynamic_slice_in_dim(to_bits(w_DV), start, width, 1), w_DV.dtype)
    return w, start, start + jnp.arange(width) >= tile * width


def over_tiles(w_DV: jax.Array, rows: int, step: Callable, carry: tuple) -> tuple:
    """`carry = step(carry, *tile_at(...))` for every tile."""
    width = min(w_DV.shape[1], max(MIN_TILE, TILE_LOGITS // rows))

    def body(tile: jax.Array, carry: tuple) -> tuple:
        return step(carry, *tile_at(w_DV, tile, width))

    return lax.fori_loop(0, -(-w_DV.shape[1] // width), body, carry)


def picked(logits_NC: jax.Array, targets_N: jax.Array, start: jax.Array, new_C: jax.Array) -> tuple:
    """(logit of each row's target where it is one of the tile's new columns, else 0; whether it is)."""
    place_N = targets_N - start
    inside_N = (place_N >= 0) & (place_N < new_C.shape[0])
    place_N = jnp.clip(place_N, 0, new_C.shape[0] - 1)
    inside_N = inside_N & new_C[place_N]
    return jnp.where(inside_N, jnp.take_along_axis(logits_NC, place_N[:, None], axis=1)[:, 0], 0.0), inside_N


def losses(x_ND: jax.Array, w_DV: jax.Array, targets_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(losses [N], logarithm of the softmax's denominator [N])."""
    rows = x_ND.shape[0]

    def step(carry: tuple, w: jax.Array, start: jax.Array, new_C: jax.Array) -> tuple:
        peak_N, total_N, target_N = carry
        logits = jnp.where(new_C[None], dense_dot(x_ND, w), -jnp.inf)
        target_N = target_N + picked(logits, targets_N, start, new_C)[0]
        higher_N = jnp.maximum(peak_N, jnp.max(logits, axis=1))
        total_N = total_N * jnp.exp(peak_N - higher_N) + jnp.sum(jnp.exp(logits - higher_N[:, None]), axis=1)
        return higher_N, total_N, target_N

    zeros = jnp.zeros((rows,), jnp.float32)
    peak_N, total_N, target_N = over_tiles(w_DV, rows, step, (zeros - jnp.inf, zeros, zeros))
    log_total_N = peak_N + jnp.log(total_N)
    return log_total_N - target_N, log_total_N


@jax.custom_vjp
def differentiable(x_ND: jax.Array, w_DV: jax.Array, targets_N: jax.Array) -> jax.Array:
    return losses(x_ND, w_DV, targets_N)[0]


def forward(x_ND: jax.Array, w_DV: jax.Array, targets_N: jax.Array) -> tuple[jax.Array, tuple]:
    """(losses, residuals with the gradient of each loss with respect to its state)."""
    rows, width = x_ND.shape

    def step(carry: tuple, w: jax.Array, start: jax.Array, new_C: jax.Array) -> tuple:
        peak_N, total_N, target_N, sum_ND = carry
        logits = jnp.where(new_C[None], dense_dot(x_ND, w), -jnp.inf)
        target_N = target_N + picked(logits, targets_N, start, new_C)[0]
        higher_N = jnp.maximum(peak_N, jnp.max(logits, axis=1))
        shrink_N = jnp.exp(peak_N - higher_N)
        weights = jnp.exp(logits - higher_N[:, None])
        total_N = total_N * shrink_N + jnp.sum(weights, axis=1)
        # the target is left out of the sum: p - 1 would round a confident token's small gradient away
        own = start + jnp.arange(new_C.shape[0])[None] == targets_N[:, None]
        others = jnp.where(own, 0.0, weights).astype(x_ND.dtype)
        return higher_N, total_N, target_N, sum_ND * shrink_N[:, None] + dense_dot(others, w, 1)

    zeros = jnp.zeros((rows,), jnp.float32)
    start = (zeros - jnp.inf, zeros, zeros, jnp.zeros((rows, width), jnp.float32))
    peak_N, total_N, target_N, sum_ND = over_tiles(w_DV, rows, step, start)
    log_total_N = peak_N + jnp.log(total_N)
    rest_N = -jnp.expm1(target_N - log_total_N)  # 1 - p of the target
    target_ND = w_DV.at[:, targets_N].get(mode="promise_in_bounds").T.astype(jnp.float32)
    dx_ND = sum_ND / total_N[:, None] - rest_N[:, None] * target_ND
    return log_total_N - target_N, (x_ND, w_DV, targets_N, log_total_N, dx_ND)


def backward(residuals: tuple, dlosses_N: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_ND, w_DV, targets_N, log_total_N, dx_ND = residuals

    def step(carry: tuple, w: jax.Array, start: jax.Array, new_C: jax.Array) -> tuple:
        (dw_DV,) = carry
        own = start + jnp.arange(new_C.shape[0])[None] == targets_N[:, None]
        dlogits = (jnp.exp(dense_dot(x_ND, w) - log_total_N[:, None]) - own) * dlosses_N[:, None]
        return (lax.dynamic_update_slice_in_dim(dw_DV, dot_rows(x_ND, dlogits.astype(x_ND.dtype)), start, 1),)

    # if w is frozen, nothing uses this result, and the compiler removes the loop
    (dw_DV,) = over_tiles(w_DV, x_ND.shape[0], step, (jnp.zeros(w_DV.shape, jnp.float32),))
    return (dx_ND * dlosses_N[:, None]).astype(x_ND.dtype), dw_DV.astype(w_DV.dtype), None


differentiable.defvjp(forward, backward)


def check(x_ND: jax.Array, w_DV: jax.Array, targets_N: jax.Array) -> None:
    """Raises ValueError if shapes do not fit, or targets are no integers."""
    integers = jnp.issubdtype(targets_N.dtype, jnp.integer)
    fits = x_ND.ndim == w_DV.ndim == 2 and x_ND.shape[1] == w_DV.shape[0] and targets_N.shape == x_ND.shape[:1]
    if not fits or not integers or w_DV.shape[1] == 0:
        raise ValueError(
            "cross_entropy needs x [N, D], w [D, V] with V > 0, and N integers as targets; got "
            f"{x_ND.shape}, {w_DV.shape} and {targets_N.dtype} {targets_N.shape}."
        )


def cross_entropy(
    x_ND: Float[Array, "N D"], w_DV: Float[Array, "D V"], targets_N: Int[Array, "N"]
) -> Float[Array, "N"]:
    """float32 -log softmax(x w)[target] in nats; the products have the dtype of x and float32 sums.

    Differentiable in x and w. Targets must be in [0, V).

    Raises:
      ValueError: shapes that do not fit, or targets that are no integers.
    """
    check(x_ND, w_DV, targets_N)
    if x_ND.shape[0] == 0:
        return jnp.zeros(0, jnp.float32)
    return differentiable(x_ND, w_DV.astype(x_ND.dtype), targets_N)
