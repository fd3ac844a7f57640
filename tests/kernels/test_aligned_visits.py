"""For any group sizes, visits cover all rows in the static number of steps that `visit_count` gives."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from bimedix_jax.kernels.grouped_matmul.tiles import aligned_visits, visit_count

compiled = jax.jit(aligned_visits, static_argnums=(1, 2, 3))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_each_owned_row_is_visited_once_by_its_expert(data: st.DataObject) -> None:
    # few shapes, because each is compiled, but any group sizes
    shapes = [(1, 1, 8), (3, 5, 1), (4, 64, 16), (9, 70, 8), (5, 70, 64), (7, 3, 128)]
    experts, rows, height = data.draw(st.sampled_from(shapes))
    stops = sorted(data.draw(st.lists(st.integers(0, rows), min_size=experts, max_size=experts)))
    sizes = np.diff([0, *stops])
    blocks = -(-rows // height)
    owners = np.concatenate([np.repeat(np.arange(experts), sizes), np.full(rows - sizes.sum(), -1)])
    for every_expert in (False, True):
        visits = compiled(jnp.asarray(sizes, jnp.int32), rows, height, every_expert)
        expert, block, start, stop = (np.asarray(part) for part in visits)
        assert len(expert) == visit_count(rows, experts, height)
        assert (np.diff(expert) >= 0).all()  # an expert's weights are loaded once
        assert (np.diff(block) >= 0).all()  # a block of the result is finished before the next
        found = np.full(rows, -1)
        for e, b, first, last in zip(expert, block, start, stop, strict=True):
            assert first == last or b * height <= first < last <= (b + 1) * height
            assert (found[first:last] == -1).all()
            found[first:last] = e
        assert (found == owners).all()
        # every part of the result is written
        assert set(expert) == set(range(experts)) if every_expert else set(block) == set(range(blocks))
