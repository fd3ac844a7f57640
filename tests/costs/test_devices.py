"""Peaks of devices, by the names that drivers report."""

import pytest

from bimedix_jax.costs.devices import known, peak_flops


@pytest.mark.parametrize(
    ("kind", "bfloat16"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("NVIDIA H100 PCIe", None),
        ("cpu", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(kind, bfloat16):
    assert peak_flops(kind, "bfloat16") == bfloat16


def test_a_device_with_the_same_peaks_has_other_memory():
    assert known("NVIDIA H200") is None
    assert peak_flops("NVIDIA H200", "float32") == peak_flops("NVIDIA H100 80GB HBM3", "float32")
