"""Training adapters equals transformers + peft: gradients of every factor, and the losses of 30 AdamW steps.

`scripts/measure_peft_parity.py` makes the comparison. peft has one adapter for w1 and w3 together, so the script masks
the blocks of its B that do not exist in our adapters.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DEFAULT_KERNELS = True
SCRIPT = Path(__file__).parents[2] / "scripts" / "measure_peft_parity.py"

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def parity() -> Any:
    spec = importlib.util.spec_from_file_location("measure_peft_parity", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base(parity: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parity.write_base(tmp_path_factory.mktemp("parity") / "base")


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_gradients_and_losses(parity, base, tmp_path, kind):
    found = parity.training_differences(base, tmp_path, kind)
    kinds = ("attention.q", "attention.k", "attention.v", "moe.router", "moe.w1", "moe.w2", "moe.w3")
    assert set(found["grad_rel_diff"]) == {f"layers.{name}.lora.{factor}" for name in kinds for factor in "ab"}
    assert found["max_grad_rel_diff"] <= 1e-4
    assert found["max_loss_rel_diff"] <= 1e-3
    assert found["last_loss"] < found["first_loss"] - 0.3  # the loss falls, so trained adapters are compared


def test_logits_of_both_layouts_and_directions(parity, base, tmp_path):
    found = parity.logit_differences(base, tmp_path)
    assert list(found["max_logit_diff"]) == ["per_expert", "fused"]
    assert all(set(by) == {"ours_to_peft", "peft_to_ours"} for by in found["max_logit_diff"].values())
    differences = [value for by in found["max_logit_diff"].values() for value in by.values()]
    assert max(differences) <= 1e-4 * found["largest_logit"]


def test_gradients_are_compared_matrix_by_matrix(parity):
    """One wrong expert among many is detected, and so is a factor that only one side trains."""
    theirs = {"a": np.ones((2, 4, 3, 3)), "b": np.ones((2, 4, 3, 3))}
    ours = {name: value.copy() for name, value in theirs.items()}
    ours["b"][1, 2] *= 1.5
    assert parity.gradient_differences(ours, theirs) == {"a": 0.0, "b": pytest.approx(0.5)}
    with pytest.raises(RuntimeError, match="different things"):
        parity.gradient_differences({"a": ours["a"]}, theirs)
