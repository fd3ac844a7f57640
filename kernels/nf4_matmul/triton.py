"""Backend for NVIDIA GPUs: the Pallas Triton kernel of grouped_matmul with one matrix and even tiles."""

import functools
from typing import Any

import jax

from bimedix_jax.kernels.grouped_matmul import triton
from bimedix_jax.kernels.grouped_matmul.tiles import even_tiles
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.tensor import one_unit_stack
from bimedix_jax.kernels.stacks import LayerOf


def refusal(x: jax.Array, t: NF4Tensor) -> str | None:
    return triton.refusal(x, jax.eval_shape(one_unit_stack, t))


def takes_stack(stack: Any) -> bool:
    return isinstance(stack, NF4Tensor) and triton.takes_stack(jax.eval_shape(one_unit_stack, stack))


def nf4_matmul(x: jax.Array, t: NF4Tensor | LayerOf) -> jax.Array:
    """x [..., D] @ t [D, F] in the dtype of x."""
    x_MK = x.reshape(-1, x.shape[-1])
    cut = functools.partial(even_tiles, x_MK.shape[0])
    one = LayerOf(one_unit_stack(t.stack), t.layer) if isinstance(t, LayerOf) else one_unit_stack(t)
    y_MN = triton.multiply("nf4_matmul", x_MK, one, False, cut)
    return y_MN.reshape(*x.shape[:-1], t.shape[1])
