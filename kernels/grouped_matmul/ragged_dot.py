"""Backend on `lax.ragged_dot`, for platforms without a Pallas kernel. NF4 weights are dequantised as a whole."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.api import layer_weights


def grouped_matmul(
    x_MD: Float[Array, "M D"], w_EDF: jax.Array | NF4Tensor, group_sizes_E: Int[Array, "E"], swapped: bool = False
) -> Float[Array, "M F"]:
    dense_EDF = layer_weights(w_EDF, x_MD.dtype) if isinstance(w_EDF, NF4Tensor) else w_EDF
    dimension_numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if swapped else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    y_MF = lax.ragged_dot_general(
        x_MD, dense_EDF.astype(x_MD.dtype), group_sizes_E, dimension_numbers, preferred_element_type=jnp.float32
    ).astype(x_MD.dtype)
    # rows that no group owns have platform-dependent values
    owned_M = jnp.arange(x_MD.shape[0]) < jnp.sum(group_sizes_E)
    return jnp.where(owned_M[:, None], y_MF, 0)


def weight_gradient(
    x_MD: Float[Array, "M D"], dy_MF: Float[Array, "M F"], group_sizes_E: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """float32 [E, D, F]."""
    dimension_numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return lax.ragged_dot_general(x_MD, dy_MF, group_sizes_E, dimension_numbers, preferred_element_type=jnp.float32)
