"""x @ w with float32 accumulation; a 4-bit w is dequantised inside, in the forward and again in the backward pass."""

import functools
import importlib
import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.by_output import ByOutput
from bimedix_jax.kernels.manual_axes import vary_alike
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.rows import RowMajor
from bimedix_jax.kernels.nf4.tensor import zero_cotangent
from bimedix_jax.kernels.nf4_matmul import avx512
from bimedix_jax.kernels.products import dot, dot_rows
from bimedix_jax.kernels.stacks import LayerOf, as_layer, operand

BACKENDS = ("avx512", "xla", "triton", "mosaic_tpu")
"""Modules of this folder, for 4-bit weights; a backend is a module with `nf4_matmul` and optionally `refusal` and
`takes_stack`. Dense matrices take `avx512` or XLA's product."""
PREFERRED = {"cpu": ("xla",), "gpu": ("triton", "xla"), "tpu": ("mosaic_tpu", "xla")}
"""Backends of each platform, best first; the last one takes all operands."""
FEW_ROWS = 8
"""A CPU's dense bfloat16 products are padded to this many rows: XLA:CPU reads weights at 7 GB/s with one row and at
20 GB/s with 8. Products in float16 and float32 are not padded: they take longer with more rows."""


def load(backend: str) -> ModuleType:
    """Imports a backend on first use: Pallas alone takes as long to import as JAX."""
    return importlib.import_module(f"bimedix_jax.kernels.nf4_matmul.{backend}")


Packed = NF4Tensor | LayerOf


def pick_backend(name: str | None, x: jax.Array, t: Packed) -> str:
    """The backend to use. A backend may define `refusal(x, t)`: the reason why it cannot take them, or None."""
    t = jax.eval_shape(LayerOf.value, t) if isinstance(t, LayerOf) else t

    def refusal(backend: str) -> str | None:
        module = load(backend)
        return module.refusal(x, t) if hasattr(module, "refusal") else None

    preferred = PREFERRED | {"cpu": ("avx512", "xla")} if avx512.is_best(x, t.shape) else PREFERRED
    return backends.pick("nf4_matmul", BACKENDS, preferred, name, refusal)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def frozen_product(x: jax.Array, t: Packed, backend: str) -> jax.Array:
    module = load(backend)
    return module.nf4_matmul(x, operand(module, t))


def frozen_forward(x: jax.Array, t: Packed, backend: str) -> tuple[jax.Array, Packed]:
    return frozen_product(x, t, backend), t


def frozen_backward(backend: str, t: Packed, dy: jax.Array) -> tuple[jax.Array, Packed]:
    module = load(backend)
    return module.nf4_matmul(dy, operand(module, t.mT)), jax.tree.map(zero_cotangent, t)


