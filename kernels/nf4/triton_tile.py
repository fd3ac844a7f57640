"""NF4 inside Triton kernels: from packed bytes and scales to a tile of values."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from bimedix_jax.kernels.nf4 import ptx
from bimedix_jax.kernels.nf4.tables import NF4_VALUES


def round_to_bfloat16(x: jax.Array) -> jax.Array:
    """float32 values rounded to nearest even, on bits: the compiler may remove a cast and its inverse."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    rounded = bits + 0x7FFF + (lax.shift_right_logical(bits, 16) & 1)
    return lax.bitcast_convert_type(rounded & -0x10000, jnp.float32)


def nibble_values(codes: jax.Array) -> jax.Array:
    """Table look-up as a tree of selects."""
    is_set = [(codes.astype(jnp.int32) & (1 << bit)) != 0 for bit in range(4)]
    level: list[Any] = [jnp.float32(value) for value in NF4_VALUES]
    for bit in is_set:
        level = [jnp.where(bit, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def dequantised(packed: jax.Array, scales: jax.Array, recorded: str, dtype: Any, interpret: bool) -> jax.Array:
    """Values [*shape, 2] of packed bytes [*shape] with float32 scales [*shape]."""
    if dtype == jnp.bfloat16 and recorded in ("bfloat16", "float32") and not interpret:
        [words] = plt.elementwise_inline_asm(
            ptx.dequantize_pairs(),
            args=[packed, scales],
            constraints=ptx.CONSTRAINTS,
            pack=4,
            result_shape_dtypes=[jax.ShapeDtypeStruct(packed.shape, jnp.int32)],
        )
        halves = (words.astype(jnp.uint16), lax.shift_right_logical(words, 16).astype(jnp.uint16))
        return jnp.stack([lax.bitcast_convert_type(half, jnp.bfloat16) for half in halves], axis=-1)

    def values(codes: jax.Array) -> jax.Array:  # rounded like nf4.api.as_recorded
        exact = nibble_values(codes) * scales
        if recorded == "bfloat16" and dtype != jnp.bfloat16:
            exact = round_to_bfloat16(exact)
        return exact.astype(recorded).astype(dtype)

    return jnp.stack([values(packed >> 4), values(packed & 15)], axis=-1)
