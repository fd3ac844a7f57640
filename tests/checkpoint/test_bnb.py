"""bitsandbytes' 4-bit folders are read and written bit-exactly, with equal logits; inconsistent folders raise.

One long file, since reading and writing are tested on the same folders, which the functions of its first part pack.
"""

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file

from bimedix_jax.adapters import add_lora
from bimedix_jax.checkpoint.bnb import export_bnb
from bimedix_jax.checkpoint.hf import QUANTISED, export_hf, parameters
from bimedix_jax.checkpoint.load import load
from bimedix_jax.checkpoint.rewrite import rewrite
from bimedix_jax.checkpoint.safetensors_io import read_folder
from bimedix_jax.checkpoint.store import restore, save
from bimedix_jax.errors import BimedixError
from bimedix_jax.kernels.nf4 import NF4Tensor, reference
from bimedix_jax.models.config import LoraConfig
from bimedix_jax.models.mixtral import Mixtral

# bitsandbytes 0.50.2 dequantises wrongly on CPU where the last axis is a multiple of 16 but not of 64
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "tie_word_embeddings": False}
UNALIGNED = {"hidden_size": 50, "intermediate_size": 36}
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 11))
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
SETTINGS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"}
SETTINGS |= {"bnb_4bit_compute_dtype": "float32", "bnb_4bit_use_double_quant": True}

Tensors = dict[str, Any]


def pack(tensors: Tensors, name: str, double_quant: bool = True, block_size: int = 64, kind: str = "nf4") -> None:
    """Replaces one weight by the tensors that bitsandbytes packs it into."""
    packed, state = bnb.quantize_4bit(
        tensors[name], quant_type=kind, blocksize=block_size, compress_statistics=double_quant
    )
    tensors[name] = packed
    tensors.update({f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()})


def rewrite_tensors(source: Path, folder: Path, edit: Callable[[Tensors], object], **settings: Any) -> Path:
    """Copy of `source` with edited tensors and a quantization_config; `settings` change config.json."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": SETTINGS, **settings}))
    return folder


def linear_names(tensors: Tensors) -> list[str]:
    """The weights that transformers 4 packs: every linear layer except the head, including the router."""
    return [name for name in tensors if "_proj.weight" in name or ".block_sparse_moe." in name]


def pack_all(double_quant: bool = True, block_size: int = 64, kind: str = "nf4") -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in linear_names(tensors):
            pack(tensors, name, double_quant, block_size, kind)

    return edit


def fuse(tensors: Tensors, layers: int = 2, experts: int = 4) -> list[str]:
    """Hub layout -> fused layout, unpacked; returns the names of the fused tensors."""
    names = []
    for layer in range(layers):
        hub, fused = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
        tensors[f"{fused}gate.weight"] = tensors.pop(f"{hub}gate.weight")
        w1, w2, w3 = ([tensors.pop(f"{hub}experts.{e}.w{i}.weight") for e in range(experts)] for i in (1, 2, 3))
        up, down = f"{fused}experts.gate_up_proj", f"{fused}experts.down_proj"
        tensors[up] = torch.stack([torch.cat(pair) for pair in zip(w1, w3, strict=True)])
        tensors[down] = torch.stack(w2)
        names += [up, down]
    return names


def pack_fused(double_quant: bool = True) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in [*fuse(tensors), *(name for name in tensors if "_proj.weight" in name)]:
            pack(tensors, name, double_quant)

    return edit


def values_of(packed: torch.Tensor, parts: Tensors) -> np.ndarray:
    """Dequantises stored bytes with bitsandbytes' formula, in float32 rounded to the recorded dtype. Its own CPU code
    is wrong for some shapes."""
    state = bnb.QuantState.from_dict(dict(parts), torch.device("cpu"))
    assert state.shape is not None
    nested, offset = None, None
    if state.state2 is not None and state.offset is not None:
        nested, offset = state.state2.absmax.numpy(), state.offset.numpy()
    unit = reference.PackedUnit(packed.numpy().reshape(-1), state.absmax.numpy(), nested, offset)
    assert isinstance(state.blocksize, int)
    values = reference.dequantize(unit, tuple(state.shape), state.blocksize)
    return torch.tensor(values).to(state.dtype).float().numpy()


def unpacked(tensors: Tensors) -> dict[str, np.ndarray]:
    """float32 values by name, packed tensors dequantised."""
    found = {}
    for name, tensor in tensors.items():
        parts = {part.removeprefix(f"{name}."): value for part, value in tensors.items() if part.startswith(f"{name}.")}
        if "quant_map" in parts:
            found[name] = values_of(tensor, parts)
        elif not any(
            f"{start}.quant_map" in tensors for start in (name.rpartition(".")[0], name.partition(".quant_s")[0])
        ):
            found[name] = tensor.float().numpy()
    return found


def split_fused(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fused names and values -> hub ones."""
    found = {}
    for name, value in values.items():
        start, _, end = name.partition("mlp.")
        hub = f"{start}block_sparse_moe."
        if end == "gate.weight":
            found[f"{hub}{end}"] = value
        elif end == "experts.down_proj":
            found |= {f"{hub}experts.{e}.w2.weight": matrix for e, matrix in enumerate(value)}
        elif end == "experts.gate_up_proj":
            for e, matrix in enumerate(value):
                half = matrix.shape[0] // 2
                found |= {f"{hub}experts.{e}.w1.weight": matrix[:half], f"{hub}experts.{e}.w3.weight": matrix[half:]}
        else:
            found[name] = value
    return found


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (str(t.dtype), t.shape, t.read().tobytes()) for name, t in read_folder(folder).items()}


