"""Arms differ from the preset only in name, targets and the languages of the metrics."""

from pathlib import Path

import pytest

from bimedix_jax.experiment import differences, from_dict
from bimedix_jax.models.config import LORA_TARGETS
from bimedix_jax.presets import bimedix_mixtral_8x7b, quickstart
from bimedix_jax.sweeps.study import load_study

STUDY = load_study(Path(__file__).resolve().parents[2] / "experiments/router_training.py")


@pytest.mark.parametrize("name", STUDY.arms)
def test_an_arm_differs_in_targets_and_languages_only(name):
    arm = STUDY.arms[name]
    changed = {line.split(":")[0] for line in differences(arm, quickstart())}
    assert changed - {"lora.targets"} == {"router.languages"}
    assert ("lora.targets" in changed) == (name != "all")
    assert arm.lora is not None
    assert set(arm.lora.targets) <= set(LORA_TARGETS)
    assert from_dict(arm.to_dict()) == arm


def test_the_primary_contrast_is_about_the_routers_alone():
    arm, baseline = (STUDY.arms[name].lora for name in (STUDY.primary.arm, STUDY.primary.baseline))
    assert arm is not None
    assert baseline is not None
    assert set(arm.targets) - set(baseline.targets) == {"router"}
    assert set(STUDY.arms) == {"attention", "experts", "router", "all", "frozen-router"}


def test_the_full_size_is_the_recipe_of_the_paper():
    full = STUDY.experiment("all", 0, "full")
    changed = {line.split(":")[0] for line in differences(full, bimedix_mixtral_8x7b())}
    assert changed == {"name", "router.languages"}
