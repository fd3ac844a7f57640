"""Which rows each step of a kernel over row tiles works on, for a grid of static size.

There are two ways to divide rows that are sorted by expert into tiles. On a TPU, blocks must start at multiples of
their height. A block in which one group ends and the next begins is visited once for each of the two groups. M rows in
E groups need at most ceil(M / height) + E - 1 visits; unneeded visits have no rows. On a GPU, tiles may start at any
row: the first tile of each group starts at its first row, and so does the first tile of the rows after the last group.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class Visits(NamedTuple):
    """int32 arrays [T]: visit t multiplies rows [start, stop) of the block of rows with this index by this expert."""

    expert: jax.Array
    block: jax.Array
    start: jax.Array
    stop: jax.Array


def visit_count(rows: int, experts: int, height: int) -> int:
    """Static number of visits."""
    return -(-rows // height) + experts - 1


def aligned_visits(group_sizes_E: Int[Array, "E"], rows: int, height: int, every_expert: bool = False) -> Visits:
    """Visits in the order of rows, hence of experts.

    For an output [M, N], every block must be visited: blocks without an owned row come last, each visited once with
    start == stop. For an output [E, D, F], `every_expert` visits every expert instead: those without rows once, with
    start == stop. Unneeded visits repeat the last one with start == stop.
    """
    experts, blocks = group_sizes_E.shape[0], -(-rows // height)
    stops_E = jnp.minimum(jnp.cumsum(group_sizes_E.astype(jnp.int32)), rows)
    starts_E = jnp.concatenate([jnp.zeros(1, jnp.int32), stops_E[:-1]])
    filled_E = stops_E > starts_E
    first_E = jnp.minimum(starts_E // height, blocks - 1)
    needed_E = jnp.where(filled_E, (stops_E - 1) // height - first_E + 1, int(every_expert))
    ends_E = jnp.cumsum(needed_E)
    total = ends_E[-1]

    t = jnp.arange(visit_count(rows, experts, height), dtype=jnp.int32)
    inside_T = jnp.clip(
        t, 0, jnp.maximum(total - 1, 0)
    )  # unneeded visits keep the last expert, so that no other one is loaded
    expert_T = jnp.minimum(jnp.sum(ends_E[None] <= inside_T[:, None], axis=1, dtype=jnp.int32), experts - 1)
    block_T = first_E[expert_T] + inside_T - (ends_E - needed_E)[expert_T]
    used_T = (t < total) & filled_E[expert_T]
    start_T = jnp.where(used_T, jnp.maximum(starts_E[expert_T], block_T * height), 0)
    stop_T = jnp.where(used_T, jnp.minimum(stops_E[expert_T], (block_T + 1) * height), 0)
    if not every_expert:
        owned_blocks = -(-stops_E[-1] // height)
        block_T = jnp.where(t < total, block_T, jnp.minimum(owned_blocks + t - total, blocks - 1))
    return Visits(expert_T, block_T, start_T, stop_T)


class Tiles(NamedTuple):
    """int32 arrays [T]: tile t is rows [start, stop) of this expert; expert E means rows that no group owns."""

    expert: jax.Array
    start: jax.Array
    stop: jax.Array


def tile_count(rows: int, experts: int, height: int) -> int:
    """Static number of tiles: E + 1 groups of M rows never fill more."""
    return -(-rows // height) + experts


def group_tiles(group_sizes_E: Int[Array, "E"], rows: int, height: int) -> Tiles:
    """Tiles in the order of rows that cover each row once; unneeded tiles have start == stop."""
    experts = group_sizes_E.shape[0]
    stops_E = jnp.minimum(jnp.cumsum(group_sizes_E.astype(jnp.int32)), rows)
    stops_G = jnp.concatenate([stops_E, jnp.full(1, rows, jnp.int32)])
    starts_G = jnp.concatenate([jnp.zeros(1, jnp.int32), stops_E])
    tiles_G = -(-(stops_G - starts_G) // height)
    ends_G = jnp.cumsum(tiles_G)

    t = jnp.arange(tile_count(rows, experts, height), dtype=jnp.int32)
    group_T = jnp.minimum(jnp.sum(ends_G[None] <= t[:, None], axis=1, dtype=jnp.int32), experts)
    start_T = starts_G[group_T] + (t - (ends_G - tiles_G)[group_T]) * height
    start_T = jnp.minimum(start_T, stops_G[group_T])
    return Tiles(group_T, start_T, jnp.minimum(start_T + height, stops_G[group_T]))


def even_tiles(rows: int, height: int) -> Tiles:
    """Tiles of rows that all belong to expert 0."""
    start_T = jnp.arange(-(-rows // height), dtype=jnp.int32) * height
    return Tiles(jnp.zeros_like(start_T), start_T, jnp.minimum(start_T + height, rows))
