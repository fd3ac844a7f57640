"""Backend in C++ for x86 processors with AVX-512 and its bfloat16 dot products (avx512/), for NF4 and dense matrices.

XLA:CPU dequantises the whole matrix to memory, as two planes whose products it interleaves. Here each thread unpacks up
to 384 outputs into its cache and multiplies all rows by them. Large results in float32 go past the caches.
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bimedix_jax.kernels import native, native_weights
from bimedix_jax.kernels.native_weights import takes_stack
from bimedix_jax.kernels.stacks import LayerOf

__all__ = ["nf4_matmul", "product", "refusal", "takes_stack"]

SOURCE = Path(__file__).with_suffix("") / "linear.cc"
FUNCTION = "bimedix_linear"


def refusal(x: jax.Array, w: Any) -> str | None:
    """The reason why it cannot take rows x and this matrix, or None."""
    if x.dtype != jnp.bfloat16:
        return f"it computes in bfloat16, not in {x.dtype}."
    if (reason := native_weights.refusal([w])) is not None:
        return reason
    return native.avx512_refusal(SOURCE, (FUNCTION,))


def is_best(x: jax.Array, shape: tuple[int, ...]) -> bool:
    """Whether it is the fastest for rows x and a matrix of this shape on this processor: not with matrix units (AMX),
    which XLA's products use."""
    fits = x.dtype == jnp.bfloat16 and native_weights.fits(shape)
    return fits and native.has_avx512(matrix_units=False)


def product(x: jax.Array, w: Any, outputs: int, over_columns: bool, out_dtype: Any) -> jax.Array:
    """x [..., in] times w in float32 or bfloat16: w is [in, outputs], or [outputs, in] if `over_columns`.

    w is dense, an NF4Tensor of one unit with this shape as stored, or a layer of a stack of them.
    """
    rows = math.prod(x.shape[:-1])
    (y,) = native.call(
        FUNCTION,
        [((rows, outputs), out_dtype)],
        [x.reshape(rows, x.shape[-1]), *native_weights.operands([w])],
        out=outputs,
        block=native_weights.block_size(w),
        over_columns=over_columns,
        full=out_dtype == jnp.float32,
    )
    return y.reshape(*x.shape[:-1], outputs)


def nf4_matmul(x: jax.Array, t: Any) -> jax.Array:
    """x [..., D] @ t [D, F] in the dtype of x."""
    with jax.named_scope("nf4_matmul"):
        return product(x, t, t.shape[1], (t.stack if isinstance(t, LayerOf) else t).transposed, x.dtype)
