"""`bimedix coverage` counts from shapes alone, and its counts are those of the loaded model."""

import dataclasses
import json

import pytest
from safetensors.numpy import load_file, save_file
from tiny import GROUPED, tiny

from bimedix_jax.adapters import add_lora, coverage
from bimedix_jax.checkpoint import store
from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.checkpoint.integrity import write_manifest
from bimedix_jax.checkpoint.load import load
from bimedix_jax.cli import main
from bimedix_jax.models.config import LoraConfig
from bimedix_jax.models.init import init_random

TINY = tiny(GROUPED, hidden_size=64, intermediate_size=128)
LORA = LoraConfig(rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_hf(init_random(TINY, dtype="bfloat16"), tmp_path_factory.mktemp("tiny") / "hf")


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    return store.save_adapter(add_lora(load(folder, "nf4"), LORA), tmp_path_factory.mktemp("tiny") / "adapter")


def counted(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main(["coverage", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["coverage", *words]) == 1
    return capsys.readouterr().err


def test_the_papers_count(capsys):
    """1,904,246,784 = 4.08 % of 46.70 B, which the paper calls about 4 %."""
    result = counted(capsys, "--model", "mixtral-8x7b", "--rank", "128", "--alpha", "64")
    assert result["trainable_parameters"] == 1_904_246_784
    assert result["total_parameters"] == 46_702_792_704
    assert result == counted(capsys, "--model", "mixtral-8x7b")
    bits = {row["name"]: row["bits"] for row in result["rows"]}
    assert bits["layers.moe.w1.w"] == pytest.approx(4.127, abs=1e-3)
    assert bits["layers.moe.router.w"] == 16


def test_the_count_with_the_output_projection(capsys):
    targets = ("q", "k", "v", "o", "w1", "w2", "w3", "router")
    result = counted(capsys, "--model", "mixtral-8x7b", "--targets", *targets, "--base", "bfloat16")
    assert result["trainable_parameters"] == 1_937_801_216
    assert {row["bits"] for row in result["rows"]} == {16}


@pytest.mark.parametrize("base", ["nf4", "bfloat16", "float32"])
def test_the_table_from_shapes_equals_that_of_the_loaded_model(folder, capsys, base):
    result = counted(capsys, "--model", str(folder), "--rank", "2", "--alpha", "4", "--base", base)
    expected = coverage(add_lora(load(folder, base), LORA)).to_dict()
    assert {key: result[key] for key in expected} == json.loads(json.dumps(expected))
    assert result["lora"] == json.loads(json.dumps(dataclasses.asdict(LORA) | {"scale": 2.0}))


def test_a_folder_needs_only_its_configuration(folder, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    words = ("--model", str(tmp_path), "--rank", "0", "--base", "float32")
    result = counted(capsys, *words)
    assert result["lora"] is None
    assert result["trainable_parameters"] == result["total_parameters"]


def test_a_trained_adapter_has_the_count_of_its_file(folder, adapter, capsys):
    result = counted(capsys, "--model", str(folder), "--adapter", str(adapter))
    stored = load_file(adapter / store.ADAPTER_WEIGHTS)
    assert result["trainable_parameters"] == sum(array.size for array in stored.values())
    assert result["lora"]["rank"] == 2
    assert "leave those options out" in refused(
        capsys, "--model", str(folder), "--adapter", str(adapter), "--rank", "2"
    )
    assert "another base" in refused(capsys, "--model", "mixtral-8x7b", "--adapter", str(adapter))


def test_an_adapter_that_lacks_a_tensor_raises(folder, adapter, tmp_path, capsys):
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / store.ADAPTER_WEIGHTS)
    gone = sorted(tensors)[0]
    save_file({name: array for name, array in tensors.items() if name != gone}, tmp_path / store.ADAPTER_WEIGHTS)
    write_manifest(tmp_path)
    assert gone in refused(capsys, "--model", str(folder), "--adapter", str(tmp_path))


def test_a_native_checkpoint_has_its_own_storage_and_adapters(folder, tmp_path, capsys):
    native = store.save(add_lora(load(folder, "nf4"), LORA), tmp_path / "native")
    result = counted(capsys, "--model", str(native))
    assert (result["base"], result["lora"]["rank"]) == ("nf4", 2)
    assert "saved with base nf4" in refused(capsys, "--model", str(native), "--base", "float32")
    assert "already has adapters" in refused(capsys, "--model", str(native), "--rank", "4")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "mixtral-8x70b"), "neither a known architecture (mixtral-8x7b) nor a folder"),
        (("--model", "mixtral-8x7b", "--targets", "gate"), "Unknown target gate"),
        (("--model", "mixtral-8x7b", "--rank", "0", "--alpha", "8"), "leave --alpha and --targets out"),
        (("--model", "mixtral-8x7b", "--rank", "-1"), "rank must be at least 1"),
    ],
)
def test_wrong_options_raise(words, said, capsys):
    assert said in refused(capsys, *words)


def test_the_table_fits_a_terminal_of_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["coverage", "--model", "mixtral-8x7b"]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    assert "1,904,246,784 trainable of 46,702,792,704 (4.08 %)" in out
    w1 = next(line for line in out.splitlines() if "moe.w1" in line)
    assert w1.split() == ["layers.moe.w1.w", "32x8x4096x14336", "15,032.39", "4.13", "128", "603.98"]