def leaves(model: Mixtral) -> dict[str, Any]:
    return {path: variable.get_value() for path, variable in parameters(model).items()}


def packed_paths(model: Mixtral) -> set[str]:
    return {path for path, value in leaves(model).items() if isinstance(value, NF4Tensor)}


def logits(model: Mixtral) -> np.ndarray:
    return np.asarray(nnx.jit(lambda model: model(TOKENS).logits_BTV)(model))


def torch_logits(model: Any) -> np.ndarray:
    model.train()  # bitsandbytes' eval mode on CPUs with AVX512-BF16 computes in bfloat16; there is no dropout
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)


@pytest.fixture(scope="session")
def dense(write_mixtral: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32; read-only."""
    return write_mixtral(tmp_path_factory.mktemp("bnb") / "dense", "float32", **SIZES)


@pytest.fixture(scope="session")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "load_bnb_fused.py"
    spec = importlib.util.spec_from_file_location("load_bnb_fused", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_kept(folder: Path, model: Mixtral, experts: int = 4) -> None:
    """Every packed byte of a per-expert folder is in the model's leaves."""
    tensors = load_file(folder / "model.safetensors")
    names = {"attention.q": "self_attn.q_proj", "attention.o": "self_attn.o_proj"}
    places: list[tuple[str, tuple[int, ...], str]] = [
        (f"layers.{ours}.w", (layer,), f"{layer}.{name}.weight") for layer in range(2) for ours, name in names.items()
    ]
    for layer in range(2):
        for expert in range(experts):
            for w in ("w1", "w2", "w3"):
                name = f"{layer}.block_sparse_moe.experts.{expert}.{w}.weight"
                places.append((f"layers.moe.{w}.w", (layer, expert), name))
    for path, index, name in places:
        unit = leaves(model)[path][index]
        theirs = {part: tensors[f"model.layers.{name}{part}"] for part in ("", ".absmax")}
        assert np.array_equal(unit.packed, theirs[""].reshape(-1).numpy()), name
        assert np.array_equal(unit.absmax, theirs[".absmax"].numpy()), name
        if unit.nested_absmax is not None:
            assert np.array_equal(unit.nested_absmax, tensors[f"model.layers.{name}.nested_absmax"].numpy())
            state = json.loads(bytes(tensors[f"model.layers.{name}.quant_state.bitsandbytes__nf4"].numpy()))
            assert unit.nested_offset == np.float32(state["nested_offset"])


@pytest.mark.parametrize("sizes", [SIZES, UNALIGNED], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_folder_of_transformers_4_is_read_bit_exactly(
    write_mixtral: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    sizes: dict[str, Any],
    double_quant: bool,
    dtype: str,
) -> None:
    """Loaded in 4 bits, in 16 bits and rewritten. Its packed router is dequantised."""
    folder = rewrite_tensors(write_mixtral(tmp_path / "m", dtype, **sizes), tmp_path / "q", pack_all(double_quant))
    with caplog.at_level(logging.WARNING):
        model = load(folder)
    assert "layers.moe.router.w: 2 packed matrices are dequantised" in caplog.text
    assert model.dtype == dtype
    assert packed_paths(model) == set(QUANTISED)
    assert_kept(folder, model)
    expected = unpacked(load_file(folder / "model.safetensors"))
    export_hf(model, tmp_path / "from_nf4")
    export_hf(load(folder, base="float32"), tmp_path / "from_dense")
    rewrite(folder, tmp_path / "rewritten", "float32")
    for name in ("from_nf4", "from_dense", "rewritten"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert found.keys() == expected.keys()
        for key, value in found.items():
            assert np.array_equal(value.float().numpy(), expected[key]), (name, key)
    again = load(folder, base="nf4")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), leaves(model), leaves(again)))


