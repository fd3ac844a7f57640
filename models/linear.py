"""Linear layers: a dense or NF4 base plus an optional low-rank delta."""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.expert_mlp import out_of_stacks
from bimedix_jax.kernels.grouped_low_rank import grouped_low_rank
from bimedix_jax.kernels.grouped_matmul import grouped_matmul
from bimedix_jax.kernels.layer_scan import InPlace
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.rows import RowMajor
from bimedix_jax.kernels.nf4_matmul import matmul
from bimedix_jax.kernels.stacks import LayerOf
from bimedix_jax.models import shards
from bimedix_jax.models.axes import EXPERTS, LAYERS, RANK


def placeholder(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: jnp.dtype | str) -> nnx.Param:
    """A parameter without storage. Conversion, initialisation and sharding use its shape and axes."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), axes=axes)


class TrainedParam(nnx.Param):
    """A base weight that is trained together with the adapters."""


class Lora(nnx.Module):
    """Factors of one low-rank delta, float32.

    Attributes:
      a, b: [..., in, R] and [..., R, out] with the leading axes of the weight. If only S of its matrices are adapted:
        [S, in, R] and [S, R, out].
      scale: multiplies the delta.
      slots: row-major indices, into the weight's leading axes, of the S adapted matrices; None: all of them.
      dropout: share of the inputs that are set to zero after `with_dropout`.
      key: PRNG key of the dropout, one for each layer; None outside of training.
    """

    def __init__(
        self,
        a: nnx.LoRAParam,
        b: nnx.LoRAParam,
        scale: float,
        slots: tuple[int, ...] | None = None,
        dropout: float = 0.0,
    ):
        self.a = a
        self.b = b
        self.scale = scale
        self.slots = slots
        self.dropout = dropout
        self.key: nnx.Variable | None = nnx.data(None)

    def dropped(self, x: jax.Array) -> jax.Array:
        """x; in training, some features are dropped and the others scaled up."""
        if self.key is None:
            return x
        keep = 1 - self.dropout
        kept = jax.random.bernoulli(self.key.get_value(), keep, x.shape)
        return jnp.where(kept, x / jnp.asarray(keep, x.dtype), jnp.zeros((), x.dtype))


def fill_slots(layers: nnx.Module, prefix: str) -> None:
    """Expands every adapter in `layers` to the leading axes of its weight, in place, with zeros for other matrices.

    `prefix` is the path of the layers in the model.
    """
    for path, layer in nnx.iter_modules(layers):
        if not isinstance(layer, Linear | ExpertLinear) or layer.lora is None or layer.lora.slots is None:
            continue
        lora = layer.lora
        axes = layer.w.get_metadata("axes")[:-2]  # slots number the experts of all shards
        here = shards.gathered_lead(shards.dotted(prefix, (*path, "w")), layer.w.get_value())
        lead = [size * shards.count(axis) for axis, size in zip(axes, here, strict=False)]
        for factor in (lora.a, lora.b):
            some = factor.get_value()
            every = jnp.zeros((math.prod(lead), *some.shape[1:]), some.dtype)
            every = every.at[jnp.asarray(lora.slots)].set(some, unique_indices=True)
            every = every.reshape(*lead, *some.shape[1:])
            for dimension, axis in enumerate(axes):
                every = shards.own_part(axis, every, dimension)
            factor.set_value(every)
        lora.slots = None


def read_in_place(layers: nnx.Module, prefix: str) -> None:
    """Marks the weights of stacked layers, in place, that the loop over layers need not copy: packed ones and experts.

    Not those that a shard gathers for each layer. `prefix` is the path of the layers in the model.
    """
    for path, layer in nnx.iter_modules(layers):
        if not isinstance(layer, Linear | ExpertLinear):
            continue
        w = layer.w.get_value()
        readable = isinstance(w, NF4Tensor | RowMajor) or (isinstance(w, jax.Array) and isinstance(layer, ExpertLinear))
        if readable and not shards.is_gathered(shards.dotted(prefix, (*path, "w"))):
            layer.w.set_value(InPlace(w))
        # on a CPU, copies of factors are small; a scale would have to be multiplied into a copy
        lora = layer.lora if isinstance(layer, ExpertLinear) and backends.platform() != "cpu" else None
        if lora is not None and lora.scale == 1 and lora.key is None:
            for name, factor in (("a", lora.a), ("b", lora.b)):
                if not shards.is_gathered(shards.dotted(prefix, (*path, "lora", name))):
                    factor.set_value(InPlace(factor.get_value()))


def with_dropout(model: nnx.Module, key: jax.Array) -> None:
    """Turns on the dropout of every adapter of `model`, in place. Randomness depends on `key` and the layer's name.

    The output head runs on chunks of the sequence, and drops the same features in each chunk.
    """
    for path, layer in nnx.iter_modules(model):
        if not isinstance(layer, Linear | ExpertLinear) or layer.lora is None or not layer.lora.dropout:
            continue
        own = jax.random.fold_in(key, zlib.crc32(".".join(map(str, path)).encode()))
        lead = layer.w.get_value().shape[:-2]
        layer.lora.key = nnx.Variable(jax.random.split(own, lead[0]) if lead else own)


class Linear(nnx.Module):
    """y = x w + scale * (x a) b, for w [in, out]."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: jnp.dtype | str):
        self.w = placeholder(shape, axes, dtype)
        self.lora: Lora | None = nnx.data(None)

    def __call__(
        self, x: Float[Array, "*rows D"], out_dtype: jnp.dtype | type | str | None = None
    ) -> Float[Array, "*rows F"]:
        """The product in `out_dtype`, by default the dtype of x."""
        y = matmul(x, self.w.get_value(), out_dtype)
        if self.lora is None:
            return y
        delta = matmul(matmul(self.lora.dropped(x), self.lora.a[...]), self.lora.b[...])
        return y + delta * jnp.asarray(self.lora.scale, y.dtype)


