"""Blocks of queries and keys, and which blocks of keys a block of queries can see: the range of a kernel's loop."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

SPLASH_BLOCKS = (512, 256, 128)
"""Queries and keys of a block of splash attention; the first one that divides the length is used."""


def splash_block(length: int) -> int | None:
    """Queries and keys of a block of splash attention, None if no block divides the length."""
    return next((size for size in SPLASH_BLOCKS if length % size == 0), None)


def padded(x: jax.Array, block: int, axis: int, mode: Literal["edge", "constant"] = "edge") -> jax.Array:
    """x up to a multiple of `block` along `axis`, with its last element repeated, or with zeros ("constant").

    Queries that are padding give rows that nobody reads. Keys that are padding come after all queries.
    """
    widths = [(0, -size % block if at == axis else 0) for at, size in enumerate(x.shape)]
    return jnp.pad(x, widths, mode=mode) if x.shape[axis] % block else x


def overlap(
    query_ids_BT: Int[Array, "B T"],
    key_ids_BS: Int[Array, "B S"],
    offset: Int[Array, ""],
    window: int | None,
    sizes: tuple[int, int],
) -> Bool[Array, "B I J"]:
    """Whether block i of queries may attend to block j of keys; `sizes` has the queries and keys of a block.

    True where the smallest and largest ids of both blocks overlap, and causality and the window allow it. Segments are
    usually in order, and then no block is visited in vain.
    """
    rows, columns = sizes
    q_BIr = query_ids_BT.reshape(query_ids_BT.shape[0], -1, rows)
    k_BJc = key_ids_BS.reshape(key_ids_BS.shape[0], -1, columns)
    low_BI1, high_BI1 = (edge(q_BIr, axis=-1)[:, :, None] for edge in (jnp.min, jnp.max))
    low_B1J, high_B1J = (edge(k_BJc, axis=-1)[:, None] for edge in (jnp.min, jnp.max))
    first_I1 = offset + rows * jnp.arange(q_BIr.shape[1])[:, None]
    key_1J = columns * jnp.arange(k_BJc.shape[1])[None]
    near_IJ = key_1J < first_I1 + rows
    if window is not None:
        near_IJ &= key_1J + columns > first_I1 - window + 1
    return near_IJ[None] & (low_B1J <= high_BI1) & (high_B1J >= low_BI1)


def ranges(visible_BIJ: Bool[Array, "B I J"]) -> tuple[Int[Array, "B I"], Int[Array, "B I"]]:
    """(first j that is True, last such j + 1) for each i; an empty range where there is none."""
    count = visible_BIJ.shape[-1]
    first_BI = jnp.argmax(visible_BIJ, axis=-1)
    stop_BI = count - jnp.argmax(visible_BIJ[..., ::-1], axis=-1)
    some_BI = jnp.any(visible_BIJ, axis=-1)
    return first_BI.astype(jnp.int32), jnp.where(some_BI, stop_BI, first_BI).astype(jnp.int32)
