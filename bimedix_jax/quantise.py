"""A 4-bit base: packing the linear layers of a model that is already in memory, or of one that has shapes only."""

import jax
from flax import nnx

from bimedix_jax.kernels.nf4 import NF4Tensor, quantize
from bimedix_jax.models.config import QUANTISED
from bimedix_jax.models.mixtral import Mixtral


def pack(w: jax.Array | jax.ShapeDtypeStruct, double_quant: bool = True) -> NF4Tensor:
    """NF4 of a stacked weight [..., in, out], quantised as the (out, in) matrix that PyTorch stores, each on its own."""

    def transpose_and_pack(w: jax.Array) -> NF4Tensor:
        return quantize(w.mT, double_quant=double_quant, batch_dims=w.ndim - 2).mT

    return jax.eval_shape(transpose_and_pack, w) if isinstance(w, jax.ShapeDtypeStruct) else transpose_and_pack(w)


def quantise_base(model: Mixtral, double_quant: bool = True) -> Mixtral:
    """The same model with its linear layers and experts in NF4; every other variable is shared, not copied.

    A model built by `Mixtral(config)` has shapes only; so has the result.
    """
    packed = nnx.merge(*nnx.split(model), copy=True)
    for path, variable in nnx.to_flat_state(nnx.state(packed, nnx.Param)):
        if path[-1] == "w" and path[-2] in QUANTISED and not isinstance(variable.get_value(), NF4Tensor):
            find(packed, path[:-1]).w.set_value(pack(variable.get_value(), double_quant))
    return packed


def find(model: nnx.Module, path: tuple) -> nnx.Module:
    """The submodule at a path of attribute names."""
    for name in path:
        model = getattr(model, str(name))
    return model
