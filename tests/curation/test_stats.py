"""The counts of a set, in the tables of the paper, and fertility."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from bimedix_jax.bidi import visual
from bimedix_jax.cli import main
from bimedix_jax.commands import data_stats
from bimedix_jax.curation import counts
from bimedix_jax.curation.counts import Count
from bimedix_jax.data.records import Record, conversation, sample, write_jsonl
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.process.terminal import Screen


def stats(capsys, *options: str) -> tuple[dict[str, Any], str]:
    assert main(["data", "stats", *options, "--json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_tables_match_the_layout_of_the_paper(tmp_path: Path, bytes_tokenizer: Tokenizer, capsys) -> None:
    """Tables 7 and 8: samples, average turns (a turn is a question with its answer), tokens, by kind and in total."""
    said = {"qa": ("ab", "cde"), "chat": ("ab", "cde", "fg", "hijk")}
    made = [
        Record.model_validate(
            {"id": f"{kind}{language}{i}", "language": language, "kind": kind, "source": "s", "licence": "l"}
            | {"conversations": conversation(*said[kind])}
        )
        for kind, language, count in (("qa", "en", 3), ("chat", "en", 2), ("qa", "ar", 1))
        for i in range(count)
    ]
    write_jsonl(tmp_path / "r.jsonl", made)
    found, shown = stats(capsys, "--sources", str(tmp_path / "r.jsonl"), "--tokenizer", str(bytes_tokenizer.folder))
    rows = {(row["set"], row["data"]): row for row in found["tables"]}
    assert len(rows) == 12
    assert rows["English", "QA"] == {
        "set": "English",
        "data": "QA",
        "samples": 3,
        "average_turns": 1.0,
        "tokens": 15,
        "learned_tokens": 9,
    }
    assert rows["English", "Chat"]["average_turns"] == 2
    assert rows["English", "MCQA"] | {"samples": 0, "average_turns": None} == rows["English", "MCQA"]
    assert rows["English", "Total"]["average_turns"] == 7 / 5
    assert rows["bilingual", "Total"]["tokens"] == 15 + 22 + 5
    assert rows["Arabic", "Total"]["samples"] == 1
    for text in ("avg. turns", "supervised", "bilingual", "1.40"):
        assert text in shown


def test_without_a_tokenizer_there_are_no_tokens(capsys) -> None:
    found, shown = stats(capsys)
    assert "supervised" not in shown
    assert {"tokens", "learned"}.isdisjoint(found["groups"][0])
    total = found["tables"][-1]
    assert (total["set"], total["data"], total["samples"]) == ("bilingual", "Total", sum(1 for _ in sample()))


def test_ratios_by_samples_tokens_and_supervised_tokens() -> None:
    given = {("qa", "ar"): Count(2, 2, 100, 50), ("qa", "en"): Count(4, 4, 90, 60), ("chat", "en"): Count(1)}
    qa, chat, everything = counts.ratios(given)
    assert (qa["samples"], qa["tokens"], qa["learned_tokens"]) == (2, 0.9, 1.2)
    assert (chat["kind"], chat["samples"]) == ("chat", None)
    assert (everything["kind"], everything["samples"]) == ("all", 2.5)
    assert counts.shown_ratio(1.8423) == "1:1.84"
    assert counts.shown_ratio(None) == "no Arabic"


@pytest.mark.parametrize(("language", "name"), [("en", "English"), ("ar", "Arabic")])
def test_a_set_of_one_language_has_one_table(language: str, name: str) -> None:
    rows = counts.tables({("mcqa", language): Count(5, 5, 10, 5)})
    assert [(row["set"], row["data"]) for row in rows] == [(name, data) for data in ("QA", "MCQA", "Chat", "Total")]


@pytest.mark.parametrize("options", [[], ["--bidi"]])
def test_arabic_has_its_logical_order_in_a_pipe(options: list[str], monkeypatch, capfd) -> None:
    """Visual order is for terminals without bidirectional text; in a file it would be text in reverse."""
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["data", "stats", "--examples", "1", *options]) == 0
    shown = capfd.readouterr().out
    first = next(record for record in sample() if record.language == "ar").conversations[0].value
    assert first in shown
    assert "العربية" in shown
    assert not any("\ufb50" <= letter <= "\ufefc" for letter in shown), "joined presentation forms"


def test_bidi_on_a_terminal_joins_and_reorders(monkeypatch) -> None:
    screen = Screen()
    screen.file = io.StringIO()
    monkeypatch.setattr(screen.file, "isatty", lambda: True, raising=False)
    data_stats.run(data_stats.Config(examples=1, bidi=True), screen)
    assert visual("العربية") in screen.file.getvalue()
