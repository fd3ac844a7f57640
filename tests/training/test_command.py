"""`bimedix train`: options that override a preset, and a run from the command line."""

import json
import typing

import pytest

from bimedix_jax import cli
from bimedix_jax.commands.train import Config, resolve
from bimedix_jax.errors import BimedixError
from bimedix_jax.files import flatten
from bimedix_jax.options import ChangesField
from bimedix_jax.presets import PRESETS, smoke


def test_every_option_changes_a_field_that_exists():
    hints = typing.get_type_hints(Config, include_extras=True).values()
    changed = {
        mark.name for hint in hints for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, ChangesField)
    }
    assert len(changed) > 10
    for preset in PRESETS.values():
        fields = flatten(preset().to_dict())
        assert changed - {"lora.rank", "lora.alpha"} <= set(fields)


def test_options_override_the_preset(tmp_path):
    config = Config(
        out=tmp_path,
        preset="smoke",
        rows=3,
        aux_scope="sequence",
        rank=1,
        set=(("optimiser.beta2", 0.95), ("tracking.project", "mine")),
    )
    experiment = resolve(config)
    assert experiment.lora is not None
    assert (experiment.batch.rows, experiment.router.aux_scope, experiment.lora.rank) == (3, "sequence", 1)
    assert (experiment.optimiser.beta2, experiment.tracking.project) == (0.95, "mine")
    assert resolve(Config(out=tmp_path, preset="smoke")) == smoke()


def test_a_file_replaces_the_preset(tmp_path):
    (tmp_path / "config.json").write_text(smoke().to_json())
    assert resolve(Config(out=tmp_path / "out", preset=str(tmp_path / "config.json"))) == smoke()
    assert resolve(Config(out=tmp_path, resume=True)) == smoke()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name a preset"),
        ({"preset": "smok"}, "neither a preset"),
        ({"preset": "smoke", "set": (("step", 3),)}, "unknown key step"),
        ({"preset": "smoke", "rows": 0}, "batch.rows"),
    ],
)
def test_invalid_options_raise(tmp_path, options, message):
    with pytest.raises(BimedixError, match=message):
        resolve(Config(out=tmp_path, **options))


def test_a_run_from_the_command_line(tmp_path, capsys):
    """The smallest run, then a resume of the finished run."""
    words = ["train", "smoke", "--out", str(tmp_path / "run"), "--steps", "3", "--accumulation", "1", "--json"]
    words += ["--set", 'lora.targets=["q", "router"]']
    assert cli.main(words) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["steps"] == 3
    assert done["metrics"]["step"] == 3
    assert (tmp_path / "run/adapter/adapter.safetensors").exists()
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "run"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["loss"] == done["loss"]
    assert cli.main(["train", "smoke", "--out", str(tmp_path / "run")]) == 1
    assert "pass --resume" in capsys.readouterr().err
