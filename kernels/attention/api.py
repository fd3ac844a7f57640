"""attention: picks a backend. Each backend is a module of this folder and defines its gradients."""

import importlib
from types import ModuleType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.attention.cache import Cached, HeadMajor

BACKENDS = ("avx512", "xla", "triton", "splash")
"""Modules of this folder; a backend is a module with `attention` and optionally `refusal`."""
PREFERRED = {"gpu": ("triton", "xla"), "tpu": ("splash", "xla")}
"""Backends of each accelerator, best first; the last one takes all operands."""
TREES = ("avx512", "xla")
"""Backends that take ancestors."""
SAVED = "attention"
"""Name, in checkpoint policies, of the output and the denominators that the kernels' backward passes need. The policy
"experts" saves them (models/remat.py): recomputing them would run the whole forward kernel."""
FEW_QUERIES = 16
"""Below this number of queries a row, XLA's products read the cache once, and their scores are small. A kernel would
have one program for each head, too few to read a long cache at a GPU's full bandwidth."""


def load(backend: str) -> ModuleType:
    """Imports a backend on first use: Pallas alone takes as long to import as JAX."""
    return importlib.import_module(f"bimedix_jax.kernels.attention.{backend}")


def check(
    q_BTQH: jax.Array,
    k_BSGH: Cached,
    v_BSGH: Cached,
    query_ids_BT: jax.Array,
    key_ids_BS: jax.Array,
    ancestor_ids_BTA: jax.Array | None,
    window: int | None,
) -> None:
    """Raises ValueError if shapes do not fit, ids are no integers, or the window is no number above 0."""
    if q_BTQH.ndim != 4 or k_BSGH.ndim != 4 or 0 in k_BSGH.shape[2:]:
        raise ValueError(
            f"attention needs q [B, T, Q, H] and k [B, S, G, H] with heads; got {q_BTQH.shape} and {k_BSGH.shape}."
        )
    given = [query_ids_BT, key_ids_BS, *([] if ancestor_ids_BTA is None else [ancestor_ids_BTA])]
    if not all(jnp.issubdtype(ids.dtype, jnp.integer) for ids in given):
        raise ValueError(f"attention needs integers as ids; got {', '.join(str(ids.dtype) for ids in given)}.")
    batch, length, heads, width = q_BTQH.shape
    slots, groups = k_BSGH.shape[1:3]
    expected = [(batch, slots, groups, width)] * 2 + [(batch, length), (batch, slots)]
    shapes = [tuple(x.shape) for x in (k_BSGH, v_BSGH, query_ids_BT, key_ids_BS)]
    ancestors = (batch, length) if ancestor_ids_BTA is None else tuple(ancestor_ids_BTA.shape[:2])
    if shapes != expected or heads % groups or ancestors != (batch, length):
        raise ValueError(
            f"attention needs q [B, T, Q, H], k and v [B, S, G, H] with Q a multiple of G, and ids [B, T], [B, S] and "
            f"[B, T, A]; got q {tuple(q_BTQH.shape)}, k {shapes[0]}, v {shapes[1]}, and ids {shapes[2]}, {shapes[3]}"
            f"{'' if ancestor_ids_BTA is None else f' and {tuple(ancestor_ids_BTA.shape)}'}."
        )
    if window is not None and (int(window) != window or window < 1):
        raise ValueError(f"a window of attention is a number of keys, the query's own included; got {window}.")


@jax.named_scope("attention_products")  # bimedix_jax/plan finds the products in a compiled program by this name
def attention(
    q_BTQH: Float[Array, "B T Q H"],
    k_BSGH: Float[Array, "B S G H"] | HeadMajor,
    v_BSGH: Float[Array, "B S G H"] | HeadMajor,
    query_ids_BT: Int[Array, "B T"],
    key_ids_BS: Int[Array, "B S"],
    *,
    offset: Int[Array, ""] | None = None,
    window: int | None = None,
    backend: str | None = None,
    ancestor_ids_BTA: Int[Array, "B T A"] | None = None,
) -> Float[Array, "B T Q H"]:
    """Causal softmax attention within segments.

    Args:
      q_BTQH: queries; Q is a multiple of the number G of key heads, and query head h reads key head h // (Q / G).
      k_BSGH, v_BSGH: keys and values, cast to the dtype of q; from a cache also HeadMajor, which gets no gradient.
      query_ids_BT, key_ids_BS: segment of each query and key.
      offset: slot of the first query among the keys, for decoding with a cache; None if queries and keys are the same
        tokens.
      window: maximum of keys that a query attends to, itself included.
      ancestor_ids_BTA: other segments that each query attends to, for tree attention (arXiv 2305.09781): those that its
        own segment continues, filled up with its own. Only the backends in TREES take them.
      backend: one of BACKENDS; None takes that of `backends.use`, else the platform's best that can take the
        operands. A named backend never falls back.

    Returns:
      [B, T, Q, H] in the dtype of q; scores, softmax and sums are float32.

    A query that sees no key has no defined result.

    Raises:
      ValueError: shapes that do not fit, a window below 1, or an unknown backend.
      NotImplementedError: the named backend does not take these operands.
    """
    check(q_BTQH, k_BSGH, v_BSGH, query_ids_BT, key_ids_BS, ancestor_ids_BTA, window)
    if offset is None and k_BSGH.shape[1] != q_BTQH.shape[1]:
        raise ValueError(
            f"attention of {q_BTQH.shape[1]} queries to {k_BSGH.shape[1]} keys needs the offset of the first query."
        )
    operands: tuple[jax.Array, Cached, Cached] = (q_BTQH, k_BSGH, v_BSGH)

    def refusal(name: str) -> str | None:
        module = load(name)
        if not hasattr(module, "refusal"):
            return None
        if ancestor_ids_BTA is not None and name not in TREES:
            return "its mask compares one segment, and tree attention has several."
        return module.refusal(*operands, offset is not None)

    few = q_BTQH.shape[1] < FEW_QUERIES
    own = not few and backends.platform() == "cpu" and load("avx512").is_best(q_BTQH.dtype, q_BTQH.shape[-1])
    accelerators = {} if few or ancestor_ids_BTA is not None else PREFERRED
    preferred = {"cpu": ("avx512", "xla") if own else ("xla",), **accelerators}
    name = backends.pick("attention", BACKENDS, preferred, backend, refusal)
    if q_BTQH.size == 0:
        return jnp.zeros(q_BTQH.shape, q_BTQH.dtype)
    masked = (query_ids_BT, key_ids_BS, offset, window, *([] if ancestor_ids_BTA is None else [ancestor_ids_BTA]))
    return load(name).attention(*operands, *masked)
