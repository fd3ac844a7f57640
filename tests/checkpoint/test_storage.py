"""An adapter records the storage that it was trained over, which is the default wherever the adapter is loaded."""

import json
import logging
import shutil

import jax
import pytest
from tiny import tiny

import bimedix_jax as bmx
from bimedix_jax.adapters import linears
from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.checkpoint.integrity import write_manifest
from bimedix_jax.checkpoint.load import load, trained_over
from bimedix_jax.checkpoint.peft import is_peft
from bimedix_jax.checkpoint.peft_write import export_peft
from bimedix_jax.checkpoint.store import is_adapter, restore, save, save_adapter
from bimedix_jax.cli import main
from bimedix_jax.data.tokenizer import byte_tokenizer
from bimedix_jax.models.config import MIXED, LoraConfig, Storage
from bimedix_jax.models.init import init_random
from bimedix_jax.quantise import quantise_base, storage_of

LORA = LoraConfig(rank=2, alpha=4.0, targets=("q", "w1", "w2", "w3"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Hugging Face folder with a tokenizer; read-only."""
    folder = tmp_path_factory.mktemp("base") / "base"
    export_hf(init_random(tiny(max_position_embeddings=2048), dtype="bfloat16", std=0.3), folder)
    byte_tokenizer(folder)
    return folder


def adapter_over(source, folder, base, dtype=None):
    """An adapter whose factors are not zero, saved over `base`."""
    adapted = bmx.add_lora(load(source, base, dtype=dtype), LORA)
    for layer in linears(adapted).values():
        if layer.lora is not None:
            b = layer.lora.b.get_value()
            layer.lora.b.set_value(0.3 * jax.random.normal(jax.random.key(b.size), b.shape))
    save_adapter(adapted, folder)
    return folder


@pytest.fixture(scope="module")
def over_nf4(source, tmp_path_factory):
    return adapter_over(source, tmp_path_factory.mktemp("nf4") / "adapter", "nf4", "float32")


def test_the_adapters_storage_is_the_default(source, over_nf4, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    assert trained_over(over_nf4) == Storage(base="nf4", dtype="float32")
    assert storage_of(load(source, adapter=over_nf4)) == Storage(base="nf4", dtype="float32")
    assert storage_of(load(source, "nf4", adapter=over_nf4)) == Storage(base="nf4", dtype="float32")
    wide = adapter_over(source, tmp_path / "wide", "float32")
    assert storage_of(load(source, adapter=wide)) == Storage(base="float32", dtype="float32")
    assert storage_of(load(source)).base == "bfloat16"
    assert "trained over" not in caplog.text


def test_another_storage_is_a_warning_that_names_both(source, over_nf4, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    model = load(source, "bfloat16", adapter=over_nf4)
    assert storage_of(model) == Storage(base="bfloat16", dtype="bfloat16")
    assert "trained over nf4 and runs over bfloat16" in caplog.text
    # a native checkpoint has one storage, which stays
    save(load(source, "bfloat16"), tmp_path / "native")
    caplog.clear()
    assert storage_of(load(tmp_path / "native", adapter=over_nf4)).base == "bfloat16"
    assert "trained over nf4 and runs over bfloat16" in caplog.text
    # what was loaded keeps its origin in every format
    save(model, tmp_path / "whole")
    caplog.clear()
    assert restore(tmp_path / "whole").trained_over == model.trained_over
    assert "trained over nf4 and runs over bfloat16" in caplog.text
    save_adapter(model, tmp_path / "again")
    assert trained_over(tmp_path / "again") == trained_over(over_nf4)


def test_an_exported_peft_folder_records_the_storage(source, over_nf4, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    export_peft(load(source, adapter=over_nf4), tmp_path / "peft")
    assert storage_of(load(source, adapter=tmp_path / "peft")) == Storage(base="nf4", dtype="float32")
    assert "trained over" not in caplog.text
    load(source, "float32", adapter=tmp_path / "peft")
    assert "trained over nf4 and runs over float32" in caplog.text
    (tmp_path / "peft/bimedix_adapter.json").unlink()
    assert storage_of(load(source, adapter=tmp_path / "peft")).base == "bfloat16"
    assert "does not record the storage" in caplog.text


def test_the_file_name_of_peft_is_not_used(over_nf4):
    assert not (over_nf4 / "adapter_config.json").exists()
    assert is_adapter(over_nf4)
    assert not is_peft(over_nf4)


def older(folder, target):
    """The folder as an earlier version wrote it."""
    shutil.copytree(folder, target)
    record = json.loads((target / "adapter.json").read_text())
    record["format"] = "bimedix adapter 3"
    del record["base"]["storage"]
    (target / "adapter.json").unlink()
    (target / "adapter_config.json").write_text(json.dumps(record))
    (target / "manifest.json").unlink()
    write_manifest(target)
    return target


def test_older_folders_load(source, over_nf4, tmp_path, caplog):
    """An adapter inside its run takes the storage from the run."""
    caplog.set_level(logging.WARNING)
    adapter = older(over_nf4, tmp_path / "run/adapter")
    assert is_adapter(adapter)
    model = load(source, adapter=adapter)
    assert storage_of(model).base == "bfloat16"
    assert "does not record the storage" in caplog.text
    run = {"optimiser": {}, "model": {"path": "elsewhere", "random": None, "base": "nf4", "dtype": None}}
    (tmp_path / "run/config.json").write_text(json.dumps(run))
    assert storage_of(load(source, adapter=adapter)) == Storage(base="nf4", dtype="bfloat16")


def test_a_partly_packed_base(source, over_nf4, tmp_path, caplog):
    """Its adapters keep the storage of the folder."""
    caplog.set_level(logging.ERROR)
    command = [
        "export",
        str(source),
        "--out",
        str(tmp_path / "part"),
        "--format",
        "bitsandbytes",
        "--layout",
        "attention",
    ]
    assert main(command) == 0
    assert storage_of(load(tmp_path / "part")).base == MIXED
    adapter = adapter_over(tmp_path / "part", tmp_path / "adapter", None)
    assert storage_of(load(tmp_path / "part", adapter=adapter)).base == MIXED


def test_adapters_keep_the_storage_of_training_if_the_base_is_packed_later(source):
    adapted = bmx.add_lora(load(source, "bfloat16"), LORA)
    assert quantise_base(adapted).trained_over == Storage(base="bfloat16", dtype="bfloat16")


@pytest.mark.parametrize("into", ["original", "dequantised"])
def test_an_export_compares_with_the_model_as_it_was_trained(source, over_nf4, tmp_path, capsys, caplog, into):
    """The default base gives the same report as an explicit nf4; another base gives both comparisons, and the first of
    them, over the very weights that are merged into, does not show what the merge changes."""
    reports = {}
    for base in (None, "nf4", "bfloat16"):
        words = ["export", str(source), "--out", str(tmp_path / f"{base}"), "--adapter", str(over_nf4), "--merge", into]
        assert main([*words, *(["--base", base] if base else []), "--probe-records", "3", "--json"]) == 0
        captured, warned = capsys.readouterr(), caplog.text
        caplog.clear()
        reports[base] = json.loads(captured.out)
        assert ("trained over nf4 and runs over bfloat16" in warned) == (base == "bfloat16")
        assert ("over nf4, as in training" in captured.err) == (base == "bfloat16")
    assert reports[None]["drift"] == reports["nf4"]["drift"]
    assert reports[None]["base"] == reports[None]["trained_over"] == "nf4"
    truth = reports["bfloat16"]["drift_from_training"]["kl"]
    assert reports["bfloat16"]["drift"]["kl"] < 0.1 * truth
    if into == "original":
        assert truth == pytest.approx(reports[None]["drift"]["kl"])
