"""A sequence of layers of one structure as one operation: the loop over a model's blocks."""

from bimedix_jax.kernels.layer_scan.api import layer_scan
from bimedix_jax.kernels.layer_scan.layers import Body, InPlace

__all__ = ["Body", "InPlace", "layer_scan"]
