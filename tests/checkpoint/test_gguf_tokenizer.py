"""Keys of a GGUF file's tokenizer that have another type or contradict each other are a sentence with the key."""

from pathlib import Path
from typing import Any

import pytest

from bimedix_jax.checkpoint.gguf_tokenizer import write_tokenizer
from bimedix_jax.data.tokenizer import load_tokenizer
from bimedix_jax.errors import BimedixError

KEYS: dict[str, Any] = {
    "tokens": ["a", "b", "ab", "<s>"],
    "model": "gpt2",
    "pre": "gpt-2",
    "merges": ["a b"],
    "token_type": [1, 1, 1, 3],
    "bos_token_id": 3,
    "padding_token_id": 2**32 - 1,
}


def write(folder: Path, **changes: Any) -> None:
    chat = {"tokenizer.chat_template": changes.pop("chat_template")} if "chat_template" in changes else {}
    keys = {f"tokenizer.ggml.{key}": value for key, value in {**KEYS, **changes}.items()}
    write_tokenizer({**keys, **chat}, folder, Path("x.gguf"))


def test_an_id_that_means_no_token_is_no_role(tmp_path: Path) -> None:
    write(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.encode("ab<s>"), tokenizer.bos_id, tokenizer.special) == ([2, 3], 3, {"bos": "<s>"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "has no vocabulary"),
        ({"tokens": ["a", "a", "ab", "<s>"]}, "a token is twice"),
        ({"tokens": "abcd"}, "tokens = 'abcd'"),
        ({"token_type": [1]}, "token_type has 1 entries for 4 tokens"),
        ({"bos_token_id": 4}, "bos_token_id is 4, but there are 4 tokens"),
        ({"bos_token_id": "<s>"}, "bos_token_id = '<s>'"),
        ({"merges": ["a x"]}, "merges that do not fit its vocabulary"),
        ({"merges": [3]}, r"merges\.0 = 3"),
        ({"pre": "other"}, "needs the pre-tokenizer 'other'"),
        ({"model": "t5"}, "a tokenizer of kind 't5'"),
        ({"model": "llama", "scores": None}, "a tokenizer of kind 'llama'"),
        ({"remove_extra_whitespaces": True}, "its tokenizer normalises text"),
        ({"chat_template": {"default": "x"}}, "chat_template that is not text"),
    ],
)
def test_wrong_keys_raise(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BimedixError, match=message):
        write(tmp_path, **changes)
