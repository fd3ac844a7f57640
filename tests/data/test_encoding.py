"""Encoding with cached words gives the ids and the mask of encode_chat, for every template and any text."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from bimedix_jax.data.encoding import ROLES, ChatEncoder, EncodeLines, encode_chat, roles_of_chat
from bimedix_jax.data.parallel import batched, ordered_map
from bimedix_jax.data.records import Turn, conversation, sample
from bimedix_jax.data.tokenizer import Tokenizer, load_tokenizer
from bimedix_jax.data.tokenizer_words import WordEncoder
from bimedix_jax.errors import BimedixError

PIECES = (" ", "  ", "\n", "▁", "<s>", "</s>", "[INST]", "a", "the patient", "500 mg", "الربو", "é", "😀", "User:", "")
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join).filter(str.strip)
turns = st.lists(texts, min_size=1, max_size=5).map(lambda values: conversation(*values))


@pytest.fixture(scope="session")
def hub_tokenizer(mixtral_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """With the word-start marks written by a normaliser, as in the tokenizer.json files of the hub."""
    engine = tokenizers.Tokenizer.from_str(mixtral_tokenizer.engine.to_str())
    engine.pre_tokenizer = None  # pyright: ignore[reportAttributeAccessIssue]
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # pyright: ignore
    folder = tmp_path_factory.mktemp("hub")
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text((mixtral_tokenizer.folder / "tokenizer_config.json").read_text())
    return load_tokenizer(folder)


def assert_same(tokenizer: Tokenizer, said: tuple[Turn, ...]) -> None:
    ids, mask = encode_chat(tokenizer, said)
    tokens, learned = ChatEncoder(tokenizer).encode(said)
    assert tokens.tolist() == ids
    assert learned.tolist() == mask
    assert (tokens.dtype, learned.dtype) == (np.int32, np.bool_)


@pytest.mark.parametrize("template", ["mixtral", "mixtral-2023", "plain"])
@settings(deadline=None, max_examples=30)
@given(said=turns)
def test_cached_words_give_the_tokens_and_mask_of_encode_chat(
    mixtral_tokenizer: Tokenizer, template: str, said
) -> None:
    tokenizer = load_tokenizer(mixtral_tokenizer.folder, template)
    assert WordEncoder.supports(tokenizer)
    assert_same(tokenizer, said)


@settings(deadline=None, max_examples=30)
@given(said=turns)
def test_cached_words_give_the_tokens_and_mask_with_a_tokenizer_json(hub_tokenizer: Tokenizer, said) -> None:
    assert WordEncoder.supports(hub_tokenizer)
    assert_same(hub_tokenizer, said)


def test_roles_of_tokens(mixtral_tokenizer: Tokenizer) -> None:
    """The template's own tokens, what is asked, and what is learned; the first positions are kept apart."""
    for template in ("mixtral", "mixtral-2023", "plain"):
        tokenizer = load_tokenizer(mixtral_tokenizer.folder, template)
        said = conversation("What is asthma?", "Wheezing.", "ما الربو؟", "السعال.")
        ids, learned = encode_chat(tokenizer, said)
        roles = np.array([ROLES[role] for role in roles_of_chat(tokenizer, said)])
        assert (roles[:4] == "first").all()
        assert (roles[4:] != "first").all()
        np.testing.assert_array_equal(roles[4:] == "answer", learned[4:])
        asked = tokenizer.decode([token for token, role in zip(ids, roles, strict=True) if role == "prompt"])
        assert asked.endswith("ما الربو؟")
        written = tokenizer.decode([token for token, role in zip(ids, roles, strict=True) if role == "template"])
        assert re.fullmatch(r"((User|Assistant)?:|\[/?INST\]|\s)+", written)
        prompt, _ = encode_chat(tokenizer, said[:3], add_generation_prompt=True)
        begun = roles_of_chat(tokenizer, said[:3], add_generation_prompt=True)
        np.testing.assert_array_equal(begun, roles_of_chat(tokenizer, said)[: len(prompt)])


