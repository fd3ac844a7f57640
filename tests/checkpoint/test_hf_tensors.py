"""Names, buffers and heads that differ between files of one model give the same model, or an error that names why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bimedix_jax.checkpoint.hf import load_hf
from bimedix_jax.checkpoint.hf_config import read_config
from bimedix_jax.checkpoint.hf_tensors import read_tensors
from bimedix_jax.checkpoint.rewrite import rewrite
from bimedix_jax.checkpoint.safetensors_io import read_folder
from bimedix_jax.errors import BimedixError

Change = Callable[[Callable[[dict[str, Any]], object]], Path]


def renamed(rename: Callable[[str], str]) -> Callable[[dict[str, Any]], None]:
    def edit(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    return edit


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module.").replace(
            "model.", "model._orig_mod.", 1
        ),
        lambda name: f"model.{name}",
        lambda name: f"policy.pretrained.{name}",
        lambda name: name.removeprefix("model."),
    ],
)
def test_names_of_wrappers_give_the_same_tensors(mixtral: Path, changed: Change, rename: Callable[[str], str]) -> None:
    folder = changed(renamed(rename))
    found, expected = read_tensors(folder, read_config(folder)), read_folder(mixtral)
    assert found.keys() == expected.keys()
    assert all(found[name].read().tobytes() == tensor.read().tobytes() for name, tensor in expected.items())


def test_two_tensors_of_one_name_raise(changed: Change) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors["module.lm_head.weight"] = tensors["lm_head.weight"].clone()

    with pytest.raises(BimedixError, match=r"has lm_head\.weight twice"):
        load_hf(changed(edit))


def test_rotary_buffers_are_ignored(mixtral: Path, changed: Change) -> None:
    import torch

    def edit(tensors: dict[str, Any]) -> None:
        for name in (
            "model.rotary_emb.inv_freq",
            "model.rotary_emb.original_inv_freq",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.layers.1.self_attn.rotary_emb.sin_cached",
        ):
            tensors[name] = torch.ones(8)
        tensors["model.layers.0.self_attn.rotary_emb.cos_cached"] = torch.ones(0)

    folder = changed(edit)
    assert read_tensors(folder, read_config(folder)).keys() == read_folder(mixtral).keys()


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (0,), "1 empty tensor.*q_proj.*ZeRO-3.*zero_to_fp32"),
        ("model.layers.0._fsdp_wrapped_module._flat_param", (5,), "FSDP's flattened parameters"),
    ],
)
def test_partitioned_parameters_are_named(changed: Change, name: str, shape: tuple[int, ...], why: str) -> None:
    import torch

    with pytest.raises(BimedixError, match=why):
        load_hf(changed(lambda tensors: tensors.update({name: torch.ones(shape)})))


@pytest.mark.parametrize("key", [{"attention_bias": True}, {}])
def test_only_biases_of_zeros_are_ignored(mixtral: Path, changed: Change, key: dict[str, Any]) -> None:
    import torch

    name = "model.layers.0.self_attn.q_proj.bias"
    folder = changed(lambda tensors: tensors.update({name: torch.zeros(len(tensors[name[:-4] + "weight"]))}))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **key}))
    assert read_tensors(folder, read_config(folder)).keys() == read_folder(mixtral).keys()
    stored = read_folder(folder)[name]
    with stored.path.open("r+b") as file:
        file.seek(stored.start)
        file.write(np.ones(1, stored.dtype).tobytes())
    with pytest.raises(BimedixError, match="attention_bias" if key else r"1 bias\(es\) that are not zero .*q_proj"):
        read_tensors(folder, read_config(folder))


def set_tied(folder: Path, tied: bool) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": tied}))
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_equal_head_of_a_tied_model_is_ignored(changed: Change, tmp_path: Path, dtype: str) -> None:
    import torch

    def edit(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone().to(getattr(torch, dtype))

    folder = set_tied(changed(edit), tied=True)
    model = load_hf(folder)
    assert model.lm_head is None
    written = read_folder(rewrite(folder, tmp_path / "written", "bfloat16"))
    assert "lm_head.weight" not in written
    embedding = np.asarray(model.embed.table.get_value())
    assert written["model.embed_tokens.weight"].read().tobytes() == embedding.tobytes()


def test_a_different_head_of_a_tied_model_raises(changed: Change) -> None:
    with pytest.raises(BimedixError, match="set tie_word_embeddings to false"):
        load_hf(set_tied(changed(lambda tensors: None), tied=True))


def test_a_missing_head_names_the_tie(changed: Change) -> None:
    with pytest.raises(BimedixError, match="if the model is tied, set it to true"):
        load_hf(changed(lambda tensors: tensors.pop("lm_head.weight")))


def test_folders_that_are_something_else_are_named(mixtral: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "config.json").write_bytes((mixtral / "config.json").read_bytes())
    (parts / "model-00001-of-00003.safetensors").write_bytes(b"")
    with pytest.raises(BimedixError, match=r"has 1 of 3 parts.*not model\.safetensors\.index\.json"):
        load_hf(parts)
    with pytest.raises(BimedixError, match=r"name the subfolder that has it: .*parts"):
        load_hf(tmp_path)
    gguf = tmp_path / "gguf" / "model.gguf"
    gguf.parent.mkdir()
    gguf.touch()
    with pytest.raises(BimedixError, match=r"name the file: .*model\.gguf"):
        load_hf(gguf.parent)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BimedixError, match="adapter without a base model"):
        load_hf(tmp_path)


def test_a_tokenizer_that_is_a_pointer_is_not_copied(changed: Change, tmp_path: Path) -> None:
    folder = changed(lambda tensors: None)
    (folder / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BimedixError, match=r"tokenizer\.model is a git-lfs pointer"):
        rewrite(folder, tmp_path / "written", "bfloat16")
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"<!doctype html>\n<html>"])
def test_weights_that_are_pointers_or_pages_are_named(mixtral: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes((mixtral / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BimedixError, match=r"is a git-lfs pointer, not the file|is a web page"):
        load_hf(tmp_path)
