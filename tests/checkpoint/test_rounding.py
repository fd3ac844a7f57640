"""Conversions check what they convert, and say which values a narrower dtype changes."""

import json
import logging
import shutil
import warnings

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import TINY

import bimedix_jax as bmx
from bimedix_jax.checkpoint.dtypes import FROM_SAFETENSORS
from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.checkpoint.rewrite import rewrite
from bimedix_jax.checkpoint.rounding import Rounding, count_changed, holds
from bimedix_jax.cli import main
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.init import init_random

GATE = "model.layers.0.block_sparse_moe.gate.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A bfloat16 folder; read-only."""
    return export_hf(init_random(TINY, dtype="bfloat16", std=0.3), tmp_path_factory.mktemp("exact") / "model")


@pytest.fixture
def made(exact, tmp_path):
    """made(edit, dtype): a copy whose tensors have another dtype and were changed by a function."""

    def make(edit=lambda tensors: None, dtype=None, name="made"):
        folder = tmp_path / name
        shutil.copytree(exact, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors = tensors if dtype is None else {key: value.astype(dtype) for key, value in tensors.items()}
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def widen(tensors):
    """Two values that bfloat16 does not represent, and one that it does."""
    tensors[GATE][0, :3] = [1 + 2**-9, 1 - 2**-10, 1.5]
    tensors[NORM][1] = 1 + 2**-10


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_changed_values_are_counted(made, tmp_path, caplog, dtype):
    caplog.set_level(logging.WARNING)
    folder, name = made(widen, dtype), np.dtype(dtype).name
    total = sum(value.size for value in load_file(folder / "model.safetensors").values())
    expected = f"3 of {total:,} values change, because {name} becomes bfloat16"
    for convert in (
        lambda: bmx.load(folder),
        lambda: rewrite(folder, tmp_path / "written", "bfloat16"),
    ):
        caplog.clear()
        convert()
        assert expected in caplog.text
        assert "float32 keeps" in caplog.text
    caplog.clear()
    bmx.load(folder, "nf4")
    assert "3 of" in caplog.text, "router and norm stay in 16 bits"
    caplog.clear()
    wide = bmx.load(folder, "float32")
    assert not caplog.text
    assert wide.layers.moe.router.w.get_value()[0, 0, 0] == 1 + 2**-9


def test_a_conversion_that_changes_nothing_is_silent(exact, made, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    for folder in (exact, made(dtype=np.float32)):
        bmx.load(folder)
    rewrite(exact, tmp_path / "wide", "float32")
    rewrite(tmp_path / "wide", tmp_path / "back", "bfloat16")
    assert not caplog.text
    assert (tmp_path / "back/model.safetensors").read_bytes() == (exact / "model.safetensors").read_bytes()


@pytest.mark.parametrize("source", list(FROM_SAFETENSORS)[:4])
@pytest.mark.parametrize("target", ["bfloat16", "float32"])
def test_counting_equals_its_definition(source, target):
    source, target = FROM_SAFETENSORS[source], FROM_SAFETENSORS["BF16" if target == "bfloat16" else "F32"]
    values = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    values = np.concatenate([values, values * 2.0**-20, [0.0, -0.0, 1.5]]).astype(source)
    there_and_back = values.astype(target).astype(source)
    assert count_changed(values, values.astype(target)) == np.count_nonzero(there_and_back != values)
    if holds(target, source):
        assert (there_and_back == values).all()


def test_one_dtype_holds_another():
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    half, single, double = (np.dtype(kind) for kind in (np.float16, np.float32, np.float64))
    assert all(holds(single, kind) for kind in (half, bfloat16, single))
    assert not any(holds(bfloat16, kind) for kind in (half, single, double))
    assert not holds(half, bfloat16)
    assert not holds(single, double)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [GATE, EXPERT, NORM])
@pytest.mark.parametrize("dtype", [None, np.float16, np.float32])
def test_values_that_are_not_finite_are_not_converted(made, tmp_path, bad, name, dtype):
    def spoil(tensors):
        tensors[name].reshape(-1)[5] = bad

    folder = made(spoil, dtype)
    for target in ("bfloat16", "float32"):
        with pytest.raises(BimedixError, match=f"NaN or infinity in {name}"):
            rewrite(folder, tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


def test_values_beyond_the_range_are_not_converted(made, tmp_path):
    def enlarge(tensors):
        tensors[EXPERT][0, 0] = 3.4e38

    folder = made(enlarge, np.float32)
    with pytest.raises(BimedixError, match="beyond the range of bfloat16"):
        rewrite(folder, tmp_path / "out", "bfloat16")
    with pytest.raises(BimedixError, match="beyond the range of bfloat16"):
        bmx.load(folder)
    rewrite(folder, tmp_path / "out", "float32")
    with warnings.catch_warnings(), pytest.raises(BimedixError, match="beyond the range of float32"):
        warnings.simplefilter("error")
        Rounding().cast(np.array([1e300]), np.dtype(np.float32), "x")


def test_the_command_refuses_what_load_refuses(made, tmp_path, capsys):
    """NaN in every precision; announced 4-bit weights that are not there."""

    def spoil(tensors):
        tensors[EXPERT][0, 0] = np.nan

    folder = made(spoil)
    for base in ("bfloat16", "float32", "nf4"):
        assert main(["convert", str(folder), "--out", str(tmp_path / "out"), "--base", base]) == 1
        assert "NaN or infinity" in capsys.readouterr().err
    announced = made(name="announced")
    config = json.loads((announced / "config.json").read_text())
    quantisation = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (announced / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    assert main(["convert", str(announced), "--out", str(tmp_path / "out")]) == 1
    assert "declares 4-bit weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
