"""Backend for NVIDIA GPUs: the Pallas Triton kernel of grouped_matmul with one matrix and even tiles."""

import functools

import jax

from bimedix_jax.kernels.grouped_matmul import triton
from bimedix_jax.kernels.grouped_matmul.tiles import even_tiles
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.tensor import one_unit_stack


def refusal(x: jax.Array, t: NF4Tensor) -> str | None:
    return triton.refusal(x, one_unit_stack(t))


def nf4_matmul(x: jax.Array, t: NF4Tensor) -> jax.Array:
    """x [..., D] @ t [D, F] in the dtype of x."""
    x_MK = x.reshape(-1, x.shape[-1])
    cut = functools.partial(even_tiles, x_MK.shape[0])
    y_MN = triton.multiply("nf4_matmul", x_MK, one_unit_stack(t), False, cut)
    return y_MN.reshape(*x.shape[:-1], t.shape[1])
