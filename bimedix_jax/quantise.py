"""A 4-bit base: packing the linear layers of a model that is already in memory, or of one that has shapes only."""

import jax
from flax import nnx

from bimedix_jax.adapters import linears
from bimedix_jax.kernels.nf4 import NF4Tensor, quantize
from bimedix_jax.models.config import QUANTISED
from bimedix_jax.models.mixtral import Mixtral


def pack(w: jax.Array | jax.ShapeDtypeStruct, double_quant: bool = True) -> NF4Tensor:
    """NF4 of a stacked weight [..., in, out], each matrix quantised on its own, as PyTorch stores it: (out, in)."""

    def transpose_and_pack(w: jax.Array) -> NF4Tensor:
        return quantize(w.mT, double_quant=double_quant, batch_dims=w.ndim - 2).mT

    return jax.eval_shape(transpose_and_pack, w) if isinstance(w, jax.ShapeDtypeStruct) else transpose_and_pack(w)


def quantise_base(model: Mixtral, double_quant: bool = True) -> Mixtral:
    """The same model with its linear layers and experts in NF4; every other variable is shared, not copied.

    A model built by `Mixtral(config)` has shapes only; so has the result.
    """
    packed = nnx.merge(*nnx.split(model), copy=True)
    for path, layer in linears(packed).items():
        if path[-1] in QUANTISED and not isinstance(layer.w.get_value(), NF4Tensor):
            layer.w.set_value(pack(layer.w.get_value(), double_quant))
    return packed
