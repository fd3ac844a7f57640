"""grouped_matmul: checks the operands, picks a backend, and differentiates."""

import functools
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.manual_axes import vary_alike
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.rows import RowMajor
from bimedix_jax.kernels.nf4.tensor import zero_cotangent
from bimedix_jax.kernels.stacks import LayerOf, as_layer, is_packed_layer, operand

BACKENDS = ("xla", "ragged_dot", "triton", "mosaic_tpu")
"""Modules of this folder; a backend is a module with `grouped_matmul`, `weight_gradient` and optionally `refusal` and
`takes_stack`."""
PREFERRED = {"cpu": ("xla",), "gpu": ("triton", "ragged_dot"), "tpu": ("mosaic_tpu", "ragged_dot")}
"""Backends of each platform, best first; the last one takes all operands."""


def load(backend: str) -> ModuleType:
    """Imports a backend on first use: Pallas alone takes as long to import as JAX."""
    return importlib.import_module(f"bimedix_jax.kernels.grouped_matmul.{backend}")


Weights = jax.Array | NF4Tensor | LayerOf


def pick_backend(name: str | None, x_MD: jax.Array, w_EDF: Weights) -> str:
    """The backend to use. A backend may define `refusal(x_MD, w_EDF)`: the reason why it cannot take them, or None."""
    w_EDF = jax.eval_shape(LayerOf.value, w_EDF) if isinstance(w_EDF, LayerOf) else w_EDF

    def refusal(backend: str) -> str | None:
        module = load(backend)
        return module.refusal(x_MD, w_EDF) if hasattr(module, "refusal") else None

    return backends.pick("grouped_matmul", BACKENDS, PREFERRED, name, refusal)


def orient(w: Any, d: int) -> Any:
    """Packed [E, F, D] weights as [E, D, F]; square matrices are returned unchanged."""
    packed = isinstance(w, NF4Tensor) or is_packed_layer(w)
    if packed and w.ndim == 3 and w.shape[1] != d and w.shape[2] == d:
        return w.mT
    return w


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(x_MD: jax.Array, w_EDF: Weights, group_sizes_E: jax.Array, backend: str) -> jax.Array:
    module = load(backend)
    return module.grouped_matmul(x_MD, operand(module, w_EDF), group_sizes_E)


def product_forward(x_MD: jax.Array, w_EDF: Weights, group_sizes_E: jax.Array, backend: str):
    # the backward pass keeps a 4-bit weight packed, and keeps x only for the gradient of a dense weight
    residual_x = None if isinstance(w_EDF, NF4Tensor) or is_packed_layer(w_EDF) else x_MD
    return product(x_MD, w_EDF, group_sizes_E, backend), (residual_x, w_EDF, group_sizes_E)


def product_backward(backend: str, residuals: tuple, dy_MF: jax.Array):
    x_MD, w_EDF, group_sizes_E = residuals
    module = load(backend)
    dx_MD = module.grouped_matmul(dy_MF, operand(module, w_EDF), group_sizes_E, swapped=True)
    if x_MD is None:
        return dx_MD, jax.tree.map(zero_cotangent, w_EDF), zero_cotangent(group_sizes_E)
    dw_EDF = module.weight_gradient(x_MD, dy_MF, group_sizes_E)
    if isinstance(w_EDF, LayerOf):
        stack = jnp.zeros_like(w_EDF.stack).at[w_EDF.layer].set(dw_EDF.astype(w_EDF.stack.dtype))
        layer: Any = zero_cotangent(jnp.asarray(w_EDF.layer))
        return dx_MD, LayerOf(stack, layer), zero_cotangent(group_sizes_E)
    return dx_MD, dw_EDF.astype(w_EDF.dtype), zero_cotangent(group_sizes_E)


product.defvjp(product_forward, product_backward)


def check(x_MD: jax.Array, w: Any, group_sizes_E: jax.Array) -> None:
    """Raises ValueError if shapes do not fit, or group sizes are no integers."""
    fits = x_MD.ndim == 2 and w.ndim == 3 and w.shape[1] == x_MD.shape[1] and group_sizes_E.shape == w.shape[:1]
    if not fits or not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise ValueError(
            f"grouped_matmul needs x [M, D], w [E, D, F] and E integers as group sizes; "
            f"got {x_MD.shape}, {w.shape} and {group_sizes_E.dtype} {group_sizes_E.shape}."
        )


def grouped_matmul(
    x_MD: Float[Array, "M D"],
    w_EDF: Float[Array, "..."] | NF4Tensor | RowMajor | LayerOf,
    group_sizes_E: Int[Array, "E"],
    *,
    backend: str | None = None,
) -> Float[Array, "M F"]:
    """Multiplies each row by the matrix of the expert that owns it.

    Args:
      x_MD: rows sorted by expert.
      w_EDF: dense weights, or NF4 ones of logical shape [E, D, F] or [E, F, D] (square matrices are read as [E, D, F]).
        A `LayerOf` is such weights of one layer; backends with `takes_stack` do not slice it. RowMajor ones are
        NF4, too; other backends than that for TPUs convert them.
      group_sizes_E: rows of each expert, in order; their sum may be below M.
      backend: one of BACKENDS; None takes that of `backends.use`, else the platform's best that can take the
        operands. A named backend never falls back.

    Returns:
      y_MF in the dtype of x, accumulated in float32; rows that no group owns are zero. Differentiable in x, and in w
      where it is dense; a 4-bit weight is frozen.

    Raises:
      ValueError: shapes that do not fit, or an unknown backend.
      NotImplementedError: the named backend does not take these operands.
    """
    w: Any = orient(as_layer(w_EDF), x_MD.shape[-1])
    check(x_MD, w, group_sizes_E)
    group_sizes_E = jnp.asarray(group_sizes_E, jnp.int32)
    name = pick_backend(backend, x_MD, w)
    if 0 in (*x_MD.shape, *w.shape):
        return jnp.zeros((x_MD.shape[0], w.shape[2]), x_MD.dtype)
    if isinstance(w, LayerOf) and not w.is_packed:
        w = operand(load(name), w)
    if not isinstance(w, NF4Tensor | LayerOf):
        w = w.astype(x_MD.dtype)
    return product(*vary_alike(x_MD, w, group_sizes_E), name)
