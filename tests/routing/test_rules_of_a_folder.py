"""Rules are checked against a model's folder before its weights are read."""

import dataclasses
import json
from pathlib import Path

import pytest
from tiny import tiny

from bimedix_jax import cli
from bimedix_jax.checkpoint.architecture import known_config
from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.checkpoint.store import save
from bimedix_jax.data.records import Record, conversation, write_jsonl
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.init import init_random
from bimedix_jax.presets import PRESETS
from bimedix_jax.routing.interventions import Interventions, check_fit

CONFIG = tiny(hidden_size=16, intermediate_size=8, num_layers=2, experts=2, top_k=1, vocab_size=304)
COMMANDS = {
    "chat": ["chat", "--prompt", "hello", "--max-new-tokens", "8"],
    "eval run": ["eval", "run", "--heldout", "records.jsonl"],
    "eval harness": ["eval", "harness", "bimedix_medqa_en", "--data", "."],
    "routes record": ["routes", "record", "--data", "records.jsonl", "--out", "routes"],
}


@pytest.fixture
def folder(bytes_tokenizer, tmp_path, monkeypatch):
    """A model folder whose weights are missing, in the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = export_hf(init_random(CONFIG, seed=0), tmp_path / "hf", tokenizer_from=bytes_tokenizer.folder)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_rules_are_found_before_weights_are_read(folder, command, capsys):
    turns = conversation("hello", "good morning")
    record = Record(id="1", language="en", kind="qa", source="test", licence="CC0-1.0", conversations=turns)
    write_jsonl(Path("records.jsonl"), [record])
    words = [*COMMANDS[command], "--model", str(folder), "--intervene", "rules.json"]
    Path("rules.json").write_text('[{"op": "ban", "experts": [9]}]')
    assert cli.main(words) == 1
    assert "names expert 9, but this model has experts 0 .. 1" in capsys.readouterr().err
    assert not Path("routes").exists()


def test_folders_of_every_kind_have_their_sizes(folder, tmp_path):
    native, run = tmp_path / "native", tmp_path / "run"
    save(init_random(CONFIG, seed=0), native)
    run.mkdir()
    content = PRESETS["smoke"]().to_dict()
    for folder_or_sizes in ({"path": str(folder)}, {"random": dataclasses.asdict(CONFIG)}, {"path": str(native)}):
        content["model"] = {"path": None, "random": None, **folder_or_sizes}
        (run / "config.json").write_text(json.dumps(content))
        assert known_config(run) == CONFIG
    assert known_config(folder) == known_config(native) == CONFIG
    assert known_config(tmp_path) is None
    rules = Interventions.of({"op": "uniform", "layers": [2]})
    for known in (folder, native, run):
        with pytest.raises(BimedixError, match=r"names layer 2, but this model has layers 0 \.\. 1"):
            check_fit(rules, known)
    check_fit(rules, tmp_path)  # its layers are not known
