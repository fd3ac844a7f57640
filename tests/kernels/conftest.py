"""Tests of kernels on an accelerator: with BIMEDIX_TEST_PLATFORM=gpu (or tpu), Pallas kernels are compiled instead of
interpreted, and the tests of that platform's kernels run. docs/kernels.md has the command."""

import shutil

import jax
import pytest

from bimedix_jax.kernels import native

OWN = {"gpu": {"triton", "grouped"}, "tpu": {"mosaic_tpu", "splash", "grouped"}}
"""Backends that are tested on an accelerator: its Pallas kernels, and backends composed of them. XLA's are tested on
CPUs: by default, products in float32 have full precision only there."""
EVERY = {"xla", "ragged_dot", "triton", "mosaic_tpu", "splash", "masked", "grouped", "bits", "few_rows", "avx512"}

if jax.default_backend() != "cpu":
    collect_ignore_glob = ["test_codegen*.py"]  # these compile for absent devices, which JAX can do only on a CPU


@pytest.fixture(autouse=True)
def _only_own_kernels(request: pytest.FixtureRequest) -> None:
    platform = jax.default_backend()
    if not hasattr(request.node, "callspec"):
        return
    words = {
        word for value in request.node.callspec.params.values() if isinstance(value, str) for word in value.split()
    }
    if platform == "cpu":
        if "avx512" in words:
            request.getfixturevalue("avx512_machine")
        return
    if others := words & (EVERY - OWN[platform]):
        pytest.skip(f"{', '.join(others)}: not a kernel for {platform}")


@pytest.fixture
def avx512_machine() -> None:
    """Skips where the kernels in C++ cannot run; a machine with the processor and a compiler must run them."""
    missing = native.AVX512_NEEDS - native.cpu_flags()
    if missing or jax.default_backend() != "cpu":
        pytest.skip(f"the processor does not have {', '.join(sorted(missing))}")
    if not any(map(shutil.which, native.COMPILERS)):
        pytest.skip("there is no C++ compiler")