@pytest.mark.parametrize("double_quant", [True, False])
def test_logits_are_those_of_the_dequantised_model(dense: Path, tmp_path: Path, double_quant: bool) -> None:
    """Dequantised by bitsandbytes itself, in transformers."""
    folder = rewrite_tensors(dense, tmp_path / "q", pack_all(double_quant))
    tensors = load_file(folder / "model.safetensors")
    state = {}
    for name, value in load_file(dense / "model.safetensors").items():
        parts = {part.removeprefix(f"{name}."): t for part, t in tensors.items() if part.startswith(f"{name}.")}
        state[name] = value
        if parts:
            quant_state = bnb.QuantState.from_dict(dict(parts), torch.device("cpu"))
            state[name] = bnb.dequantize_4bit(tensors[name], quant_state)
    shutil.copytree(dense, tmp_path / "d")
    save_file(state, tmp_path / "d" / "model.safetensors", metadata={"format": "pt"})
    expected = torch_logits(transformers.MixtralForCausalLM.from_pretrained(tmp_path / "d", dtype=torch.float32))
    close(logits(load(folder)), expected)
    close(logits(load(folder, base="float32")), expected)


def test_weights_packed_from_bfloat16_keep_its_values_in_a_float32_model(
    write_mixtral: Callable[..., Path], tmp_path: Path
) -> None:
    """As in bitsandbytes, which rounds to the recorded dtype before it casts to that of the computation."""
    folder = rewrite_tensors(write_mixtral(tmp_path / "m", "bfloat16", **SIZES), tmp_path / "q", pack_all())
    close(logits(load(folder, dtype="float32")), logits(load(folder, base="float32")))


