"""Quantises the linear layers of a model to 4 bits: of a model in memory, or of one that has shapes only."""

import logging

import jax
from flax import nnx

from bimedix_jax.adapters import linears
from bimedix_jax.errors import BimedixError
from bimedix_jax.kernels.nf4 import NF4Tensor, quantize
from bimedix_jax.kernels.nf4.api import all_finite, flushed_blocks, quantized_shapes
from bimedix_jax.kernels.nf4.rows import RowMajor
from bimedix_jax.models.config import MIXED, QUANTISED, Storage
from bimedix_jax.models.mixtral import Mixtral

log = logging.getLogger(__name__)


def pack(w: jax.Array | jax.ShapeDtypeStruct, double_quant: bool = True) -> NF4Tensor:
    """NF4 of a stacked weight [..., in, out]. Each matrix is quantised separately, in PyTorch's order (out, in)."""
    if isinstance(w, jax.ShapeDtypeStruct):
        *batch, width_in, width_out = w.shape
        shape = (*batch, width_out, width_in)
        return quantized_shapes(shape, str(w.dtype), double_quant=double_quant, batch_dims=len(batch)).mT
    return quantize(w.mT, double_quant=double_quant, batch_dims=w.ndim - 2).mT


def storage_of(model: Mixtral) -> Storage:
    """The storage of a model's base."""
    values = [layer.w.get_value() for path, layer in linears(model).items() if path[-1] in QUANTISED]
    packed = [isinstance(value, NF4Tensor | RowMajor) for value in values]
    base = "nf4" if all(packed) else MIXED if any(packed) else str(values[0].dtype)
    return Storage(base=base, dtype=model.dtype)


def quantise_base(model: Mixtral, double_quant: bool = True) -> Mixtral:
    """The same model with its linear layers and experts in NF4. All other variables are shared, not copied.

    The result has shapes only if `model` does, as `Mixtral(config)` builds it.

    Raises:
      BimedixError: a weight is NaN or infinite.
    """
    packed = nnx.merge(*nnx.split(model), copy=True)
    if model.lora is not None:
        packed.trained_over = model.trained_over or storage_of(model)
    flushed = 0
    for path, layer in linears(packed).items():
        w = layer.w.get_value()
        if path[-1] not in QUANTISED or isinstance(w, NF4Tensor | RowMajor):
            continue
        if isinstance(w, jax.Array):
            if not all_finite(w):
                raise BimedixError(
                    f"{'.'.join(path)} contains NaN or infinity, which NF4 cannot encode; use other weights."
                )
            flushed += int(flushed_blocks(w.mT, batch_dims=w.ndim - 2))
        layer.w.set_value(pack(w, double_quant))
    if flushed:
        log.warning("%d 4-bit blocks contain denormal weights, which became zeros.", flushed)
    return packed
