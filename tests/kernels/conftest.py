"""Kernels on another platform than the CPU: BIMEDIX_TEST_PLATFORM=gpu (or tpu) compiles the Pallas kernels for what is
there, where a CPU interprets them, and runs the tests of that platform's kernels. docs/kernels.md has the command."""

import jax
import pytest

OWN = {"gpu": {"triton", "grouped"}, "tpu": {"mosaic_tpu", "grouped"}}
"""Backends that are tested on an accelerator: its own, and what is made of them. XLA's are tested on CPUs, in float32
with its full precision, which products on accelerators do not have by default."""
EVERY = {"xla", "ragged_dot", "triton", "mosaic_tpu", "masked", "grouped", "bits", "few_rows"}

if jax.default_backend() != "cpu":
    collect_ignore_glob = ["test_codegen*.py"]  # for absent devices, which JAX offers only beside a CPU


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