class ExpertLinear(nnx.Module):
    """One matrix and one adapter for each expert: w [E, in, out], on a shard [e, in, out]; rows sorted by expert."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: jnp.dtype | str):
        self.w = placeholder(shape, axes, dtype)
        self.lora: Lora | None = nnx.data(None)

    @property
    def drops(self) -> bool:
        """Whether the adapter's dropout is on."""
        return self.lora is not None and self.lora.key is not None

    def factors(self, dtype: jnp.dtype) -> tuple[Any, Any] | None:
        """(a [e, in, R], scale * b [e, R, out]) in `dtype`; layers of stacks as they are, since the operation casts."""
        if self.lora is None:
            return None
        if isinstance(self.lora.b.get_value(), LayerOf):
            return self.lora.a.get_value(), self.lora.b.get_value()
        scale = jnp.asarray(self.lora.scale, dtype)
        a = jax.tree.map(lambda x: x.astype(dtype), self.lora.a.get_value())  # a may be Unstacked
        return a, jax.tree.map(lambda x: x.astype(dtype) * scale, self.lora.b.get_value())

    def __call__(self, x_MD: Float[Array, "M D"], group_sizes_e: Int[Array, "e"]) -> Float[Array, "M F"]:
        [w] = out_of_stacks((self.w.get_value(),), in_place=True)
        y_MF = grouped_matmul(x_MD, w, group_sizes_e)
        if self.lora is None:
            return y_MF
        delta_MF = grouped_low_rank(self.lora.dropped(x_MD), self.lora.a[...], self.lora.b[...], group_sizes_e)
        return y_MF + delta_MF * jnp.asarray(self.lora.scale, y_MF.dtype)


def lora_axes(axes: tuple[str | None, ...]) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """Logical axes of (a, b) for a weight with these axes. Leading axes are the same; the rank is not sharded."""
    leading = tuple(axis for axis in axes[:-2] if axis in (LAYERS, EXPERTS))
    return (*leading, axes[-2], RANK), (*leading, RANK, axes[-1])
