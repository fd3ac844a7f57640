"""4-bit NormalFloat (NF4) with optional double quantisation, bit for bit as bitsandbytes stores it."""

from bimedix_jax.kernels.nf4.api import dequantize, quantize
from bimedix_jax.kernels.nf4.tensor import NF4Tensor

__all__ = ["NF4Tensor", "dequantize", "quantize"]
