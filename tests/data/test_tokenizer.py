import json
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bimedix_jax.data.tokenizer import Tokenizer, byte_tokenizer, fertility, load_tokenizer
from bimedix_jax.errors import BimedixError

fixtures = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@fixtures
@given(text=texts)
def test_bytes_survive_a_round_trip(bytes_tokenizer: Tokenizer, text: str) -> None:
    assert bytes_tokenizer.decode(bytes_tokenizer.encode_with_offsets(text, literal=True).ids) == text


def test_the_byte_tokenizer_is_small_and_has_the_tokens_of_a_chat(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 304
    assert tokenizer.template.name == "chatml"
    assert (tokenizer.decode([tokenizer.eos_id]), tokenizer.stop_ids) == ("<|im_end|>", (tokenizer.eos_id,))
    assert tokenizer.encode("a", add_bos=True) == [tokenizer.bos_id, *tokenizer.encode("a")]
    assert AutoTokenizer.from_pretrained(tmp_path).encode("سؤال?") == tokenizer.encode("سؤال?")
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


@fixtures
@given(
    text=texts | st.lists(st.sampled_from(["<s>", "</s>", "[INST]", " ", "\n", "asthma", "الربو", "😀"])).map("".join)
)
def test_sentencepiece_gives_hugging_faces_ids_and_text(mixtral_tokenizer: Tokenizer, text: str) -> None:
    ids = mixtral_tokenizer.encode(text)
    theirs = _transformers(mixtral_tokenizer.folder)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert mixtral_tokenizer.decode(ids) == theirs.decode(ids)


@fixtures
@given(text=texts.filter(lambda text: not text.startswith((" ", "▁")) and "\0" not in text))
def test_sentencepiece_gives_sentencepieces_ids(
    mixtral_tokenizer: Tokenizer, sentencepiece_model: bytes, text: str
) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    assert mixtral_tokenizer.encode_with_offsets(text, literal=True).ids == reference.encode(text)


def test_offsets_cover_the_text(mixtral_tokenizer: Tokenizer) -> None:
    text = "Asthma والربو 😀"
    encoding = mixtral_tokenizer.encode_with_offsets(text)
    assert encoding.offsets[0][0] == 0
    assert encoding.offsets[-1][1] == len(text)
    assert {i for low, high in encoding.offsets for i in range(low, high)} == set(range(len(text)))


def test_the_published_mixtral_tokenizer_is_read(tmp_path: Path) -> None:
    import mistral_common

    model = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (32000, 1, 2, 2)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    text = "Amoxicillin 500 mg, 3×/day.\nأموكسيسيلين ٥٠٠ ملغ ثلاث مرات يوميًا 💊"
    assert tokenizer.encode(text) == reference.encode(text)
    arabic, english = fertility(tokenizer, ["ضيق التنفس"]), fertility(tokenizer, ["shortness of breath"])
    assert arabic["per_byte"] > 2 * english["per_byte"]


def test_special_ids_come_from_the_first_file_that_names_them(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(BimedixError, match="names no eos_token"):
        _ = load_tokenizer(tmp_path).eos_id
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 256, "bos_token_id": 256}))
    assert load_tokenizer(tmp_path).eos_id == 256
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256]}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.stop_ids) == (258, 256, (258, 256))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|pad|>"}}))
    assert load_tokenizer(tmp_path).decode([load_tokenizer(tmp_path).eos_id]) == "<|pad|>"


def test_files_that_are_not_a_tokenizer_raise(tmp_path: Path) -> None:
    with pytest.raises(BimedixError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BimedixError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(BimedixError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer_config.json", '{"bos_token": 3}', r"tokenizer_config\.json has bos_token"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not valid JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}', "added_tokens_decoder"),
        ("special_tokens_map.json", "[]", r"special_tokens_map\.json is not a JSON object"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', r"generation_config\.json has eos_token_id"),
        ("config.json", '{"pad_token_id": [1.5]}', r"/config\.json has pad_token_id"),
    ],
)
def test_a_file_with_a_wrong_value_is_named_with_its_key(tmp_path: Path, name: str, text: str, message: str) -> None:
    byte_tokenizer(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(BimedixError, match=message):
        load_tokenizer(tmp_path)


def test_an_added_token_with_a_shifted_id_raises(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    config = {"added_tokens_decoder": {"999": {"content": "<|im_start|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BimedixError, match="the id 999, the vocabulary 257"):
        load_tokenizer(tmp_path)


@cache
def _transformers(folder: Path):
    return AutoTokenizer.from_pretrained(folder)
