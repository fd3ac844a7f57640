"""Fertility of a SentencePiece tokenizer as `bimedix data stats` prints it."""

import json

from bimedix_jax.cli import main
from bimedix_jax.curation.counts import TokenCounter
from bimedix_jax.data.records import sample
from bimedix_jax.data.tokenizer import Tokenizer


def test_fertility_by_language(mixtral_tokenizer: Tokenizer, capsys) -> None:
    """Token counts equal those of the tokenizers library for each turn."""
    assert main(["data", "stats", "--tokenizer", str(mixtral_tokenizer.folder), "--limit", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for row in found["groups"]:
        if row["kind"] == "all":
            assert row["tokens_per_word"] == row["tokens"] / row["words"]
            assert row["tokens_per_character"] == row["tokens"] / row["characters"]
            assert row["tokens_per_byte"] == row["tokens"] / row["bytes"]
    texts = [turn.value for record in list(sample())[:40] for turn in record.conversations]
    plain = sum(len(mixtral_tokenizer.encode_with_offsets(text, literal=True).ids) for text in texts)
    assert sum(row["tokens"] for row in found["groups"] if row["kind"] == "all") == plain
    assert sum(map(TokenCounter(mixtral_tokenizer), texts)) == plain