def test_words_are_cached_in_two_generations(mixtral_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are the same after a word was dropped from the cache."""
    monkeypatch.setattr("bimedix_jax.data.tokenizer_words.CACHED_WORDS", 3)
    words = WordEncoder(mixtral_tokenizer)
    text = "one two three four one  five\none " * 3
    expected = mixtral_tokenizer.encode_with_offsets(text, literal=True).ids
    for _ in range(2):
        assert np.frombuffer(words.encode(text), np.int32).tolist() == expected
        assert len(words) <= 3
    assert words.encode("") == b""


def test_tokenizers_without_word_boundaries_are_not_cached(bytes_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Bytes have no word-start marks; a piece that spans two words, or an added token, rules the cache out."""
    assert not WordEncoder.supports(bytes_tokenizer)
    assert_same(bytes_tokenizer, conversation("Hello  <|im_end|>", "مرحبا"))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["model"]["vocab"].update({"a▁b": len(d["model"]["vocab"])}),
        lambda d: d["model"]["vocab"].update({"\n\n": len(d["model"]["vocab"])}),
        lambda d: d["model"].update(dropout=0.1),
        lambda d: d["pre_tokenizer"].update(split=True),
        lambda d: d.update(normalizer={"type": "NFKC"}),
        lambda d: d["added_tokens"][0].update(special=False),
        lambda d: d.update(pre_tokenizer=None),
    ],
)
def test_a_vocabulary_or_setting_that_could_merge_words_is_not_supported(
    mixtral_tokenizer: Tokenizer, change: Any
) -> None:
    description = json.loads(mixtral_tokenizer.engine.to_str())
    change(description)
    engine = tokenizers.Tokenizer.from_str(json.dumps(description))
    other = Tokenizer(mixtral_tokenizer.folder, engine, mixtral_tokenizer.special, (), "")
    assert WordEncoder.supports(mixtral_tokenizer)
    assert not WordEncoder.supports(other)


def test_cached_words_of_the_published_mixtral_tokenizer(tmp_path: Path) -> None:
    """The published vocabulary on every record of the sample, against the library."""
    import mistral_common

    model = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    tokenizer = load_tokenizer(tmp_path, "mixtral")
    assert WordEncoder.supports(tokenizer)
    encoder = ChatEncoder(tokenizer)
    for record in itertools.islice(sample(), 0, None, 9):
        ids, mask = encode_chat(tokenizer, record.conversations)
        tokens, learned = encoder.encode(record.conversations)
        assert (tokens.tolist(), learned.tolist()) == (ids, mask), record.id


def test_workers_give_the_same_results_in_the_same_order(bytes_tokenizer: Tokenizer) -> None:
    lines = [(i, record.to_json().encode()) for i, record in enumerate(sample())]
    task = EncodeLines(str(bytes_tokenizer.folder), None, "sample", "train")
    batches = list(batched(lines, records=20))
    assert [number for batch in batches for number, _ in batch] == list(range(len(lines)))
    here, there = (list(ordered_map(task, iter(batches), workers)) for workers in (0, 2))
    assert [one.names for one in here] == [one.names for one in there]
    for name in ("lengths", "tokens", "learned"):
        for one, other in zip(here, there, strict=True):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert sum(len(one.names) for one in here) == sum(1 for _ in sample("train"))


def test_batches_close_at_a_size() -> None:
    lines = [(i, b"x" * size) for i, size in enumerate([3, 3, 9, 1, 1, 1, 1])]
    assert [len(batch) for batch in batched(lines, records=3, size=6)] == [2, 1, 3, 1]
    assert list(batched([])) == []


def test_an_error_in_a_worker_is_raised_in_the_parent(bytes_tokenizer: Tokenizer) -> None:
    task = EncodeLines(str(bytes_tokenizer.folder), None, "r.jsonl", None)
    with pytest.raises(BimedixError, match=r"r\.jsonl at byte 77: "):
        list(ordered_map(task, [[(77, b"{}")]] * 9, 1))
    with pytest.raises(BimedixError, match="a worker process was killed"):
        list(ordered_map(_die, [1], 1))


def _die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """A child process whose workers write down their process ids is killed while they wait."""
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import test_encoding as t\n"
        "from bimedix_jax.data.parallel import ordered_map\n"
        "if __name__ == '__main__':\n"
        "    def slowly():\n        yield sys.argv[1]\n        time.sleep(600)\n        yield sys.argv[1]\n"
        "    list(ordered_map(t._note, slowly(), 1))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    notes = tmp_path / "notes"
    notes.mkdir()
    child = subprocess.Popen([sys.executable, str(script), str(notes), str(Path(__file__).parent)])
    try:
        assert _until(lambda: list(notes.iterdir()))
    finally:
        child.kill()
        child.wait()
    worker = int(next(notes.iterdir()).name)
    assert _until(lambda: not _runs(worker)), "the worker outlived its parent"


def _note(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()


def _until(done: Callable[[], object], seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_answer_that_is_not_to_be_learned_is_encoded_and_masked(hub_tokenizer: Tokenizer) -> None:
    plain = conversation("What dose?", "Two.", "Sure?", "One.")
    marked = (plain[0], plain[1].model_copy(update={"learned": False}), *plain[2:])
    ids, mask = encode_chat(hub_tokenizer, marked)
    before, whole = encode_chat(hub_tokenizer, plain)
    first = sum(encode_chat(hub_tokenizer, plain[:2])[1])
    assert ids == before
    assert [learned for learned in whole if learned][first:] == [learned for learned in mask if learned]
    assert not any(mask[: len(encode_chat(hub_tokenizer, plain[:2])[0])])
    tokens, fast = ChatEncoder(hub_tokenizer).encode(marked)
    assert (tokens.tolist(), fast.tolist()) == (ids, mask)
