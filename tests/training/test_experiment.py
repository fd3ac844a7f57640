"""Experiments convert to JSON and back; errors name the invalid field."""

import dataclasses
import json

import pytest

from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import BatchConfig, Experiment, ModelSource, differences, from_dict, override, read
from bimedix_jax.models.config import LoraConfig
from bimedix_jax.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_json(name, tmp_path):
    experiment = PRESETS[name]()
    (tmp_path / "config.json").write_text(experiment.to_json())
    assert read(tmp_path / "config.json") == experiment


def test_the_recipe_of_the_paper():
    recipe = PRESETS["bimedix-mixtral-8x7b"]()
    assert recipe.lora == LoraConfig(rank=128, alpha=64.0, targets=("q", "k", "v", "w1", "w2", "w3", "router"))
    assert (recipe.batch.size, recipe.epochs) == (16, 2)  # the paper's two micro-batches are one batch: the same step
    assert (recipe.optimiser.learning_rate, recipe.optimiser.warmup_steps) == (2e-4, 10)
    assert PRESETS["bimedix-mixtral-8x7b-instruct"]().model.path == "mistralai/Mixtral-8x7B-Instruct-v0.1"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 1.0}, "unknown key learning_rate"),
        ({"batch": {"rows": 2, "colums": 3}}, "batch has the unknown key colums"),
        ({"batch": {"rows": "2"}}, "batch.rows"),
        ({"batch": {"rows": True}}, "batch.rows"),
        ({"batch": {"rows": 0}}, "batch.rows must be at least 1"),
        ({"router": {"aux_scope": "batch"}}, "router.aux_scope is 'batch'; choose one of sequence"),
        ({"lora": {"rank": 4}}, "lora lacks alpha"),
        ({"lora": {"rank": 4, "alpha": 8, "targets": ["gate"]}}, "Unknown target gate"),
        ({"lora": None}, "needs model.base float32"),
        ({"steps": None, "epochs": None}, "set one"),
        ({"eval_every": 5}, "data.heldout"),
        ({"model": {"path": "a", "base": "bfloat16", "dtype": "float32"}}, "model.dtype"),
    ],
)
def test_invalid_experiments_raise(change, named):
    with pytest.raises(BimedixError, match=named):
        from_dict(PRESETS["smoke"]().to_dict() | change)


def test_literals_are_checked_in_constructors():
    with pytest.raises(BimedixError, match="base is 'int8'"):
        ModelSource(base="int8")  # pyright: ignore[reportArgumentType]


def test_a_file_that_is_not_json_raises(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BimedixError, match="not valid JSON"):
        read(tmp_path / "config.json")


def test_override_and_differences():
    smoke = PRESETS["smoke"]()
    changed = override(smoke, {"batch.rows": 8, "lora.rank": 2, "optimiser.clip_norm": None})
    assert changed.batch == BatchConfig(rows=8, accumulation=2)
    assert differences(changed, smoke) == [
        "lora.rank: 2 here, 4 there",
        "optimiser.clip_norm: None here, 1.0 there",
        "batch.rows: 8 here, 2 there",
    ]
    assert override(smoke, {"lora": None, "model.base": "float32"}).lora is None
    with pytest.raises(BimedixError, match=r"no field a\.b"):
        override(smoke, {"a.b": 1})
    with pytest.raises(BimedixError, match="unknown key row"):
        override(smoke, {"batch.row": 1})


@pytest.mark.parametrize("project", ["owner/project", "a#b", "x" * 129])
def test_projects_that_wandb_refuses_raise_before_anything_is_loaded(project):
    smoke = PRESETS["smoke"]()
    with pytest.raises(BimedixError, match=r"tracking\.project is .* at most 128 characters"):
        override(smoke, {"tracking.project": project, "tracking.mode": "online"})
    override(smoke, {"tracking.project": project, "tracking.mode": "disabled"})


def test_every_field_is_documented():
    """tyro shows the docstring below a field as its help."""
    import ast
    from pathlib import Path

    import bimedix_jax.experiment as module

    for node in ast.parse(Path(str(module.__file__)).read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for field, after in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign):
                    assert isinstance(after, ast.Expr), f"{node.name}.{ast.unparse(field.target)} has no docstring"


def test_an_experiment_is_immutable_and_hashable():
    assert hash(PRESETS["smoke"]()) == hash(PRESETS["smoke"]())
    assert json.loads(PRESETS["smoke"]().to_json()) == PRESETS["smoke"]().to_dict()
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["smoke"]().seed = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(PRESETS["quickstart"](), Experiment)
