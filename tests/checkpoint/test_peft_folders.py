"""PEFT folders: what is written, older spellings, swapped factors, and errors."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bimedix_jax as bmx
from bimedix_jax.adapters import add_lora, linears
from bimedix_jax.checkpoint.peft_read import load_peft
from bimedix_jax.checkpoint.peft_write import export_peft
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.config import LoraConfig
from bimedix_jax.models.mixtral import Mixtral

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 12))
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
DEFAULT = LoraConfig(rank=4, alpha=8.0)
STABILISED = LoraConfig(rank=4, alpha=8.0, rank_stabilised=True)
ATTENTION = LoraConfig(rank=2, alpha=3.0, targets=("v", "o"), dropout=0.1)
ROUTER = LoraConfig(rank=4, alpha=8.0, targets=("q", "w1", "w3"), train_router=True)
SOME = LoraConfig(
    rank=4,
    alpha=8.0,
    targets=(
        r"layers\.1\.attention\.q",
        r"layers\.0\.moe\.experts\.(0|2)\.w1",
        r"layers\.1\.moe\.experts\.3\.w2",
        r"layers\.1\.moe\.router",
    ),
)


def our_logits(model: Mixtral) -> np.ndarray:
    return np.asarray(model(TOKENS).logits_BTV)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Asserts equal logits, up to the order of float32 sums."""
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def slots_and_ranks(model: Mixtral) -> dict[str, tuple]:
    """Slots and ranks of the adapters, by kind."""
    adapters = {path[-1]: layer.lora for path, layer in linears(model).items()}
    return {kind: (lora.slots, lora.a.get_value().shape[-1]) for kind, lora in adapters.items() if lora is not None}


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], object], **settings: Any) -> Path:
    """Changes tensors and settings of an adapter in place."""
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    change(tensors)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, weights)
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return folder


