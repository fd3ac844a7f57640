"""A study's file is checked when it is loaded, and its sizes and presets apply to every arm."""

import subprocess
import sys
from pathlib import Path

import pytest

from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import override
from bimedix_jax.presets import bimedix_mixtral_8x7b, quickstart, smoke
from bimedix_jax.sweeps.study import FEWEST_SEEDS, Contrast, delta, load_study

EXPERIMENTS = sorted((Path(__file__).resolve().parents[2] / "experiments").glob("*.py"))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_every_study_of_the_project_has_three_sizes_and_enough_seeds(file):
    study = load_study(file)
    assert set(study.sizes) == {"smoke", "lab", "full"}
    assert len(study.seeds_of(study.sizes["smoke"])) == 2
    assert len(study.seeds_of(study.sizes["lab"])) >= FEWEST_SEEDS
    assert (study.sizes["lab"].minutes or 99) <= 40
    assert f"bimedix sweep experiments/{file.name}" in study.question
    for size in study.sizes:
        for arm in study.arms:
            assert study.experiment(arm, 3, size).seed == 3


def test_a_study_imports_no_jax(study):
    """The process that starts the runs must not take the devices."""
    code = f"import sys; from bimedix_jax.sweeps import page, sweep, study; study.load_study({str(study)!r}); "
    code += "sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_arms_of_one_preset_become_arms_of_another():
    arm = override(quickstart(), {"lora.targets": ["router"]})
    full = override(arm, delta(quickstart(), bimedix_mixtral_8x7b()))
    assert full.lora is not None
    assert full.lora.targets == ("router",)
    recipe = bimedix_mixtral_8x7b()
    assert recipe.lora is not None
    same = override(full, {"lora.targets": list(recipe.lora.targets), "name": recipe.name})
    assert same == recipe


def test_seeds_continue_past_those_of_the_study(study):
    found = load_study(study)
    assert found.seeds_of(found.size("smoke")) == (0, 1)
    assert found.seeds_of(found.size("lab")) == (0, 1, 2, 3, 4, 5)
    assert found.seeds_of(found.size("smoke"), 8) == (0, 1, 2, 3, 4, 5, 6, 7)
    experiment = found.experiment("low", 1, "smoke")
    assert (experiment.steps, experiment.seed, experiment.name) == (4, 1, "arms-smoke/low")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("SEEDS = 6", "SEEDS = (1, 1)", "names a seed twice"),
        ("SEEDS = 6", "SEEDS = 0", "SEEDS must be a number"),
        ("SEEDS = 6", "", "lacks SEEDS"),
        ('"""Which arm is lowest?"""', "", "no docstring"),
        ('"low", "base"', '"low", "nobody"', "PRIMARY names the arm nobody"),
        ('"nats_per_token"', '"accuracy"', "PRIMARY.metric is 'accuracy'"),
        ('"low": 2', '"low": 1', "the arms base and low are equal"),
        ('"low": 2', '"lo/w": 2', "the arm 'lo/w'"),
        ('"smoke": Size', '"huge": Size', "SIZES has huge"),
        ('"lora.rank": rank', '"lora.rang": rank', "unknown key rang"),
        ("SEEDS = 6", "SEEDS = 1 / 0", "fails with ZeroDivisionError"),
    ],
)
def test_a_wrong_study_raises(study, old, new, message):
    study.write_text(study.read_text().replace(old, new, 1))
    with pytest.raises(BimedixError, match=message):
        load_study(study)


def test_a_contrast_is_between_two_arms():
    with pytest.raises(BimedixError, match="compares a with itself"):
        Contrast("nll", "a", "a", 1)
    assert Contrast("nats_per_token/ar/qa", "a", "b", 1).sign == 1
    with pytest.raises(BimedixError, match=r"PRIMARY\.metric"):
        Contrast("nll/ar", "a", "b", 1)


def test_a_file_that_is_missing_is_one_sentence(tmp_path):
    with pytest.raises(BimedixError, match="there is no file"):
        load_study(tmp_path / "nothing.py")


def test_sizes_may_be_left_out(study):
    text = study.read_text()
    study.write_text(text[: text.index("SIZES")])
    assert load_study(study).experiment("low", 0, "lab").steps == smoke().steps
