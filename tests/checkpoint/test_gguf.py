"""GGUF -> dense Llama folder, against transformers on files that the gguf package writes here."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from bimedix_jax.checkpoint import gguf as ours
from bimedix_jax.checkpoint.gguf_tokenizer import LLAMA3_SPLIT, PRE_TOKENIZERS, byte_level
from bimedix_jax.checkpoint.hf_config import read_dense_config
from bimedix_jax.checkpoint.safetensors_io import read_folder
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.config import RopeScaling

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16

TEXTS = [
    "What is hypertension? High blood pressure, 140/90 mmHg or more.",
    "ما هو ارتفاع ضغط الدم؟ قراءة تبلغ ١٤٠/٩٠ أو أكثر.",
    "  two  spaces\n\nand\tlines, 12345 don't we'll ½ µg",
    "<|im_start|>user\nhi<|im_end|>\n",
]


def trained(pre: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """A byte-level BPE with 300 tokens, three of them special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    special = [
        AddedToken(name, normalized=False, special=True) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS[:3] * 3, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return trained(pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]))


def llama(tied: bool) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config)


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Half-split rotary rows -> the interleaved ones that llama.cpp stores."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, pre: str = "smollm") -> None:
    spec = json.loads(tokenizer.to_str())
    vocabulary = sorted(tokenizer.get_vocab(), key=lambda token: tokenizer.get_vocab()[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in spec["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")


def write_gguf(path: Path, tokenizer: Tokenizer, model: Any, kind: gguf.GGMLQuantizationType, **extra: Any) -> None:
    """The model as llama.cpp's converter would write it, matrices in the block format `kind`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(300)
    for key, value in extra.items():
        writer.add_string(key.replace("__", "."), value)
    add_tokenizer(writer, tokenizer, extra.get("pre", "smollm"))
    state = {name: value.float().numpy() for name, value in model.state_dict().items()}
    names = {
        target.replace("{layer}", str(i)): name.replace("{layer}", str(i))
        for name, target in ours.TENSORS.items()
        for i in range(LAYERS)
    }
    for target, name in names.items():
        if target == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        value = state[target]
        if "attn_q." in name or "attn_k." in name:
            value = interleaved(value, HEADS if "attn_q." in name else KV_HEADS)
        if value.ndim == 1:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_float32_round_trips_exactly(tmp_path: Path, tokenizer: Tokenizer, tied: bool) -> None:
    import torch
    import transformers

    model = llama(tied)
    write_gguf(tmp_path / "m.gguf", tokenizer, model, gguf.GGMLQuantizationType.F32)
    folder = ours.convert(tmp_path / "m.gguf", tmp_path / "dense", dtype="float32")
    expected = {name: value.numpy() for name, value in model.state_dict().items()}
    if tied:
        expected.pop("lm_head.weight")
    found = read_folder(folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name].read(), value, err_msg=name)
    again = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_block_formats_are_dequantised_as_transformers_does(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    import torch
    import transformers

    write_gguf(tmp_path / "m.gguf", tokenizer, llama(True), gguf.GGMLQuantizationType[kind])
    folder = ours.convert(tmp_path / "m.gguf", tmp_path / "dense", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    found = read_folder(folder)
    for name, value in theirs.state_dict().items():
        if name != "lm_head.weight":
            np.testing.assert_array_equal(found[name].read(), value.numpy(), err_msg=name)


def test_configuration_and_companions(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_gguf(tmp_path / "m.gguf", tokenizer, llama(True), gguf.GGMLQuantizationType.F16)
    folder = ours.convert(tmp_path / "m.gguf", tmp_path / "dense")
    config = read_dense_config(folder)
    assert (config.rms_norm_eps, config.rope_theta, config.head_dim, config.tie_embeddings) == (
        1e-5,
        1e5,
        HEAD_DIM,
        True,
    )
    assert {tensor.dtype.name for tensor in read_folder(folder).values()} == {"bfloat16"}
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert settings["chat_template"].startswith("{% for m")


def test_the_tokenizer_round_trips(tmp_path: Path, tokenizer: Tokenizer) -> None:
    import transformers

    write_gguf(tmp_path / "m.gguf", tokenizer, llama(True), gguf.GGMLQuantizationType.F16)
    folder = ours.convert(tmp_path / "m.gguf", tmp_path / "dense")
    restored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert restored.encode(text).ids == ids
        assert loaded.encode(text) == ids
        assert restored.decode(ids, skip_special_tokens=False) == text
    assert restored.encode("<|im_end|>").ids == [2]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_round_trips(pre: str) -> None:
    original = trained(PRE_TOKENIZERS[pre]())
    vocabulary = sorted(original.get_vocab(), key=lambda token: original.get_vocab()[token])
    merges = [" ".join(merge) for merge in json.loads(original.to_str())["model"]["merges"]]
    rebuilt = byte_level(vocabulary, merges, pre, Path("m.gguf"))
    for text in TEXTS[:3]:
        assert rebuilt.decode(rebuilt.encode(text).ids) == text


def test_smollm_splits_single_digits_and_llama3_groups_of_three() -> None:
    def split(pre: str, text: str) -> list[str]:
        return [piece for piece, _ in PRE_TOKENIZERS[pre]().pre_tokenize_str(text)]

    assert split("smollm", "in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    assert split("gpt-2", "in 2024") == ["in", "Ġ2024"]
    assert split("llama-bpe", "in 20245") == ["in", "Ġ", "202", "45"]
    assert r"\p{N}{1,3}" in LLAMA3_SPLIT


def test_sentencepiece_bpe_is_rebuilt(tmp_path: Path) -> None:
    """Vocabulary and scores of a Llama-2-style tokenizer -> the same ids."""
    original = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    original.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    original.train_from_iterator(TEXTS[:1] * 2, trainer)
    vocabulary = sorted(original.get_vocab(), key=lambda token: original.get_vocab()[token])
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocabulary)
    writer.add_token_scores([-float(i) for i in range(len(vocabulary))])
    writer.add_token_types([3 if t in special[1:3] else 6 if t in special else 1 for t in vocabulary])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, _ = ours.read_part(tmp_path / "t.gguf")
    ours.write_tokenizer(metadata, tmp_path, tmp_path / "t.gguf")
    rebuilt = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain = Tokenizer.from_str(original.to_str())
    for text in TEXTS[:2]:
        ids = rebuilt.encode(text).ids
        assert ids[0] == 1
        assert ids[1:] == plain.encode(text, add_special_tokens=False).ids
        assert rebuilt.decode(ids) == text


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"llama__rope__scaling__type": "yarn"}, "scaled rotary"),
        ({"llama__attention__surprise": "x"}, "llama.attention.surprise"),
        ({"pre": "unheard-of"}, "pre-tokenizer 'unheard-of'"),
    ],
)
def test_unsupported_models_raise(tmp_path: Path, tokenizer: Tokenizer, extra: dict[str, str], why: str) -> None:
    write_gguf(tmp_path / "m.gguf", tokenizer, llama(True), gguf.GGMLQuantizationType.F16, **extra)
    with pytest.raises(BimedixError, match=why):
        ours.convert(tmp_path / "m.gguf", tmp_path / "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_damaged_files_raise(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, tokenizer, llama(True), gguf.GGMLQuantizationType.F16)
    whole = path.read_bytes()
    for length in (0, 3, 20, 400, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:length])
        with pytest.raises(BimedixError, match=r"not a complete GGUF|cannot read"):
            ours.convert(path, tmp_path / "dense")
    path.write_bytes(b"NOPE" + whole[4:])
    with pytest.raises(BimedixError, match="not a complete GGUF"):
        ours.convert(path, tmp_path / "dense")
    with pytest.raises(BimedixError, match="cannot read"):
        ours.convert(tmp_path / "absent.gguf", tmp_path / "dense")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


def rewritten(source: Path, target: Path, tensors: list[Any], metadata: bool, **split: int) -> Path:
    """A GGUF file with these tensors, and the metadata of `source` if `metadata`."""
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in gguf.GGUFReader(source).fields.items():
        if metadata and not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    for key, value in split.items():
        writer.add_int32(f"split.{key.replace('_', '.')}", value)
    for name, value, kind in tensors:
        writer.add_tensor(name, value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def tensors_of(path: Path) -> list[Any]:
    return [(tensor.name, tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors]


def split(source: Path, sizes: list[int]) -> list[Path]:
    """Divides a GGUF file as gguf-split does: the metadata in the first part, and `sizes` tensors in each."""
    tensors, count, first, parts = tensors_of(source), len(sizes), 0, []
    for number, size in enumerate(sizes):
        target = source.with_name(f"part-{number + 1:05d}-of-{count:05d}.gguf")
        facts = {"no": number, "count": count, "tensors_count": len(tensors)}
        parts.append(rewritten(source, target, tensors[first : first + size], number == 0, **facts))
        first += size
    return parts


@pytest.fixture
def untied(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    write_gguf(tmp_path / "m.gguf", tokenizer, llama(False), gguf.GGMLQuantizationType.F32)
    return tmp_path / "m.gguf"


@pytest.mark.parametrize("named", [0, 1, 2])
def test_split_files_are_joined(tmp_path: Path, untied: Path, named: int) -> None:
    parts = split(untied, [5, len(tensors_of(untied)) - 6, 1])
    ours.convert(untied, tmp_path / "whole")
    ours.convert(parts[named], tmp_path / "joined")
    assert json.loads((tmp_path / "joined/config.json").read_text())["tie_word_embeddings"] is False
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "joined" / path.name).read_bytes()


def test_incomplete_splits_raise(tmp_path: Path, untied: Path) -> None:
    total = len(tensors_of(untied))
    parts = split(untied, [5, total - 6, 1])

    def problem(path: Path) -> str:
        with pytest.raises(BimedixError) as error:
            ours.convert(path, tmp_path / "dense")
        assert not (tmp_path / "dense").exists()
        return str(error.value)

    renamed = parts[0].rename(tmp_path / "model.gguf")
    assert "is part 1 of 3 of a model, but its name does not say so" in problem(renamed)
    renamed.rename(parts[0])
    aside = parts[2].rename(tmp_path / "aside.gguf")
    assert f"is part 1 of 3 of a model, and {parts[2].name} is missing" in problem(parts[0])
    assert "is part 2 of 3 of a model" in problem(parts[1])
    aside.rename(parts[2])
    second = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    assert "is not part 2 of the model" in problem(parts[0])
    parts[1].write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "is a git-lfs pointer" in problem(parts[0])
    parts[1].write_bytes(second)
    rewritten(untied, parts[2], [], metadata=False, no=2, count=3, tensors_count=total)
    assert f"{total - 1} tensors instead of {total}" in problem(parts[0])


def with_tensor(source: Path, name: str, value: np.ndarray) -> Path:
    """A copy of a GGUF file with one tensor more."""
    extra = (name, value, gguf.GGMLQuantizationType.F32)
    return rewritten(source, source.with_name("more.gguf"), [*tensors_of(source), extra], metadata=True)


def llama3_factors(factor: float, theta: float = 100000.0) -> np.ndarray:
    """rope_freqs.weight as llama.cpp's converter computes it (convert_hf_to_gguf.py, generate_extra_tensors)."""
    values = []
    for frequency in theta ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM):
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1) / 3
        if wavelength < 8192 / 4:
            values.append(1.0)
        else:
            values.append(factor if wavelength > 8192 else 1 / ((1 - smooth) / factor + smooth))
    return np.array(values, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised(tmp_path: Path, untied: Path, factor: float) -> None:
    path = with_tensor(untied, "rope_freqs.weight", llama3_factors(factor))
    scaling = read_dense_config(ours.convert(path, tmp_path / "dense")).rope_scaling
    assert scaling == RopeScaling(
        factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )


def test_factors_of_one_and_old_buffers_change_nothing(tmp_path: Path, untied: Path) -> None:
    whole = ours.convert(untied, tmp_path / "whole")
    for name in ("rope_freqs.weight", "blk.0.attn_rot_embd"):
        path = with_tensor(untied, name, np.ones(HEAD_DIM // 2, np.float32))
        folder = ours.convert(path, tmp_path / name)
        assert (folder / "config.json").read_text() == (whole / "config.json").read_text()
    path = with_tensor(untied, "rope_freqs.weight", np.arange(1, HEAD_DIM // 2 + 1, dtype=np.float32))
    with pytest.raises(BimedixError, match=r"not those of Llama 3\.1's scaling"):
        ours.convert(path, tmp_path / "dense")


PLAIN = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 300,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 8.0},
        {"llama.rope.scale_linear": 1.0},
        {"llama.attention.head_count": [4, 4], "llama.attention.head_count_kv": [4, 4]},
        {"llama.feed_forward_length": [96, 96]},
        {"llama.expert_count": 0, "llama.expert_used_count": 0},
        {"llama.attention.causal": True, "llama.logit_scale": 1.0, "llama.attention.clamp_kqv": 0.0},
        {"llama.tensor_data_layout": "Meta AI original pth"},
    ],
)
def test_metadata_that_change_nothing_are_read(changes: dict[str, Any]) -> None:
    expected = ours.read_config(PLAIN, True, Path("m.gguf"))
    assert ours.read_config({**PLAIN, **changes}, True, Path("m.gguf")) == expected


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, "scaled rotary"),
        ({"llama.rope.scale_linear": 2.0}, "scaled rotary"),
        ({"llama.rope.scaling.attn_factor": 1.2}, "scaled rotary"),
        ({"llama.attention.head_count_kv": [4, 2]}, r"needs llama\.attention\.head_count_kv"),
        ({"llama.logit_scale": 2.0}, r"sets llama\.logit_scale"),
        ({"llama.expert_count": 4}, "has experts"),
    ],
)
def test_metadata_that_change_something_raise(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(BimedixError, match=why):
        ours.read_config({**PLAIN, **changes}, True, Path("m.gguf"))


def test_stand_ins_and_pieces_are_named(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(BimedixError, match="is a git-lfs pointer"):
        ours.convert(tmp_path / "m.gguf", tmp_path / "dense")
    for name in ("m.gguf-split-a", "m.gguf.part1of2", "m.gguf.part2", "m.gguf.incomplete"):
        assert ours.is_gguf(name)
        (tmp_path / name).write_bytes(b"GGUF....")
        with pytest.raises(BimedixError, match="is only a piece of a file"):
            ours.convert(tmp_path / name, tmp_path / "dense")
    assert not ours.is_gguf("owner/name-gguf")
