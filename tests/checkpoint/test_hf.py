"""Hugging Face folder -> model -> Hugging Face folder: the same bytes and logits; errors leave nothing behind."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from bimedix_jax.adapters import add_lora
from bimedix_jax.checkpoint import buffers
from bimedix_jax.checkpoint.hf import QUANTISED, export_hf, parameters
from bimedix_jax.checkpoint.hub import resolve
from bimedix_jax.checkpoint.load import load
from bimedix_jax.checkpoint.rewrite import rewrite
from bimedix_jax.checkpoint.safetensors_io import read_folder
from bimedix_jax.errors import BimedixError
from bimedix_jax.kernels.nf4 import NF4Tensor, dequantize, quantize
from bimedix_jax.models.config import LoraConfig
from bimedix_jax.models.mixtral import Mixtral

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 11))


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (str(t.dtype), t.shape, t.read().tobytes()) for name, t in read_folder(folder).items()}


def values(model: Mixtral) -> dict[str, Any]:
    return {path: variable.get_value() for path, variable in parameters(model).items()}


def reference_logits(folder: Path) -> np.ndarray:
    import torch
    import transformers

    model = transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_those_of_transformers(write_mixtral: Callable[..., Path], tmp_path: Path, tied: bool) -> None:
    folder = write_mixtral(tmp_path / "m", "float32", "20KB", tie_word_embeddings=tied)
    expected = reference_logits(folder)
    logits = nnx.jit(lambda model: model(TOKENS).logits_BTV)(load(folder, base="float32"))
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("shard", [10**9, 20_000])
def test_round_trip_keeps_every_byte(mixtral: Path, tmp_path: Path, shard: int) -> None:
    export_hf(load(mixtral), tmp_path / "out", max_shard_bytes=shard)
    assert contents(tmp_path / "out") == contents(mixtral)
    np.testing.assert_array_equal(reference_logits(tmp_path / "out"), reference_logits(mixtral))


def test_bfloat16_and_float32_are_casts_of_the_source(write_mixtral: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_mixtral(tmp_path / "m", "float32")
    full, half = values(load(folder, base="float32")), values(load(folder, base="bfloat16"))
    assert full.keys() == half.keys()
    for path, value in full.items():
        assert half[path].dtype == jnp.bfloat16
        assert jnp.array_equal(value.astype(jnp.bfloat16), half[path]), path


def fuse(tensors: dict[str, Any]) -> None:
    """Hub layout -> the layout of transformers 5 in memory."""
    import torch

    for layer in range(2):
        hub, fused = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
        tensors[fused + "gate.weight"] = tensors.pop(hub + "gate.weight")
        w1, w2, w3 = ([tensors.pop(f"{hub}experts.{e}.w{i}.weight") for e in range(4)] for i in (1, 2, 3))
        tensors[fused + "experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(w1, w3, strict=True)])
        tensors[fused + "experts.down_proj"] = torch.stack(w2)


@pytest.mark.parametrize("base", ["bfloat16", "nf4"])
def test_fused_and_hub_layout_are_the_same_model(mixtral: Path, changed: Callable[..., Path], base: Any) -> None:
    ours, theirs = values(load(mixtral, base=base)), values(load(changed(fuse), base=base))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), ours, theirs))


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 40, "intermediate_size": 36}], ids=["even", "odd"])
@pytest.mark.parametrize("piece", [200, 10**9])
def test_nf4_in_pieces_equals_nf4_of_the_whole_matrix(
    write_mixtral: Callable[..., Path],
    tmp_path: Path,
    sizes: dict[str, int],
    piece: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(buffers, "QUANTISE_BYTES", piece)
    folder = write_mixtral(tmp_path / "m", **sizes)
    dense, packed = values(load(folder)), values(load(folder, base="nf4"))
    for path, value in dense.items():
        if path not in QUANTISED:
            assert jnp.array_equal(value, packed[path]), path
            continue
        assert isinstance(packed[path], NF4Tensor)
        whole = quantize(jnp.swapaxes(value, -1, -2), batch_dims=value.ndim - 2).mT
        assert jax.tree.structure(whole) == jax.tree.structure(packed[path])
        for ours, theirs in zip(jax.tree.leaves(packed[path]), jax.tree.leaves(whole), strict=True):
            assert jnp.array_equal(ours, theirs), path


def test_nf4_is_exported_dequantised_with_a_warning(
    mixtral: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(mixtral, base="nf4")
    with caplog.at_level(logging.WARNING):
        export_hf(model, tmp_path / "out")
    assert "written dequantised" in caplog.text
    again, packed = values(load(tmp_path / "out")), values(model)
    for path in QUANTISED:
        assert jnp.array_equal(again[path], dequantize(packed[path])), path


def test_loading_copies_nothing() -> None:
    """JAX uses aligned NumPy arrays of every dtype without a copy, which the memory bound requires."""
    for dtype in (np.uint8, np.float32, ml_dtypes.bfloat16):
        buffer = buffers.aligned_empty((3, 5, 128), dtype)
        buffer[:] = 1
        array = jax.device_put(buffer)
        assert array.unsafe_buffer_pointer() == buffer.ctypes.data


def test_companions_are_copied(mixtral: Path, tmp_path: Path) -> None:
    source = shutil.copytree(mixtral, tmp_path / "source")
    files = {"tokenizer.json": "{}", "chat_template.jinja": "{{ messages }}", "generation_config.json": '{"a": 1}'}
    for name, text in files.items():
        (source / name).write_text(text)
    (source / "training_args.bin").write_text("stays")
    model = load(source)
    export_hf(model, tmp_path / "out")
    export_hf(load(mixtral), tmp_path / "named", tokenizer_from=source)
    for folder in (tmp_path / "out", tmp_path / "named"):
        assert {name: (folder / name).read_text() for name in files} == files
        assert not (folder / "training_args.bin").exists()
    kept = json.loads((tmp_path / "out" / "config.json").read_text())
    assert kept["initializer_range"] == json.loads((source / "config.json").read_text())["initializer_range"]


def test_an_export_without_tokenizer_warns(mixtral: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(mixtral)
    model.origin = None
    with caplog.at_level(logging.WARNING):
        export_hf(model, tmp_path / "out")
    assert "no tokenizer is written" in caplog.text
    with pytest.raises(BimedixError, match="does not exist"):
        export_hf(model, tmp_path / "other", tokenizer_from=tmp_path / "nowhere")


def test_exporting_adapters_raises(mixtral: Path, tmp_path: Path) -> None:
    model = add_lora(load(mixtral), LoraConfig(rank=2, alpha=2.0))
    with pytest.raises(BimedixError, match="adapter"):
        export_hf(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


GATE = "model.layers.1.block_sparse_moe.gate.weight"


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda t: t.pop(GATE), rf"1 tensor\(s\) missing \({GATE}\)"),
        (lambda t: t.update(extra=t[GATE].clone()), r"1 tensor\(s\) unknown \(extra\)"),
        (lambda t: t.update({GATE: t[GATE][:3].clone()}), r"\[3, 32\] instead of \[4, 32\]"),
        (lambda t: t.update({GATE: t[GATE].T.contiguous()}), "of another shape"),
        (lambda t: t.update({GATE: t[GATE].char()}), "int8"),
        (lambda t: [t.pop(name) for name in list(t) if "experts" in name], "and 21 more"),
    ],
    ids=["missing", "extra", "short", "transposed", "dtype", "many"],
)
@pytest.mark.parametrize("convert", [False, True], ids=["load", "rewrite"])
def test_tensors_that_do_not_fit_raise(
    changed: Callable[..., Path], tmp_path: Path, edit: Callable[[Any], object], why: str, convert: bool
) -> None:
    folder = changed(edit)
    with pytest.raises(BimedixError, match=why):
        if convert:
            rewrite(folder, tmp_path / "out", "float32")
        else:
            load(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


def test_recomputed_buffers_are_ignored(changed: Callable[..., Path]) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors["model.norm.weight"].clone()

    load(changed(add))


def test_a_truncated_shard_leaves_no_output(write_mixtral: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_mixtral(tmp_path / "m", shard="20KB")
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-10])
    for attempt in (lambda: load(folder), lambda: rewrite(folder, tmp_path / "out", "bfloat16")):
        with pytest.raises(BimedixError, match="truncated"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_failure_while_writing_leaves_no_output(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    model = load(mixtral)
    monkeypatch.setattr("bimedix_jax.checkpoint.hf.write_config", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_hf(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], r"--revision refs/pr/1"),
        (["consolidated.00.pt"], "pickled"),
        (["consolidated.safetensors"], "another layout"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter without a base"),
        ([], "contains neither"),
    ],
)
def test_folders_without_safetensors_raise(mixtral: Path, tmp_path: Path, files: list[str], why: str) -> None:
    shutil.copy(mixtral / "config.json", tmp_path)
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BimedixError, match=why):
        load(tmp_path)


def test_unknown_names_raise(mixtral: Path, tmp_path: Path) -> None:
    for name, revision, why in (
        (str(tmp_path / "absent"), None, "neither an existing folder"),
        (str(mixtral), "refs/pr/1", "leave --revision out"),
        (str(mixtral / "config.json"), None, "is a file"),
        ("no-such-owner/no-such-model", None, "cannot get"),
    ):
        with pytest.raises(BimedixError, match=why):
            resolve(name, revision)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rewrite_equals_load_and_export(write_mixtral: Callable[..., Path], tmp_path: Path, dtype: Any) -> None:
    folder = write_mixtral(tmp_path / "m", "float32", "20KB")
    rewrite(folder, tmp_path / "out", dtype, max_shard_bytes=20_000)
    export_hf(load(folder, base=dtype), tmp_path / "other")
    assert contents(tmp_path / "out") == contents(tmp_path / "other")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_unknown_base_and_dtype_raise(mixtral: Path) -> None:
    with pytest.raises(BimedixError, match="base 'int8' is unknown"):
        load(mixtral, base="int8")  # pyright: ignore[reportArgumentType]
    with pytest.raises(BimedixError, match="dtype 'float16' is unknown"):
        load(mixtral, dtype="float16")
    assert load(mixtral, base="nf4", dtype="float32").dtype == "float32"


def test_the_origin_survives_splitting(mixtral: Path) -> None:
    model = load(mixtral)
    assert nnx.merge(*nnx.split(model)).origin == str(mixtral)


@pytest.mark.parametrize("base", ["bfloat16", "float32", "nf4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_raise(changed: Callable[..., Path], base: Any, value: float) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"

    def spoil(tensors: dict[str, Any]) -> None:
        tensors[name][5, 7] = value

    with pytest.raises(BimedixError, match=re.escape(f"NaN or infinity in {name}")):
        load(changed(spoil), base)
