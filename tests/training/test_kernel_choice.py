"""An experiment names kernel backends, and run.json records which ones ran."""

import io
import json

import pytest
from rich.console import Console

from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import KernelChoice, from_dict
from bimedix_jax.training.loop import train

DEFAULT_KERNELS = True


def test_the_named_backend_runs_and_is_recorded(experiment, tmp_path):
    run = experiment(steps=2, kernels=KernelChoice(grouped_matmul="ragged_dot", grouped_low_rank="grouped"))
    train(run, tmp_path / "run")
    facts = json.loads((tmp_path / "run/run.json").read_text())
    picked = facts["starts"][0]["kernels"]
    assert picked["grouped_matmul"] == ["ragged_dot"]
    assert picked["grouped_low_rank"] == ["grouped"]
    assert json.loads((tmp_path / "run/config.json").read_text())["kernels"]["grouped_matmul"] == "ragged_dot"


def test_an_unknown_backend_raises(experiment):
    plain = experiment().to_dict()
    plain["kernels"]["grouped_matmul"] = "fastest"
    with pytest.raises(BimedixError, match=r"kernels\.grouped_matmul is 'fastest'; choose one of xla, ragged_dot, tri"):
        from_dict(plain)
    del plain["kernels"]
    assert from_dict(plain).kernels == KernelChoice()


@pytest.mark.parametrize(("backend", "warned"), [("xla", True), ("composed", False)])
def test_remat_experts_without_effect_warns(backend, warned, experiment, tmp_path):
    output = io.StringIO()
    run = experiment(steps=2, remat="experts", kernels=KernelChoice(expert_mlp=backend))
    train(run, tmp_path / "run", console=Console(file=output, width=200))
    assert ("remat experts has no effect here" in output.getvalue()) is warned


def test_a_backend_that_cannot_take_the_operands_raises(experiment, tmp_path):
    run = experiment(steps=2, kernels=KernelChoice(attention="avx512"))
    with pytest.raises(
        BimedixError, match=r"'avx512': it computes in bfloat16, not in float32\. Set this one of kernels"
    ):
        train(run, tmp_path / "run")
