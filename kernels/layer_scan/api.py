"""layer_scan: checks the operands and picks a backend."""

from typing import Any

import jax
from jax import lax

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.layer_scan import bits, reference, unrolled
from bimedix_jax.kernels.layer_scan.layers import Body, parts_of, unmarked
from bimedix_jax.kernels.unstacked import is_unstacked

BACKENDS = {"scan": reference, "bits": bits, "unrolled": unrolled}
PREFERRED = {"cpu": ("bits", "unrolled"), "gpu": ("scan", "unrolled"), "tpu": ("scan", "unrolled")}
"""Backends of each platform, best first, for stacked operands; Unstacked ones run unrolled everywhere."""
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
    """Runs x through all layers: x, out, slot = body(constants, x, layer, slot) for each of them.

    Differentiable in x and in floating-point arrays of `layers`. `constants` and `memory` get no gradient.

    Args:
      body: one layer. It must read arrays through its arguments only, not from an enclosing function that is traced.
      constants: what every layer reads, such as positions and segments.
      x: the activations; the same shape and dtype before and after each layer.
      layers: a pytree of arrays with a leading axis of layers: stacked, Unstacked, or marked by InPlace. The body gets
        one layer's values; of an array marked by InPlace it gets a `LayerOf` where the backend is "bits" and nothing is
        differentiated, else the values.
      memory: a pytree, stacked or Unstacked, of what each layer reads and replaces, such as a cache of keys and
        values; None where there is none, and then each slot is None.
      backend: one of BACKENDS; None takes the one of `backends.use`, else the platform's best that takes the operands.
        A named one never falls back.

    Returns:
      (x after the last layer, the layers' `out` stacked on a leading axis, the memory in the form in which it came).

    Raises:
      ValueError: arrays that differ in their number of layers, or an unknown backend.
      NotImplementedError: the named backend does not take these operands.
    """
    plain = unmarked(layers)
    depths = {leaf.shape[0] for leaf in parts_of((plain, memory))}
    if len(depths) != 1:
        raise ValueError(
            f"layer_scan needs arrays with one number of layers on their leading axes; got {sorted(depths)}."
        )
    name = pick_backend(backend, plain, memory)
    given = unmarked(layers, keep_arrays=True) if name == "bits" else plain
    constants, memory = lax.stop_gradient((constants, memory))
    return BACKENDS[name].layer_scan(body, constants, x, given, memory, depths.pop())
