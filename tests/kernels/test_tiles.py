"""Row tiles cover all rows for any group sizes."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from bimedix_jax.kernels.grouped_matmul.tiles import group_tiles, tile_count

compute = jax.jit(group_tiles, static_argnums=(1, 2))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_group_tiles_cover_each_row_once(data: st.DataObject) -> None:
    rows, experts, height = data.draw(st.sampled_from([(1, 1, 16), (40, 3, 16), (64, 4, 16), (100, 8, 32), (31, 9, 4)]))
    stops = sorted(data.draw(st.lists(st.integers(0, rows), min_size=experts, max_size=experts)))
    sizes = np.diff([0, *stops])
    tiles = compute(jnp.asarray(sizes, jnp.int32), rows, height)
    assert all(part.shape == (tile_count(rows, experts, height),) for part in tiles)
    owners = np.concatenate([np.repeat(np.arange(experts), sizes), np.full(rows - sizes.sum(), experts)])
    covered = []
    for expert, start, stop in zip(*map(np.asarray, tiles), strict=True):
        assert 0 <= start <= stop <= min(start + height, rows)
        assert (owners[start:stop] == expert).all()
        covered += range(start, stop)
    assert covered == list(range(rows))