@pytest.mark.parametrize("intermediate", [256, 128], ids=["whole_groups", "split_groups"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_fused_folders_are_split_by_expert(
    write_mixtral: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    intermediate: int,
    double_quant: bool,
) -> None:
    """Nibbles are kept. 8-bit scales are kept where each expert has whole groups, else decoded."""
    dense = write_mixtral(tmp_path / "m", "float32", **{**SIZES, "intermediate_size": intermediate})
    folder = rewrite_tensors(dense, tmp_path / "q", pack_fused(double_quant))
    with caplog.at_level(logging.WARNING):
        model = load(folder)
    kept = double_quant and intermediate == 256
    assert leaves(model)["layers.moe.w1.w"].double_quantised == kept
    assert ("decoded to float32" in caplog.text) == (double_quant and not kept)
    tensors = load_file(folder / "model.safetensors")
    fused = tensors["model.layers.1.mlp.experts.gate_up_proj"].numpy().reshape(4, 2, -1)
    for half, name in enumerate(("w1", "w3")):
        assert np.array_equal(leaves(model)[f"layers.moe.{name}.w"][1].packed, fused[:, half])
    expected = split_fused(unpacked(tensors))
    export_hf(model, tmp_path / "out")
    export_hf(load(folder, base="float32"), tmp_path / "dense")
    for out in ("out", "dense"):
        found = load_file(tmp_path / out / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert np.array_equal(value.numpy(), expected[name]), name
    if kept:
        export_bnb(model, tmp_path / "again", "fused")
        assert contents(tmp_path / "again") == contents(folder)


def test_experts_that_share_blocks_can_only_be_loaded_dequantised(
    write_mixtral: Callable[..., Path], tmp_path: Path
) -> None:
    dense = write_mixtral(tmp_path / "m", "float32", **UNALIGNED)
    folder = rewrite_tensors(dense, tmp_path / "q", pack_fused())
    with pytest.raises(BimedixError, match=r"share blocks of 64.*load with base bfloat16"):
        load(folder)
    export_hf(load(folder, base="float32"), tmp_path / "out")
    expected = split_fused(unpacked(load_file(folder / "model.safetensors")))
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert np.array_equal(value.numpy(), expected[name]), name
    with pytest.raises(BimedixError, match="choose layout per_expert"):
        export_bnb(load(dense, base="nf4"), tmp_path / "fused", "fused")


@pytest.mark.filterwarnings("ignore")  # of transformers and bitsandbytes
def test_folders_of_transformers_5_are_read(dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They have experts in 16 bits, which stay in 16 bits or are packed on request; logits are equal."""
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    theirs = transformers.MixtralForCausalLM.from_pretrained(
        dense, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
    )
    theirs.save_pretrained(tmp_path / "q")
    with caplog.at_level(logging.WARNING):
        ours = load(tmp_path / "q")
        assert "24 matrices are in 16 bits in the folder and stay in 16 bits" in caplog.text
        packed = load(tmp_path / "q", base="nf4")
        assert "24 matrices are in 16 bits in the folder and are packed now" in caplog.text
    close(logits(ours), torch_logits(theirs))
    assert packed_paths(ours) == {path for path in QUANTISED if ".attention." in path}
    assert packed_paths(packed) == set(QUANTISED)
    export_bnb(ours, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "q")


def test_leaves_with_packed_and_unpacked_layers(dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A leaf with one layer in 16 bits is dequantised, or that layer is packed on request."""
    skipped = "model.layers.0.self_attn.q_proj.weight"

    def edit(tensors: Tensors) -> None:
        for name in linear_names(tensors):
            if name != skipped:
                pack(tensors, name)

    folder = rewrite_tensors(dense, tmp_path / "q", edit)
    with caplog.at_level(logging.WARNING):
        exact = load(folder)
    assert "layers.attention.q.w: 1 of 2 matrices are packed and are dequantised exactly" in caplog.text
    assert packed_paths(exact) == set(QUANTISED) - {"layers.attention.q.w"}
    expected = unpacked(load_file(folder / "model.safetensors"))
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert np.array_equal(leaves(exact)["layers.attention.q.w"][layer].T, expected[name])
    packed = load(folder, base="nf4")
    fresh = load(dense, base="nf4", dtype="float32")
    path = "layers.attention.q.w"
    assert jnp.array_equal(leaves(packed)[path][0].packed, leaves(fresh)[path][0].packed)
    tensors = load_file(folder / "model.safetensors")
    assert np.array_equal(
        leaves(packed)[path][1].absmax, tensors["model.layers.1.self_attn.q_proj.weight.absmax"].numpy()
    )


@pytest.mark.parametrize("block_size", [32, 256])
def test_other_block_sizes(dense: Path, tmp_path: Path, block_size: int) -> None:
    folder = rewrite_tensors(dense, tmp_path / "q", pack_all(block_size=block_size))
    model = load(folder)
    close(logits(model), logits(load(folder, base="float32")))
    export_bnb(model, tmp_path / "out")
    assert {**contents(folder), **without_gates(contents(tmp_path / "out"))} == contents(folder)


def without_gates(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if ".gate." not in name}


def test_nibbles_stored_as_another_dtype(dense: Path, tmp_path: Path) -> None:
    """bnb_4bit_quant_storage, which FSDP needs."""

    def edit(tensors: Tensors) -> None:
        pack_all()(tensors)
        for name in linear_names(load_file(dense / "model.safetensors")):
            tensors[name] = tensors[name].reshape(-1).view(torch.bfloat16)[:, None]

    folder = rewrite_tensors(dense, tmp_path / "q", edit)
    plain = rewrite_tensors(dense, tmp_path / "p", pack_all())
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), leaves(load(folder)), leaves(load(plain)))
    assert jax.tree.all(same)


def test_the_compute_dtype_comes_from_config_json(
    dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half = {**SETTINGS, "bnb_4bit_compute_dtype": "bfloat16"}
    for number, (settings, expected) in enumerate(
        (
            ({"dtype": "bfloat16"}, "bfloat16"),
            ({"dtype": "float32", "quantization_config": half}, "float32"),
            ({"dtype": "float16"}, "float32"),
            ({"dtype": "float16", "quantization_config": half}, "bfloat16"),
            ({"dtype": None, "quantization_config": half}, "bfloat16"),
        )
    ):
        folder = rewrite_tensors(dense, tmp_path / str(number), pack_all(), **settings)
        assert load(folder).dtype == expected, settings
        assert load(folder, dtype="float32").dtype == "float32"
    assert "computes in float16, which is not available here" in caplog.text


def test_native_folders_keep_imported_bytes(dense: Path, tmp_path: Path) -> None:
    model = load(rewrite_tensors(dense, tmp_path / "q", pack_all(block_size=128)))
    save(model, tmp_path / "native")
    restored = restore(tmp_path / "native")
    assert jax.tree.structure(leaves(restored)) == jax.tree.structure(leaves(model))
    jax.tree.map(np.testing.assert_array_equal, leaves(restored), leaves(model))


Q = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"


def restate(**changes: Any) -> Callable[[Tensors], None]:
    """Changes the quantisation state of one tensor; None removes a key."""

    def edit(tensors: Tensors) -> None:
        record = {**json.loads(bytes(tensors[STATE].numpy())), **changes}
        record = {key: value for key, value in record.items() if value is not None}
        tensors[STATE] = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)

    return edit


def scale(part: str, factor: float) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{Q}.{part}": tensors[f"{Q}.{part}"] * factor})


CONTRADICTIONS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "shape": (restate(shape=[64, 32]), r"4096 bytes|2048 bytes do not fit shape \[64, 32\]"),
    "turned": (restate(shape=[32, 128]), r"\[32, 128\] instead of \[64, 64\]"),
    "dtype": (restate(dtype="int8"), "dtype 'int8' is not supported"),
    "type": (restate(quant_type="nf3"), "malformed"),
    "blocksize": (restate(blocksize=128), r"absmax is uint8\[64\], not uint8\[32\]"),
    "odd_blocksize": (restate(blocksize=63), "blocksize 63"),
    "no_shape": (restate(shape=None), "malformed"),
    "extra": (restate(zero_point=1), "zero_point"),
    "offset": (restate(nested_offset="much"), "nested_offset is 'much'"),
    "groups": (restate(nested_blocksize=128), "groups of 256"),
    "json": (lambda t: t.update({STATE: t[STATE][:9].clone()}), "contradicts"),
    "short_absmax": (lambda t: t.update({f"{Q}.absmax": t[f"{Q}.absmax"][:63].clone()}), r"uint8\[63\]"),
    "float_absmax": (lambda t: t.update({f"{Q}.absmax": t[f"{Q}.absmax"].float()}), r"float32\[64\], not uint8"),
    "nested": (lambda t: t.update({f"{Q}.nested_absmax": torch.ones(2)}), r"nested_absmax is float32\[2\]"),
    "map": (scale("quant_map", 0.5), "quant_map is not the table"),
    "nested_map": (scale("nested_quant_map", 0.5), "nested_quant_map is not"),
    "short": (lambda t: t.update({Q: t[Q][:-1].clone()}), "bytes do not fit"),
    "no_map": (lambda t: t.pop(f"{Q}.quant_map"), "its parts are"),
    "no_state": (lambda t: t.pop(STATE), "quant_state.bitsandbytes__nf4 is missing"),
    "no_weight": (lambda t: t.pop(Q), r"missing \(model.layers.0.self_attn.q_proj.weight\)"),
    "nan": (scale("nested_absmax", float("nan")), "not finite"),
    "leftover": (lambda t: t.update({f"{Q}.zero": torch.ones(1)}), r"unknown \(model.*q_proj.weight.zero\)"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_quant_state_that_contradicts_its_tensor_raises(dense: Path, tmp_path: Path, case: str) -> None:
    edit, why = CONTRADICTIONS[case]

    def both(tensors: Tensors) -> None:
        pack_all()(tensors)
        edit(tensors)

    folder = rewrite_tensors(dense, tmp_path / "q", both)
    for attempt in (lambda: load(folder), lambda: rewrite(folder, tmp_path / "out", "bfloat16")):
        with pytest.raises(BimedixError, match=why):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_a_table_with_other_last_bits_is_used(dense: Path, tmp_path: Path) -> None:
    """Versions of PyTorch differ in the last bits of nested_quant_map; the codes refer to the table in the file."""

    def edit(tensors: Tensors) -> None:
        pack_all()(tensors)
        for name in [name for name in tensors if name.endswith("nested_quant_map")]:
            tensors[name] = torch.nextafter(tensors[name], torch.tensor(2.0))

    folder = rewrite_tensors(dense, tmp_path / "q", edit)
    model = load(folder)
    assert not leaves(model)["layers.moe.w1.w"].double_quantised
    export_hf(model, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    state = bnb.QuantState.from_dict(
        {name.removeprefix(f"{Q}."): value for name, value in tensors.items() if name.startswith(f"{Q}.")},
        torch.device("cpu"),
    )
    expected = bnb.dequantize_4bit(tensors[Q], state).numpy()
    assert np.array_equal(load_file(tmp_path / "out" / "model.safetensors")[Q].numpy(), expected)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"quant_method": "gptq"}, "quantised as 'gptq'"),
        ({**SETTINGS, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4"),
        ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, "bitsandbytes int8"),
        ({**SETTINGS, "zero_point": True}, r"unknown key\(s\): zero_point.*--ignore-config-key quantization_config"),
        ("nf4", "not a JSON object"),
    ],
    ids=["gptq", "fp4", "int8", "unknown", "text"],
)
def test_other_quantisations_raise(dense: Path, tmp_path: Path, settings: Any, why: str) -> None:
    folder = rewrite_tensors(dense, tmp_path / "q", pack_all(), quantization_config=settings)
    with pytest.raises(BimedixError, match=why):
        load(folder)
    model = load(folder, ignore_config_keys=["quantization_config"])
    assert packed_paths(model) == set(QUANTISED), "each tensor describes itself"


def test_tensors_of_other_quantisations_raise(dense: Path, tmp_path: Path) -> None:
    folder = rewrite_tensors(dense, tmp_path / "q", pack_all(kind="fp4"))
    with pytest.raises(BimedixError, match=r"34 weight\(s\) as bitsandbytes fp4"):
        load(folder)
    plain = rewrite_tensors(dense, tmp_path / "p", lambda tensors: None)
    with pytest.raises(BimedixError, match="every tensor is unpacked"):
        load(plain)


def test_matrices_of_a_leaf_with_different_block_sizes_raise(dense: Path, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        for name in linear_names(tensors):
            pack(tensors, name, block_size=64 if ".0." in name else 128)

    folder = rewrite_tensors(dense, tmp_path / "q", edit)
    with pytest.raises(BimedixError, match=r"differ in block size.*load with base bfloat16"):
        load(folder)
    assert not packed_paths(load(folder, base="bfloat16"))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_raise(dense: Path, tmp_path: Path, value: float) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"

    def edit(tensors: Tensors) -> None:
        tensors[name][5, 7] = value

    folder = rewrite_tensors(dense, tmp_path / "q", edit, quantization_config=None)
    with pytest.raises(BimedixError, match=rf"NaN or infinity in {name}"):
        load(folder, base="nf4")


def test_denormals_are_counted(dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"][3:5] = 1e-40
        tensors["model.layers.0.self_attn.q_proj.weight"][0] = 0.0
        tensors["model.layers.0.self_attn.k_proj.weight"][0, 0] = 1e-40

    folder = rewrite_tensors(dense, tmp_path / "q", edit, quantization_config=None)
    load(folder, base="nf4", dtype="float32")
    assert "2 4-bit blocks contain denormal weights" in caplog.text


def test_exports_equal_the_imported_folder(dense: Path, tmp_path: Path) -> None:
    """Layout per_expert: all bytes are equal except those of the router, which is unpacked. bitsandbytes reads each
    state and gets the same values."""
    folder = rewrite_tensors(dense, tmp_path / "q", pack_all())
    model = load(folder)
    export_bnb(model, tmp_path / "out", max_shard_bytes=100_000)
    written, read = contents(tmp_path / "out"), contents(folder)
    assert without_gates(written) == without_gates(read)
    again = load(tmp_path / "out")
    assert jax.tree.structure(leaves(again)) == jax.tree.structure(leaves(model))
    jax.tree.map(np.testing.assert_array_equal, leaves(again), leaves(model))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    settings = transformers.BitsAndBytesConfig(**config["quantization_config"])
    assert (settings.load_in_4bit, settings.bnb_4bit_quant_type) == (True, "nf4")
    assert settings.bnb_4bit_use_double_quant
    assert settings.llm_int8_skip_modules == ["lm_head", "gate"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_a_quantised_model_round_trips(dense: Path, tmp_path: Path, layout: Any, dtype: str) -> None:
    """Nibbles and values are equal, and for per_expert the bytes of the scales. bitsandbytes dequantises to the same
    values."""
    model = load(dense, base="nf4", dtype=dtype)
    export_bnb(model, tmp_path / "out", layout)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    export_hf(model, tmp_path / "dequantised")
    expected = load_file(tmp_path / "dequantised" / "model.safetensors")
    found = {}
    for name in [name for name in tensors if f"{name}.absmax" in tensors]:
        parts = {part.removeprefix(f"{name}."): t for part, t in tensors.items() if part.startswith(f"{name}.")}
        state = bnb.QuantState.from_dict(dict(parts), torch.device("cpu"))
        for part, value in state.as_dict(packed=True).items():
            assert torch.equal(value, tensors[f"{name}.{part}"]), part
        found[name] = bnb.dequantize_4bit(tensors[name], state).float().numpy()
    for name, value in split_fused(found).items():
        assert np.array_equal(value, expected[name].float().numpy()), name
    again = load(tmp_path / "out")
    for path in QUANTISED:
        ours, theirs = leaves(model)[path], leaves(again)[path]
        assert jnp.array_equal(ours.packed, theirs.packed), path
        assert theirs.double_quantised == (layout == "per_expert" or ".attention." in path), path
        if theirs.double_quantised:
            assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), ours, theirs)), path


@pytest.mark.filterwarnings("ignore")  # of transformers and bitsandbytes
def test_fused_folders_load_in_4_bits_with_equal_logits(
    dense: Path, tmp_path: Path, script: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    """The script loads them in transformers 5; plain `from_pretrained` raises."""
    model = load(dense, base="nf4", dtype="float32")
    with caplog.at_level(logging.WARNING):
        export_bnb(model, tmp_path / "out", "fused", max_shard_bytes=50_000)
    assert "scales of 4 fused tensors are written in float32" in caplog.text
    theirs = script.load(tmp_path / "out")
    layer = theirs.model.layers[1]
    assert layer.mlp.experts.parametrizations.gate_up_proj.original.dtype == torch.uint8
    assert type(theirs.get_submodule("model.layers.1.self_attn.q_proj")).__name__ == "Linear4bit"
    assert type(theirs.lm_head).__name__ == "Linear"
    close(logits(model), torch_logits(theirs))
    for layout in ("fused", "per_expert"):
        export_bnb(model, tmp_path / layout, layout)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            transformers.MixtralForCausalLM.from_pretrained(tmp_path / layout, device_map={"": "cpu"})


@pytest.mark.filterwarnings("ignore")  # of transformers and bitsandbytes
def test_layout_attention_loads_with_plain_from_pretrained(dense: Path, tmp_path: Path) -> None:
    model = load(dense, base="nf4", dtype="float32")
    export_bnb(model, tmp_path / "out", "attention")
    theirs = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    assert type(theirs.get_submodule("model.layers.0.self_attn.q_proj")).__name__ == "Linear4bit"
    close(logits(model), torch_logits(theirs))


def test_invalid_exports_raise(dense: Path, tmp_path: Path) -> None:
    plain, packed = load(dense), load(dense, base="nf4")
    attempts: Iterable[tuple[Callable[[], object], str]] = (
        (lambda: export_bnb(plain, tmp_path / "out"), "not in 4 bits; load it with base nf4"),
        (lambda: export_bnb(packed, tmp_path / "out", "gguf"), "layout 'gguf' is unknown"),  # pyright: ignore
        (lambda: export_bnb(add_lora(packed, LoraConfig(rank=2, alpha=2.0)), tmp_path / "out"), "has adapters"),
    )
    for attempt, why in attempts:
        with pytest.raises(BimedixError, match=why):
            attempt()
    w1 = parameters(packed)["layers.moe.w1.w"]
    w1.set_value(jnp.zeros(w1.get_value().shape, jnp.bfloat16))
    with pytest.raises(BimedixError, match=r"w1\.w is not in 4 bits, which layout fused needs"):
        export_bnb(packed, tmp_path / "out", "fused")
    assert list(tmp_path.iterdir()) == []
