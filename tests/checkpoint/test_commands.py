"""`bimedix convert` and `bimedix export`, through the command line."""

import json
from pathlib import Path

import pytest

from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.checkpoint.load import load
from bimedix_jax.checkpoint.safetensors_io import read_folder
from bimedix_jax.cli import main


def contents(folder: Path) -> dict[str, bytes]:
    return {name: tensor.read().tobytes() for name, tensor in read_folder(folder).items()}


def test_convert_and_back(mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(mixtral), "--out", str(tmp_path / "wide"), "--base", "float32", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["base"] == "float32"
    assert result["bytes"] == sum(path.stat().st_size for path in (tmp_path / "wide").iterdir())
    assert main(["convert", str(tmp_path / "wide"), "--out", str(tmp_path / "back")]) == 0
    assert contents(tmp_path / "back") == contents(mixtral)


def test_export_in_shards(mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(mixtral), "--out", str(tmp_path / "out"), "--max-shard-gb", "0.00003", "--json"]
    assert main(words) == 0
    assert "model.safetensors.index.json" in json.loads(capsys.readouterr().out)["files"]
    assert contents(tmp_path / "out") == contents(mixtral)
    assert main(words) == 1
    assert "not empty" in capsys.readouterr().err


def test_the_remedy_in_an_error_message_works(
    mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes((mixtral / "model.safetensors").read_bytes())
    raw = json.loads((mixtral / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, "novelty": True}))
    assert main(["convert", str(source), "--out", str(tmp_path / "out")]) == 1
    assert "--ignore-config-key novelty" in capsys.readouterr().err
    assert main(["convert", str(source), "--out", str(tmp_path / "out"), "--ignore-config-key", "novelty"]) == 0


def test_convert_to_four_bits_and_export(mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """hub -> native NF4 -> hub equals the dequantised weights, and 4-bit weights are not quantised again."""
    source = tmp_path / "source"
    source.mkdir()
    for path in mixtral.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "tokenizer_config.json").write_text('{"travels": true}')
    assert main(["convert", str(source), "--out", str(tmp_path / "packed"), "--base", "nf4"]) == 0
    assert main(["export", str(tmp_path / "packed"), "--out", str(tmp_path / "out")]) == 0
    export_hf(load(source, base="nf4"), tmp_path / "direct")
    assert contents(tmp_path / "out") == contents(tmp_path / "direct")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"travels": true}'
    capsys.readouterr()
    assert main(["export", str(tmp_path / "packed"), "--out", str(tmp_path / "no"), "--base", "float32"]) == 1
    assert "saved with base nf4" in capsys.readouterr().err