@pytest.fixture
def exported(model: Mixtral, trained: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """One of our adapters as a PEFT folder, without the file that identifies the base unless `identity`."""

    def write(layout: Any = "fused", config: LoraConfig = DEFAULT, identity: bool = False) -> Path:
        folder = export_peft(trained(model, config), tmp_path / f"{layout}-adapter", layout)
        if not identity:
            (folder / "bimedix_adapter.json").unlink()
        return folder

    return write


def as_transformers_4(tensors: dict[str, np.ndarray]) -> None:
    """Older spellings: the adapter's name left in, the prefix left out."""
    for name in list(tensors):
        new = name.replace("lora_A.weight", "lora_A.default.weight").removeprefix("base_model.model.")
        tensors[new] = tensors.pop(name)


def test_older_spellings_are_read(model, trained, exported):
    expected = our_logits(trained(model, DEFAULT))
    assert_same(our_logits(load_peft(model, edit(exported("per_expert"), as_transformers_4))), expected)


def test_per_expert_adapter_of_some_experts(model, trained, exported):
    """As transformers 4 + peft train them, which transformers 5 cannot load."""
    names = ["model.layers.1.self_attn.q_proj", "model.layers.0.block_sparse_moe.experts.2.w1"]

    def keep(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            if name.removeprefix("base_model.model.").rpartition(".lora_")[0] not in names:
                del tensors[name]

    adapted = load_peft(model, edit(exported("per_expert"), keep, target_modules=names))
    assert slots_and_ranks(adapted) == {"q": ((1,), 4), "w1": ((2,), 4)}
    whole = trained(model, DEFAULT)
    ours, theirs = adapted.layers.moe.w1.lora, whole.layers.moe.w1.lora
    assert ours is not None
    assert theirs is not None
    np.testing.assert_array_equal(ours.b[0], theirs.b[0, 2])


def test_per_expert_adapters_keep_their_rank_stabilised_scale(model, trained, exported, caplog):
    """peft 0.21 doubles rank and alpha, so that a scale of alpha / sqrt(rank) grows by sqrt(2) for fused w1 and w3."""
    folder = exported("per_expert", STABILISED)
    assert "(mlp" in (folder / "adapter_config.json").read_text()
    load_peft(model, folder)
    assert "1.41" not in caplog.text
    adapted = load_peft(model, edit(folder, lambda tensors: None, rank_pattern={}, alpha_pattern={}))
    assert "1.41" in caplog.text
    assert_same(our_logits(adapted), our_logits(trained(model, STABILISED)))


def swap_roles(tensors: dict[str, np.ndarray], experts: int = 4) -> None:
    """Fused factors as peft up to 0.19.0 had them: A [E*r, out], B [in, r*E]."""
    for name in [name for name in tensors if ".experts." in name and "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        a, b = tensors[name], tensors[other]
        rank = a.shape[0] // experts
        new_a = b.reshape(-1, rank, experts).transpose(2, 1, 0).reshape(experts * rank, -1)
        new_b = a.reshape(experts, rank, -1).transpose(2, 1, 0).reshape(-1, rank * experts)
        tensors[name], tensors[other] = new_a, new_b


@pytest.mark.parametrize("version", ["0.18.1", None])
def test_swapped_factors_are_recognised_by_shape(model, trained, exported, caplog, version):
    expected = our_logits(trained(model, DEFAULT))
    adapted = load_peft(model, edit(exported(), swap_roles, peft_version=version))
    assert "A and B swapped" in caplog.text
    assert_same(our_logits(adapted), expected)


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory, write_mixtral: Callable[..., Path]) -> Mixtral:
    folder = write_mixtral(tmp_path_factory.mktemp("square") / "base", dtype="float32", intermediate_size=32)
    return bmx.load(folder, base="float32")


W2 = LoraConfig(rank=4, alpha=8.0, targets=("w2",))


@pytest.mark.parametrize(
    ("version", "swapped"), [("0.19.0", True), ("0.18.0", True), ("0.19.1", False), ("0.21.3.dev0@abc", False)]
)
def test_square_experts_follow_the_recorded_version(square, trained, tmp_path, version, swapped):
    expected = our_logits(trained(square, W2))
    folder = export_peft(trained(square, W2), tmp_path / "adapter", "fused")
    edit(folder, swap_roles if swapped else lambda tensors: None, peft_version=version)
    assert_same(our_logits(load_peft(square, folder)), expected)


def test_square_experts_without_a_version_raise(square, trained, tmp_path):
    folder = edit(export_peft(trained(square, W2), tmp_path / "adapter", "fused"), lambda t: None, peft_version=None)
    with pytest.raises(BimedixError, match="square"):
        load_peft(square, folder)
    both = export_peft(trained(square, LoraConfig(rank=4, alpha=8.0, targets=("w1", "w2"))), tmp_path / "both", "fused")
    edit(both, lambda tensors: None, peft_version=None)
    load_peft(square, both)  # gate_up is not square and decides for the whole file


def test_base_is_shared(model, exported):
    adapted = load_peft(model, exported())
    for path, layer in linears(model).items():
        assert linears(adapted)[path].w.get_value() is layer.w.get_value()
    assert model.lora is None


def test_identity_of_the_base(model, exported, tmp_path, write_mixtral, caplog):
    folder = exported(identity=True)
    load_peft(model, folder)
    assert "only shapes" not in caplog.text
    other = bmx.load(write_mixtral(tmp_path / "other", dtype="float32", initializer_range=0.2), base="float32")
    with pytest.raises(BimedixError, match="trained on another base"):
        load_peft(other, folder)
    (folder / "bimedix_adapter.json").unlink()
    load_peft(other, folder)
    assert "only shapes were checked" in caplog.text


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("origin", "name", "revision"),
    [
        ("/home/someone/models/mixtral", "mixtral", None),
        ("/cache/hub/models--mistralai--Mixtral-8x7B-v0.1/snapshots/ab12", "mistralai/Mixtral-8x7B-v0.1", "ab12"),
        (None, None, None),
    ],
)
def test_name_of_the_base_is_not_a_path(model, trained, tmp_path, origin, name, revision):
    adapted = trained(model, ATTENTION)
    adapted.origin = origin
    settings = settings_of(export_peft(adapted, tmp_path / "adapter"))
    assert (settings["base_model_name_or_path"], settings["revision"]) == (name, revision)
    assert "/home" not in "".join(path.read_text("utf-8", "replace") for path in (tmp_path / "adapter").iterdir())


def test_zeros_that_a_layout_requires_are_reported(model, trained, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    some = trained(model, SOME)
    export_peft(some, tmp_path / "per_expert", "per_expert")
    # w1: 6 of 8, w3: 8, w2: 7, router: 1 of 2
    assert "cannot leave out 22 matrices" in caplog.text
    export_peft(some, tmp_path / "fused", "fused")
    assert "cannot leave out 5 matrices" in caplog.text  # 2 experts of w1 in layer 0, 3 of w2 in layer 1
    names = set(load_file(tmp_path / "fused" / "adapter_model.safetensors"))
    assert not any("layers.0.self_attn" in name or "layers.0.mlp.gate" in name for name in names)
    export_peft(trained(model, LoraConfig(rank=2, alpha=2.0, targets=("q", "w2"), dropout=0.1)), tmp_path / "dropout")
    assert "lora_dropout is written as 0 instead of 0.1" in caplog.text
    assert settings_of(tmp_path / "dropout")["lora_dropout"] == 0
    assert settings_of(export_peft(trained(model, ATTENTION), tmp_path / "a"))["lora_dropout"] == 0.1


def test_per_expert_layout_has_only_keys_of_transformers_4(model, exported):
    settings = settings_of(exported("per_expert"))
    assert {"peft_version", "target_parameters"}.isdisjoint(settings)
    assert settings["target_modules"] == ["q_proj", "k_proj", "v_proj", "gate", "w1", "w2", "w3"]
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}


REFUSED = {
    "use_dora": (True, "DoRA"),
    "bias": ("lora_only", "biases"),
    "fan_in_fan_out": (True, "fan_in_fan_out"),
    "layer_replication": ([[0, 1]], "replicated"),
    "trainable_token_indices": ([3], "tokens"),
    "modules_to_save": (["lm_head"], "only routers"),
    "peft_type": ("LOKR", "LOKR"),
    "init_lora_weights": ("pissa", "pissa"),
    "something_new": (3, "something_new"),
    "target_modules": (["q_proj", "k_proj", "v_proj", "o_proj"], "no tensors.*o_proj"),
    "target_parameters": (FUSED[:2], "does not target.*gate"),
    "r": (3, "rank 3, but its tensors have rank 4"),
    "rank_pattern": ({"q_proj": 0}, "below 1"),
    "alpha_pattern": ({"(q_proj": 4}, "not valid"),
    "lora_alpha": ("much", "lora_alpha = 'much', but it should be a valid number"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_unsupported_settings_raise(model, exported, key):
    value, message = REFUSED[key]
    with pytest.raises(BimedixError, match=message):
        load_peft(model, edit(exported(), lambda tensors: None, **{key: value}))


def test_unknown_settings_that_are_off_are_accepted(model, exported):
    load_peft(model, edit(exported(), lambda tensors: None, something_new=None, another=False))


Q_A, Q_B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{factor}.weight" for factor in "AB")
OUTER = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
BROKEN: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str]] = {
    "missing": (lambda t: (t.pop(Q_A), t.pop(Q_B)), "no tensors.*q_proj"),
    "half": (lambda t: t.pop(Q_B), "only one of lora_A and lora_B"),
    "left over": (lambda t: t.update({Q_A.replace("q_proj", "z_proj"): t[Q_A]}), "fit no module.*z_proj"),
    "another layer": (lambda t: t.update({Q_A.replace("layers.0", "layers.7"): t[Q_A]}), "layers.7"),
    "embedding": (lambda t: t.update({"model.embed_tokens.lora_embedding_A": t[Q_A]}), "embed_tokens"),
    "NaN": (lambda t: t[Q_A].__setitem__((0, 0), np.nan), re.escape(Q_A)),
    "infinity": (lambda t: t[OUTER].__setitem__((0, 0), np.inf), re.escape(OUTER)),
    "shape": (lambda t: t.update({Q_B: t[Q_B][:-1]}), "do not fit the base's weight"),
    "fused shape": (lambda t: t.update({OUTER: t[OUTER][:, :-1]}), "fit no stack of experts"),
    "dtype": (lambda t: t.update({Q_A: t[Q_A].astype(np.int32)}), "floating point"),
    "zero": (lambda t: [value.fill(0) for value in t.values()], "zero everywhere"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_invalid_tensors_raise(model, exported, name):
    change, message = BROKEN[name]
    with pytest.raises(BimedixError, match=message):
        load_peft(model, edit(exported(), change))


def test_incomplete_routers_raise(model, exported):
    folder = exported("per_expert", ROUTER)
    gate = "base_model.model.model.layers.{}.{}.gate.weight"

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[gate.format(0, "mlp")] = tensors[gate.format(0, "mlp")] + 1

    with pytest.raises(BimedixError, match="differ"):
        load_peft(model, edit(folder, change))
    drop = [gate.format(1, "mlp"), gate.format(1, "block_sparse_moe")]
    with pytest.raises(BimedixError, match="1 router weights for 2 layers"):
        load_peft(model, edit(folder, lambda tensors: [tensors.pop(name) for name in drop]))


def test_invalid_folders_raise(base, model, exported, tmp_path):
    folder = exported()
    adapted = load_peft(model, folder)
    with pytest.raises(BimedixError, match="already has adapters"):
        load_peft(adapted, folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(BimedixError, match=r"contains no adapter_model\.safetensors"):
        load_peft(model, folder)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(BimedixError, match="pickled"):
        bmx.load(base, base="float32", adapter=folder)
    shutil.rmtree(folder)
    with pytest.raises(BimedixError, match="cannot be read"):
        bmx.load(base, base="float32", adapter=folder)


def test_invalid_exports_raise(model, trained, tmp_path):
    with pytest.raises(BimedixError, match="no adapters"):
        export_peft(model, tmp_path / "adapter")
    adapted = trained(model, ATTENTION)
    layout: Any = "stacked"
    with pytest.raises(BimedixError, match="choose per_expert or fused"):
        export_peft(adapted, tmp_path / "adapter", layout)
    with pytest.raises(BimedixError, match="shapes only"):
        export_peft(add_lora(Mixtral(model.config), ATTENTION), tmp_path / "adapter")
    export_peft(adapted, tmp_path / "adapter")
    with pytest.raises(BimedixError, match="not empty"):
        export_peft(adapted, tmp_path / "adapter")
    export_peft(adapted, tmp_path / "adapter", overwrite=True)


def test_fresh_adapters_keep_their_ranks(model, tmp_path):
    """B is zero, so that only our record shows which ranks of the fused w1 and w3 belong to which."""
    folder = export_peft(add_lora(model, DEFAULT), tmp_path / "adapter", "fused")
    assert slots_and_ranks(load_peft(model, folder))["w1"] == (None, 4)
    (folder / "bimedix_adapter.json").unlink()
    shared = slots_and_ranks(load_peft(model, folder))
    assert shared["w1"] == shared["w3"] == (None, 8)


def rename_all(rename: Callable[[str], str]) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: name.replace("base_model.model.", "base_model.model.module.", 1),
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        lambda name: re.sub(r"(lora_[AB])", r"\1.medical", name),
    ],
)
def test_names_of_wrappers_give_the_same_adapter(
    model: Mixtral, exported: Callable[..., Path], rename: Callable[[str], str]
) -> None:
    folder = exported("per_expert")
    expected = our_logits(load_peft(model, folder))
    np.testing.assert_array_equal(our_logits(load_peft(model, edit(folder, rename_all(rename)))), expected)


def test_several_adapters_in_one_file_raise(model: Mixtral, exported: Callable[..., Path]) -> None:
    def two(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.replace(".weight", ".first.weight")] = tensors[name]
            tensors[name.replace(".weight", ".second.weight")] = tensors.pop(name)

    with pytest.raises(BimedixError, match=r"have 2 \(first, second\)"):
        load_peft(model, edit(exported("per_expert", ATTENTION), two))


def test_partitioned_adapters_are_named(model: Mixtral, exported: Callable[..., Path]) -> None:
    def empty(tensors: dict[str, np.ndarray]) -> None:
        tensors |= {name: np.empty(0, np.float32) for name in tensors}

    with pytest.raises(BimedixError, match=r"adapter_model\.safetensors has .* empty tensor.*ZeRO-3"):
        load_peft(model, edit(exported("per_expert", ATTENTION), empty))


def test_the_subfolder_of_a_named_adapter_is_named(base: Path, exported: Callable[..., Path]) -> None:
    folder = exported()
    parent = folder.with_name("saved")
    parent.mkdir()
    folder.rename(parent / "medical")
    with pytest.raises(BimedixError, match=r"name the subfolder that does: .*saved/medical"):
        bmx.load(base, base="float32", adapter=parent)


def test_parts_of_an_adapter_are_named(model: Mixtral, exported: Callable[..., Path]) -> None:
    folder = exported()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model-00001-of-00002.safetensors")
    with pytest.raises(BimedixError, match="has its adapter in 1 parts"):
        load_peft(model, folder)
