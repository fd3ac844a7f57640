"""A dry run reads the rules of interventions and checks them against the model, where its sizes are known."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bimedix_jax import cli
from bimedix_jax.checkpoint.architecture import known_config
from bimedix_jax.experiment import override
from bimedix_jax.presets import PRESETS
from bimedix_jax.training.dry_run import check_interventions

SMOKE = PRESETS["smoke"]()
STUDY = """
'Does a ban matter?  bimedix sweep study.py'

from bimedix_jax.experiment import override
from bimedix_jax.presets import smoke
from bimedix_jax.sweeps.study import Contrast, Size

ARMS = {"base": smoke(), "ruled": override(smoke(), {"intervene": "rules.json"})}
SEEDS = 6
PRIMARY = Contrast("nll", "ruled", "base", -1)
SIZES = {"smoke": Size(seeds=2), "lab": Size(), "full": Size()}
"""
WRONG = [
    ([{"op": "banish"}], "banish"),
    ([{"op": "permute", "to": [1, 1, 2, 3]}], "is no permutation"),
    ([{"op": "shuffle"}], "shuffle needs another pass of a model in every step"),
    ([{"op": "ban", "experts": [9]}], "rule 0 (ban) names expert 9, but this model has experts 0 .. 3"),
    ([{"op": "ban", "experts": [0], "layers": [7]}], "names layer 7, but this model has layers 0 .. 1"),
    (
        [{"op": "ban", "experts": [0, 1], "layers": [1]}, {"op": "ban", "experts": [2]}],
        "the bans leave a token of layer 1 only 1 of its experts, but the router needs 2; ban fewer",
    ),
    (None, "rules.json cannot be read (No such file or directory)"),
]


@pytest.mark.parametrize(("rules", "message"), WRONG)
def test_wrong_rules_are_found_by_dry_runs(tmp_path, monkeypatch, capsys, rules: Any, message: str):
    monkeypatch.chdir(tmp_path)
    Path("study.py").write_text(STUDY)
    if rules is not None:
        Path("rules.json").write_text(json.dumps(rules))
    assert cli.main(["train", "smoke", "--intervene", "rules.json", "--dry-run", "--out", "run"]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert cli.main(["sweep", "run", "study.py", "--size", "smoke", "--dry-run"]) == 1
    printed = " ".join(capsys.readouterr().err.split())
    assert message in printed
    assert "arm ruled: " in printed


def test_rules_that_fit_pass(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("study.py").write_text(STUDY)
    rules = [{"op": "ban", "experts": [0, 1, 2]}, {"op": "top_k", "k": 1}, {"op": "gain", "experts": [3], "value": 2}]
    Path("rules.json").write_text(json.dumps(rules))
    assert cli.main(["train", "smoke", "--intervene", "rules.json", "--dry-run", "--out", "run"]) == 0
    assert cli.main(["sweep", "run", "study.py", "--size", "smoke", "--dry-run"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["rules.json", "study.py"]


def test_sizes_are_those_of_a_folder_where_there_is_one(tmp_path):
    config = SMOKE.model.random
    assert config is not None
    assert known_config("owner/name") is None
    (tmp_path / "bimedix.json").write_text(json.dumps({"config": dataclasses.asdict(config)}))
    assert known_config(tmp_path) == config
    (tmp_path / "rules.json").write_text(json.dumps([{"op": "ban", "experts": [99]}]))
    hub = override(SMOKE, {"model": {"path": "owner/name"}, "intervene": str(tmp_path / "rules.json")})
    check_interventions(hub)  # its experts are not known
