"""A 4-bit base: packing the linear layers of a model that is already in memory, or of one that has shapes only."""

import logging

import jax
from flax import nnx

from bimedix_jax.adapters import linears
from bimedix_jax.errors import BimedixError
from bimedix_jax.kernels.nf4 import NF4Tensor, quantize
from bimedix_jax.kernels.nf4.api import all_finite, flushed_blocks
from bimedix_jax.models.config import QUANTISED
from bimedix_jax.models.mixtral import Mixtral

log = logging.getLogger(__name__)


def pack(w: jax.Array | jax.ShapeDtypeStruct, double_quant: bool = True) -> NF4Tensor:
    """NF4 of a stacked weight [..., in, out], each matrix quantised on its own, as PyTorch stores it: (out, in)."""

    def transpose_and_pack(w: jax.Array) -> NF4Tensor:
        return quantize(w.mT, double_quant=double_quant, batch_dims=w.ndim - 2).mT

    return jax.eval_shape(transpose_and_pack, w) if isinstance(w, jax.ShapeDtypeStruct) else transpose_and_pack(w)


def quantise_base(model: Mixtral, double_quant: bool = True) -> Mixtral:
    """The same model with its linear layers and experts in NF4; every other variable is shared, not copied.

    A model built by `Mixtral(config)` has shapes only; so has the result.

    Raises:
      BimedixError: a weight is NaN or infinite.
    """
    packed = nnx.merge(*nnx.split(model), copy=True)
    flushed = 0
    for path, layer in linears(packed).items():
        w = layer.w.get_value()
        if path[-1] not in QUANTISED or isinstance(w, NF4Tensor):
            continue
        if isinstance(w, jax.Array):
            if not all_finite(w):
                raise BimedixError(
                    f"{'.'.join(path)} holds NaN or infinity, which has no 4-bit code; start from other weights."
                )
            flushed += int(flushed_blocks(w.mT, batch_dims=w.ndim - 2))
        layer.w.set_value(pack(w, double_quant))
    if flushed:
        log.warning("%d 4-bit blocks hold denormal weights, which became zeros.", flushed)
    return packed
