"""Absent devices by name and number."""

import pytest

from bimedix_jax.errors import BimedixError
from bimedix_jax.plan.hardware import TOPOLOGIES, devices, tpu_slice


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("count", [1, 3, 8, 64])
def test_any_number_of_tpus(name: str, count: int) -> None:
    chips = devices(name, count)
    assert len(chips) == count
    assert {chip.platform for chip in chips} == {"tpu"}
    assert {chip.device_kind for chip in chips} == {{"v5e": "TPU v5 lite", "v5p": "TPU v5"}[name]}


def test_the_smallest_sufficient_slice_is_used() -> None:
    assert tpu_slice("v5e", 5) == {"platform": "tpu", "topology_name": "v5e:2x4"}
    assert tpu_slice("v5p", 1)["chips_per_host_bounds"] == (1, 1, 1)


def test_unknown_names_and_numbers_raise() -> None:
    with pytest.raises(BimedixError, match="No description of v4; known are a100-80gb, a100-40gb, h100-80gb, v5e, v5p"):
        devices("v4")
    with pytest.raises(BimedixError, match="largest v5e slice known has 256 chips, fewer than 257"):
        devices("v5e", 257)
