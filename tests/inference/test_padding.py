"""Buckets, batches and packing keep every token exactly once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bimedix_jax.inference.padding import bucket, by_length, first_fit, packed, pad_left, pad_right

LENGTHS = st.lists(st.integers(1, 200), max_size=40)


@given(st.integers(1, 100_000))
def test_a_bucket_is_big_enough_and_wastes_at_most_a_third(length):
    found = bucket(length)
    assert found >= length
    assert found == 16 or found < 1.5 * length
    assert bucket(found) == found


def test_there_are_two_buckets_per_octave():
    assert sorted({bucket(n, smallest=1) for n in range(1, 65)}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]


def test_padding_is_on_the_named_side():
    assert [array.tolist() for array in pad_left([[7, 8], []], 3)] == [[[0, 7, 8], [0, 0, 0]], [[0, 1, 1], [0, 0, 0]]]
    assert [array.tolist() for array in pad_right([[7, 8], []], 3)] == [[[7, 8, 0], [0, 0, 0]], [[1, 1, 0], [0, 0, 0]]]
    with pytest.raises(ValueError, match="more than"):
        pad_left([[1, 2]], 1)


@given(LENGTHS, st.integers(1, 500))
def test_every_item_is_in_one_batch_and_fits(lengths, batch_tokens):
    batches = list(by_length(list(enumerate(lengths)), lambda item: item[1], batch_tokens, 200))
    assert sorted(index for batch, *_ in batches for index, _ in batch) == list(range(len(lengths)))
    for batch, rows, columns in batches:
        assert len(batch) <= rows <= max(batch_tokens // columns, 1)
        assert max(length for _, length in batch) <= columns <= 200


@given(LENGTHS)
def test_first_fit_fills_bins_without_overflow(lengths):
    bins = first_fit(lengths, 200)
    assert sorted(index for found in bins for index in found) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in found) <= 200 for found in bins)
    assert len(bins) <= 2 * sum(lengths) / 200 + 1


@given(LENGTHS, st.integers(1, 500))
def test_packing_keeps_every_row_whole(lengths, batch_tokens):
    rows = [np.arange(1000 * index, 1000 * index + length) for index, length in enumerate(lengths)]
    seen = []
    for places, tokens_BT, ids_BT in packed(rows, batch_tokens, longest=200, columns=64):
        assert tokens_BT.shape == ids_BT.shape
        assert tokens_BT.shape[1] <= 200
        assert (ids_BT != 0).sum() == sum(lengths[index] for index, *_ in places)
        for index, line, start in places:
            place = slice(start, start + lengths[index])
            np.testing.assert_array_equal(tokens_BT[line, place], rows[index])
            assert len(set(ids_BT[line, place].tolist())) == 1
            seen.append(index)
    assert sorted(seen) == list(range(len(rows)))