frozen_product.defvjp(frozen_forward, frozen_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dense_product(x: jax.Array, w: jax.Array, contract_w: int, out_dtype: jnp.dtype) -> jax.Array:
    """x [..., K] times w over its axis `contract_w` of length K, in out_dtype. w is [K, N], or by output [N, K].

    JAX's gradient of a product with float32 output is products in float32. Here the cotangent is first rounded to the
    dtype of x, so that the backward products run on 16-bit units too.
    """
    return dense_dot(x, w, contract_w, out_dtype)


def takes_avx512(x: jax.Array, w: jax.Array) -> bool:
    """Whether the product of a dense matrix runs in the backend `avx512`: if it is set, or by default the best."""
    name = backends.named("nf4_matmul")
    if name is None and backends.platform() == "cpu" and avx512.is_best(x, w.shape):
        name = backends.best("nf4_matmul", {"cpu": ("avx512", "xla")}, lambda _: avx512.refusal(x, w))
    return name == "avx512" and avx512.refusal(x, w) is None


def dense_dot(x: jax.Array, w: jax.Array, contract_w: int = 0, out_dtype: jnp.dtype | type = jnp.float32) -> jax.Array:
    """x [..., K] times w over its axis `contract_w` of length K, in out_dtype; without a gradient of its own.

    Raises ValueError if the lengths differ: a kernel would read beyond the matrix.
    """
    if x.shape[-1] != w.shape[contract_w]:
        raise ValueError(f"A product over axis {contract_w} of {w.shape} needs rows of that length; got {x.shape}.")
    rows = math.prod(x.shape[:-1])
    if takes_avx512(x, w):
        exact = out_dtype if out_dtype in (jnp.bfloat16, jnp.float32) else jnp.float32
        return avx512.product(x, w, w.shape[1 - contract_w], contract_w == 1, exact).astype(out_dtype)
    if backends.platform() != "cpu" or x.dtype != jnp.bfloat16 or rows >= FEW_ROWS:
        return dot(x, w, contract_w).astype(out_dtype)
    x_RK = x.reshape(rows, x.shape[-1])
    if rows == 1 and contract_w == 1:
        # XLA:CPU fuses the transpose and the casts into this product; for more rows it would copy w in float32
        y = jnp.dot(x_RK, w.T, preferred_element_type=jnp.float32)
    else:
        y = dot(jnp.pad(x_RK, ((0, FEW_ROWS - rows), (0, 0))), w, contract_w)[:rows]
    return y.astype(out_dtype).reshape(*x.shape[:-1], w.shape[1 - contract_w])


def dense_forward(
    x: jax.Array, w: jax.Array, contract_w: int, out_dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return dense_product(x, w, contract_w, out_dtype), (x, w)


def dense_backward(
    contract_w: int, out_dtype: jnp.dtype, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del out_dtype
    x, w = residuals
    dy = dy.astype(x.dtype)
    rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dw = dot_rows(*(rows if contract_w == 0 else rows[::-1]))
    return dense_dot(dy, w, 1 - contract_w, x.dtype), dw.astype(w.dtype)


dense_product.defvjp(dense_forward, dense_backward)


def matmul(
    x: Float[Array, "*rows D"],
    w_DF: Float[Array, "D F"] | NF4Tensor | RowMajor | LayerOf | ByOutput,
    out_dtype: jnp.dtype | type | str | None = None,
    *,
    backend: str | None = None,
) -> Float[Array, "*rows F"]:
    """Product in `out_dtype` (that of x if None), accumulated in float32.

    A dense weight is cast to the dtype of x; its product is XLA's, or runs in `avx512` where that is the best. An
    NF4Tensor or RowMajor of one [D, F] unit, or a `LayerOf` of them, is frozen: it gets no gradient, and the backward
    pass keeps its packed bytes, not its values.

    Args:
      backend: for a 4-bit weight, one of BACKENDS; None takes that of `backends.use`, else the platform's best that can
        take the operands. A named backend never falls back.

    Raises:
      ValueError: shapes that do not fit, or an unknown backend.
      NotImplementedError: the named backend does not take these operands.
    """
    w: Any = as_layer(w_DF)
    if w.ndim != 2 or w.shape[0] != x.shape[-1]:
        raise ValueError(f"matmul needs x [..., D] and w [D, F]; got {x.shape} and {w.shape}.")
    result = jnp.dtype(out_dtype or x.dtype)
    if 0 in (*x.shape, *w.shape):
        return jnp.zeros((*x.shape[:-1], w.shape[1]), result)
    if isinstance(w, ByOutput):
        return dense_product(*vary_alike(x, w.array.astype(x.dtype)), 1, result)
    if isinstance(w, LayerOf) and not w.is_packed:
        w = w.value()
    if isinstance(w, NF4Tensor | LayerOf):
        y: jax.Array = frozen_product(*vary_alike(x, w), pick_backend(backend, x, w))
        return y.astype(result)
    return dense_product(*vary_alike(x, w.astype(x.dtype)), 0, result)
