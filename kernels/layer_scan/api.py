"""layer_scan: checks the operands and chooses a backend."""

from typing import Any

import jax
from jax import lax

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.layer_scan import bits, reference, unrolled
from bimedix_jax.kernels.layer_scan.layers import Body, parts_of, unmarked
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.rows import RowMajor
from bimedix_jax.kernels.unstacked import is_unstacked

BACKENDS = {"scan": reference, "bits": bits, "unrolled": unrolled}
PREFERRED = {"cpu": ("bits", "unrolled"), "gpu": ("scan", "unrolled"), "tpu": ("scan", "unrolled")}
"""Backends of each platform, best first, for stacked operands. With Unstacked ones, layers are always unrolled."""
READ_IN_PLACE: dict[str, tuple[type[Any], ...]] = {"bits": (jax.Array, NF4Tensor), "scan": (NF4Tensor, RowMajor)}
"""What each backend does not slice from its stack, if InPlace marks it."""
DENSE_IN_PLACE = {"gpu": "scan", "tpu": "scan"}
"""Where dense arrays are read in place too if there is a memory, since nothing is differentiated then."""
EVERYWHERE_UNROLLED = dict.fromkeys(PREFERRED, ("unrolled",))


def pick_backend(name: str | None, layers: Any, memory: Any) -> str:
    separate = any(map(is_unstacked, parts_of((layers, memory))))
    preferred = EVERYWHERE_UNROLLED if separate else PREFERRED
    return backends.pick(
        "layer_scan", tuple(BACKENDS), preferred, name, lambda backend: BACKENDS[backend].refusal(layers, memory)
    )


def layer_scan(
    body: Body, constants: Any, x: jax.Array, layers: Any, memory: Any = None, *, backend: str | None = None
) -> tuple[jax.Array, Any, Any]:
    """Runs x through all layers: `x, out, slot = body(constants, x, layer, slot)` for each of them.

    Differentiable in x and in floating-point arrays of `layers`. `constants` and `memory` get no gradient.

    Args:
      body: one layer. It must read all arrays from its arguments: it must not capture values that are being traced.
      constants: what every layer reads, such as positions and segments.
      x: the activations; the same shape and dtype before and after each layer.
      layers: a pytree of arrays with a leading axis of layers: stacked, Unstacked, or marked by InPlace. The body gets
        one layer's values. Of marked weights it gets a `LayerOf` instead, with the backends "bits" and "scan": if they
        are packed, or if they are dense and nothing is differentiated ("scan" on a GPU or TPU only).
      memory: a pytree, stacked or Unstacked, of values that each layer reads and replaces, such as a cache of keys
        and values; with None, each slot is None.
      backend: one of BACKENDS; None takes that of `backends.use`, else the platform's best that can take the operands.
        A named backend never falls back.

    Returns:
      (x after the last layer, the layers' `out` stacked on a leading axis, the new memory, in the form of `memory`).

    Raises:
      ValueError: arrays with different numbers of layers, or an unknown backend.
      NotImplementedError: the named backend does not take these operands.
    """
    plain = unmarked(layers)
    depths = {leaf.shape[0] for leaf in parts_of((plain, memory))}
    if len(depths) != 1:
        raise ValueError(
            f"layer_scan needs arrays with the same number of layers on their leading axes; got {sorted(depths)}."
        )
    name = pick_backend(backend, plain, memory)
    kinds = READ_IN_PLACE.get(name, ())
    if memory is not None and DENSE_IN_PLACE.get(backends.platform()) == name:
        kinds += (jax.Array,)
    given = unmarked(layers, kinds) if kinds else plain
    constants, memory = lax.stop_gradient((constants, memory))
    return BACKENDS[name].layer_scan(body, constants, x, given, memory, depths.pop())
