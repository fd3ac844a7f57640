"""Backend in C++ for x86 processors with AVX-512 and its bfloat16 dot products (avx512/): FlashAttention on vectors.

Up to 48 queries of a head are in the lanes of vectors, and visit blocks of 64 keys. A block that no query of the tile
may see costs only its mask, so packed rows and trees cost as much as what their tokens see. Scores never leave a core's
first-level cache. XLA:CPU computes the scores of a chunk of queries and all earlier keys in memory, and compiles each
chunk separately.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bimedix_jax.kernels import native
from bimedix_jax.kernels.attention.api import SAVED
from bimedix_jax.kernels.attention.cache import Cached, HeadMajor
from bimedix_jax.kernels.manual_axes import vary_alike
from bimedix_jax.kernels.nf4.tensor import zero_cotangent

SOURCE = Path(__file__).with_suffix("") / "attention.cc"
FORWARD, BACKWARD = "bimedix_attention_forward", "bimedix_attention_backward"
COLUMNS, WIDEST = 32, 256
"""Widths of heads are multiples of COLUMNS up to WIDEST."""


def refusal(q_BTQH: jax.Array, k_BSGH: Cached, v_BSGH: Cached, cached: bool) -> str | None:
    del k_BSGH, v_BSGH, cached
    if q_BTQH.dtype != jnp.bfloat16:
        return f"it computes in bfloat16, not in {q_BTQH.dtype}."
    width = q_BTQH.shape[-1]
    if width % COLUMNS or width > WIDEST:
        return f"heads must have a width of {COLUMNS}, {2 * COLUMNS}, ... or {WIDEST}, not {width}."
    return native.avx512_refusal(SOURCE, (FORWARD, BACKWARD))


def is_best(dtype: Any, width: int) -> bool:
    """Whether it is the fastest for such heads on this processor: not with matrix units (AMX), which XLA's products
    use."""
    fits = dtype == jnp.bfloat16 and width % COLUMNS == 0 and width <= WIDEST
    return fits and native.has_avx512(matrix_units=False)


def forward(operands: tuple, window: int | None, head_major: bool = False) -> list[jax.Array]:
    """[output [B, T, Q, H], logarithm of the softmax's denominator [B, Q, T]]; head_major: keys are [B, G, S, H]."""
    batch, length, heads, _ = operands[0].shape
    results = [(operands[0].shape, jnp.bfloat16), ((batch, heads, length), jnp.float32)]
    return native.call(FORWARD, results, operands, window=window or 0, head_major=head_major)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attend(operands: tuple, window: int | None) -> jax.Array:
    return forward(operands, window)[0]


def attend_forward(operands: tuple, window: int | None):
    out, log_total = (checkpoint_name(x, SAVED) for x in forward(operands, window))
    return out, (operands, out, log_total)


def attend_backward(window: int | None, residuals: tuple, dout: jax.Array):
    operands, out, log_total = residuals
    results = [(x.shape, jnp.bfloat16) for x in operands[:3]]
    given = (*operands, out, log_total, dout.astype(jnp.bfloat16))
    gradients = native.call(BACKWARD, results, given, window=window or 0, head_major=False)
    return ((*gradients, *map(zero_cotangent, operands[3:])),)


attend.defvjp(attend_forward, attend_backward)


def attention(
    q_BTQH: jax.Array,
    k_BSGH: Cached,
    v_BSGH: Cached,
    query_ids_BT: jax.Array,
    key_ids_BS: jax.Array,
    offset: jax.Array | None,
    window: int | None,
    ancestor_ids_BTA: jax.Array | None = None,
) -> jax.Array:
    """As `api.attention`; takes all operands."""
    if window is not None and window >= key_ids_BS.shape[1]:
        window = None  # it reaches all keys
    if ancestor_ids_BTA is None:
        ancestor_ids_BTA = jnp.zeros((*query_ids_BT.shape, 0), jnp.int32)
    ids = tuple(x.astype(jnp.int32) for x in (query_ids_BT, key_ids_BS, ancestor_ids_BTA))
    slot = jnp.zeros((), jnp.int32) if offset is None else jnp.asarray(offset, jnp.int32)
    if isinstance(k_BSGH, HeadMajor) and isinstance(v_BSGH, HeadMajor):
        keys = (x.values_BGSH().astype(q_BTQH.dtype) for x in (k_BSGH, v_BSGH))
        return forward(vary_alike(q_BTQH, *keys, *ids, slot), window, head_major=True)[0]
    keys = ((x.array() if isinstance(x, HeadMajor) else x).astype(q_BTQH.dtype) for x in (k_BSGH, v_BSGH))
    return attend(vary_alike(q_BTQH, *keys, *ids, slot), window)
