"""Attention's kernels compile for absent GPUs and TPUs, and nothing holds all pairs of tokens."""

import re

import jax
import pytest

from bimedix_jax.kernels import backends
from bimedix_jax.plan import hlo, work
from bimedix_jax.plan.codegen import attention
from bimedix_jax.plan.hardware import devices

SHARED_BYTES = 163 * 1024
"""Shared memory of one block on an A100 (CUDA C++ Programming Guide, compute capability 8.0)."""


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 128), ("bfloat16", 64), ("bfloat16", 256), ("float32", 128)])
def test_nothing_spills_on_an_a100(dtype: str, width: int) -> None:
    rows = list(attention.measure_gpu("a100-80gb", dtype, width))
    assert {row["kernel"] for row in rows} == {"attention_forward", "attention_queries", "attention_keys"}
    for row in rows:
        assert row["spill_bytes"] == 0
        assert 0 < row["shared_bytes"] <= SHARED_BYTES
        assert 1 < row["flops_ratio"] < 1.05  # blocks on the diagonal


@pytest.mark.parametrize(("target", "length"), [("a100-80gb", 32_768), ("v5e", 8192)])
def test_no_array_has_all_pairs_of_tokens(target: str, length: int) -> None:
    [device, *_] = devices(target)
    function, operands = attention.gradients(attention.BACKENDS[device.platform], length, target)
    with backends.use(device=device):
        compiled = jax.jit(function).lower(*operands).compile()
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    assert not re.search(rf"\[[\d,]*{length},{length}[\d,]*\]", text)
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * sum(x.size * x.dtype.itemsize for x in operands)
    program = hlo.parse(text)
    calls = [
        work.kernel_call(instruction)
        for computation in program.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "custom-call" and work.kernel_call(instruction).total
    ]
    pairs = 32 * length * (length + 1) / 2
    assert sum(call.filled for call in calls) == (2 + 3 + 4) * 2 * 128 * pairs
    assert all(call.kernel and call.filled < call.total < 1.1 * call.filled for call in calls)
