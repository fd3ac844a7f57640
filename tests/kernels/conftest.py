"""Tests of kernels on an accelerator: with BIMEDIX_TEST_PLATFORM=gpu (or tpu), Pallas kernels are compiled instead of
interpreted, and the tests of that platform's kernels run. docs/kernels.md has the command."""

import jax
import pytest

OWN = {"gpu": {"triton", "grouped"}, "tpu": {"mosaic_tpu", "splash", "grouped"}}
"""Backends that are tested on an accelerator: its Pallas kernels, and backends composed of them. XLA's are tested on
CPUs: by default, products in float32 have full precision only there."""
EVERY = {"xla", "ragged_dot", "triton", "mosaic_tpu", "splash", "masked", "grouped", "bits", "few_rows", "avx512"}

if jax.default_backend() != "cpu":
    collect_ignore_glob = ["test_codegen*.py"]  # these compile for absent devices, which JAX can do only on a CPU


@pytest.fixture(autouse=True)
def _only_own_kernels(request: pytest.FixtureRequest) -> None:
    platform = jax.default_backend()
    if platform == "cpu" or not hasattr(request.node, "callspec"):
        return
    words = {
        word for value in request.node.callspec.params.values() if isinstance(value, str) for word in value.split()
    }
    if others := words & (EVERY - OWN[platform]):
        pytest.skip(f"{', '.join(others)}: not a kernel for {platform}")
