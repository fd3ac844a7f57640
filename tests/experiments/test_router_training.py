"""Arms differ from the preset only in name and targets, and an arm runs with the documented command."""

import runpy
from pathlib import Path

import pytest
from tiny import tiny

from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.checkpoint.store import load_adapter
from bimedix_jax.cli import main
from bimedix_jax.data.tokenizer import byte_tokenizer
from bimedix_jax.experiment import differences, from_dict
from bimedix_jax.models.config import LORA_TARGETS
from bimedix_jax.models.init import init_random
from bimedix_jax.presets import quickstart

STUDY = runpy.run_path(str(Path(__file__).resolve().parents[2] / "experiments/router_training.py"))
ARMS = STUDY["ARMS"]

TINY = tiny(tie_embeddings=True, max_position_embeddings=4096)


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_differs_in_name_and_targets_only(name):
    arm = ARMS[name]
    changed = {line.split(":")[0] for line in differences(arm, quickstart())}
    assert changed == ({"name"} if name == "everything" else {"name", "lora.targets"})
    assert set(arm.lora.targets) <= set(LORA_TARGETS)
    assert from_dict(arm.to_dict()) == arm


def test_arms_are_distinct():
    assert len({arm.lora.targets for arm in ARMS.values()}) == len({arm.name for arm in ARMS.values()}) == len(ARMS)


def test_an_arm_runs(tmp_path, capsys):
    model = init_random(TINY, dtype="bfloat16", std=0.1)
    folder = export_hf(model, tmp_path / "hf", tokenizer_from=byte_tokenizer(tmp_path / "bytes").folder)
    length = ["--sequence-length", str(quickstart().data.sequence_length)]
    assert " ".join(length) in STUDY["__doc__"]
    words = ["--records", "sample", "--split", "train", "--limit", "4", *length]
    assert main(["data", "pack", *words, "--tokenizer", str(folder), "--out", str(tmp_path / "packed")]) == 0
    words = ["--data", str(tmp_path / "packed"), "--model", str(folder), "--out", str(tmp_path / "run"), "--steps", "6"]
    STUDY["main"](["--arm", "router", *words])
    assert "router: 6 steps, last training loss" in capsys.readouterr().out
    adapted = load_adapter(model, tmp_path / "run/adapter")
    assert adapted.layers.moe.router.lora is not None
    assert adapted.layers.moe.w1.lora is None
    with pytest.raises(SystemExit, match="error: "):
        STUDY["main"](["--arm", "router", *words])
