"""Linear layers: a dense or NF4 base plus an optional low-rank delta."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bimedix_jax.kernels.grouped_low_rank import grouped_low_rank
from bimedix_jax.kernels.grouped_matmul import grouped_matmul
from bimedix_jax.kernels.nf4_matmul import matmul
from bimedix_jax.models.axes import EXPERTS, LAYERS, RANK


def placeholder(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: jnp.dtype | str) -> nnx.Param:
    """A parameter without storage: conversion, initialisation and sharding fill or read it by shape and axes."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), axes=axes)


class Lora(nnx.Module):
    """Factors of one low-rank delta, float32: a [..., in, R], b [..., R, out]."""

    def __init__(self, a: nnx.LoRAParam, b: nnx.LoRAParam, scale: float):
        self.a = a
        self.b = b
        self.scale = scale


class Linear(nnx.Module):
    """y = x w + scale * (x a) b, for w [in, out]."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: jnp.dtype | str):
        self.w = placeholder(shape, axes, dtype)
        self.lora: Lora | None = nnx.data(None)

    def __call__(
        self, x: Float[Array, "*rows D"], out_dtype: jnp.dtype | type | None = None
    ) -> Float[Array, "*rows F"]:
        """The product in `out_dtype`, that of x if None."""
        y = matmul(x, self.w.get_value(), out_dtype)
        if self.lora is None:
            return y
        delta = matmul(matmul(x, self.lora.a[...]), self.lora.b[...])
        return y + delta * jnp.asarray(self.lora.scale, y.dtype)


class ExpertLinear(nnx.Module):
    """One matrix, and one adapter, an expert: w [E, in, out]; rows come sorted by expert."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: jnp.dtype | str):
        self.w = placeholder(shape, axes, dtype)
        self.lora: Lora | None = nnx.data(None)

    def __call__(self, x_MD: Float[Array, "M D"], group_sizes_E: Int[Array, "E"]) -> Float[Array, "M F"]:
        y_MF = grouped_matmul(x_MD, self.w.get_value(), group_sizes_E)
        if self.lora is None:
            return y_MF
        delta_MF = grouped_low_rank(x_MD, self.lora.a[...], self.lora.b[...], group_sizes_E)
        return y_MF + delta_MF * jnp.asarray(self.lora.scale, y_MF.dtype)


def lora_axes(axes: tuple[str | None, ...]) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """Logical axes of (a, b) for a weight with these axes: leading ones are shared, the rank is never sharded."""
    leading = tuple(axis for axis in axes[:-2] if axis in (LAYERS, EXPERTS))
    return (*leading, axes[-2], RANK), (*leading, RANK, axes[-1])
