"""Backend for TPUs: the Pallas Mosaic kernel of grouped_matmul with one matrix. Every block of rows is visited once."""

from typing import Any

import jax
import jax.numpy as jnp

from bimedix_jax.kernels.grouped_matmul import mosaic_tiling, mosaic_tpu
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.rows import RowMajor
from bimedix_jax.kernels.nf4.tensor import one_unit_stack
from bimedix_jax.kernels.stacks import LayerOf


def refusal(x: jax.Array, t: NF4Tensor) -> str | None:
    return mosaic_tiling.refusal(x, jax.eval_shape(one_unit_stack, t))


def takes_stack(stack: Any) -> bool:
    return isinstance(stack, RowMajor)


def nf4_matmul(x: jax.Array, t: NF4Tensor | LayerOf) -> jax.Array:
    """x [..., D] @ t [D, F] in the dtype of x."""
    x_MK = x.reshape(-1, x.shape[-1])
    one = LayerOf(one_unit_stack(t.stack), t.layer) if isinstance(t, LayerOf) else one_unit_stack(t)
    y_MN = mosaic_tpu.grouped_matmul(x_MK, one, jnp.full(1, x_MK.shape[0], jnp.int32))
    return y_MN.reshape(*x.shape[:-1], t.shape[1])
