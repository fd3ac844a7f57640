"""x A_e B_e for the expert e that owns each row, without computing A_e B_e or a dense gradient of it.

`masked` is for a CPU and a small number of columns, experts * rank. It is one product with the A of all experts side by
side, a mask over the columns of other experts, and one product with all B stacked. It takes `experts` times the FLOPs
of a delta, which are a few percent of the base's. But these are plain matrix products, which are faster than a grouped
loop. `grouped` is for GPUs, TPUs and many columns: two grouped matmuls.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.grouped_matmul import grouped_matmul
from bimedix_jax.kernels.nf4_matmul import matmul
from bimedix_jax.kernels.stacks import LayerOf

MASKED_COLUMNS = 128
"""Largest experts * rank for `masked`; with more, the extra work costs more than the loop (two AVX-512 cores)."""


def masked(x_MD: jax.Array, a_EDR: jax.Array, b_ERF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    experts, width, rank = a_EDR.shape
    stops_E = jnp.cumsum(group_sizes_E)
    row_M = jnp.arange(x_MD.shape[0])
    owner_ME = (row_M[:, None] >= (stops_E - group_sizes_E)[None]) & (row_M[:, None] < stops_E[None])
    down_MZ = matmul(x_MD, a_EDR.swapaxes(0, 1).reshape(width, experts * rank))
    own_MZ = jnp.where(jnp.repeat(owner_ME, rank, axis=1), down_MZ, 0)
    return matmul(own_MZ, b_ERF.reshape(experts * rank, -1))


def grouped(x_MD: jax.Array, a_EDR: Any, b_ERF: Any, group_sizes_E: jax.Array) -> jax.Array:
    return grouped_matmul(grouped_matmul(x_MD, a_EDR, group_sizes_E), b_ERF, group_sizes_E)


BACKENDS = {"masked": masked, "grouped": grouped}


def pick_backend(name: str | None, a_EDR: Any) -> str:
    small = a_EDR.shape[0] * a_EDR.shape[2] <= MASKED_COLUMNS
    preferred = {"cpu": ("masked" if small else "grouped",), "gpu": ("grouped",), "tpu": ("grouped",)}
    return backends.pick("grouped_low_rank", tuple(BACKENDS), preferred, name, lambda _: None)


def grouped_low_rank(
    x_MD: Float[Array, "M D"],
    a_EDR: Float[Array, "E D R"] | LayerOf,
    b_ERF: Float[Array, "E R F"] | LayerOf,
    group_sizes_E: Int[Array, "E"],
    *,
    backend: str | None = None,
) -> Float[Array, "M F"]:
    """The delta of each row in the dtype of x, accumulated in float32; rows that no group owns are zero.

    Differentiable in x, a and b. Factors may be layers of stacks (`LayerOf`). `backend` is one of BACKENDS; None takes
    that of `backends.use`, else the one for the platform and the size.

    Raises:
      ValueError: unknown backend, or shapes that do not fit.
    """
    name = pick_backend(backend, a_EDR)
    if 0 in (*x_MD.shape, *a_EDR.shape, *b_ERF.shape):
        return jnp.zeros((x_MD.shape[0], b_ERF.shape[2]), x_MD.dtype)
    if name == "masked":
        a_EDR, b_ERF = (w.value() if isinstance(w, LayerOf) else w for w in (a_EDR, b_ERF))
    return BACKENDS[name](x_MD, a_EDR, b_ERF, group_sizes_E)
