"""Mixing: exact ratios, the counts of the paper, no contamination, and the same bytes with any number of workers."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bimedix_jax.cli import main
from bimedix_jax.curation.counts import KINDS
from bimedix_jax.curation.mix import targets
from bimedix_jax.curation.mix.build import mix
from bimedix_jax.curation.mix.config import MixConfig
from bimedix_jax.data.records import (
    Kind,
    Language,
    Record,
    conversation,
    multiple_choice_answer,
    multiple_choice_question,
    read_jsonl,
    write_jsonl,
)
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError

IN_ARABIC = str.maketrans("abcdefghijklmnopqrstuvwxyz", "ابتثجحخدذرزسشصضطظعغفقكلمنه")


def words(*parts: object) -> str:
    """Twenty words that no other text has."""
    text = " ".join("x".join(map(str, (*parts, i))) for i in range(20))
    return text.translate(IN_ARABIC) if "ar" in parts else text


def record(language: Language, kind: Kind, number: int, source: str = "test", **more: Any) -> Record:
    asked, said = (words(language, kind, number, side) for side in ("asked", "said"))
    fields: dict[str, Any] = {"language": language, "kind": kind, "source": source, "licence": "CC0-1.0", **more}
    if kind == "mcqa":
        choices = ("yes", "no", "maybe")
        asked = multiple_choice_question(asked, choices)
        said = multiple_choice_answer(choices, 1, language, said)
        fields |= {"choices": choices, "answer": 1}
    turns = conversation(asked, said, *((f"{asked} again", f"{said} again") if kind == "chat" else ()))
    return Record(id=f"{kind}/{language}/{number}", conversations=turns, **fields)


def write(path: Path, counts: dict[tuple[Kind, Language], int]) -> list[Record]:
    made = [record(language, kind, i) for (kind, language), count in counts.items() for i in range(count)]
    write_jsonl(path, made)
    return made


def config(*sources: object, **more: Any) -> MixConfig:
    fields: dict[str, Any] = {
        "sources": tuple(map(str, sources)),
        "evaluation": (),
        "ratio": (1, 2),
        "preset": None,
        "scale": False,
        "near_duplicates": 0.8,
        "ngram": 8,
        "share": 0.5,
        "limit": None,
        "seed": 0,
        "tokenizer": None,
        "template": None,
        "workers": 0,
    }
    return MixConfig(**{**fields, **more})


def run(folder: Path, given: MixConfig) -> tuple[dict[str, Any], list[Record]]:
    folder.mkdir()
    report = mix(given, folder)
    return report, list(read_jsonl(folder / "train.jsonl"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


UNEVEN: dict[tuple[Kind, Language], int] = {
    ("qa", "en"): 11,
    ("qa", "ar"): 9,
    ("mcqa", "en"): 30,
    ("mcqa", "ar"): 4,
    ("chat", "en"): 3,
    ("chat", "ar"): 3,
}


def test_the_ratio_is_exact_in_each_kind_and_the_set_as_large_as_possible(tmp_path: Path) -> None:
    write(tmp_path / "all.jsonl", UNEVEN)
    report, chosen = run(tmp_path / "set", config(tmp_path / "all.jsonl"))
    counts = Counter((one.kind, one.language) for one in chosen)
    assert counts == {
        ("qa", "ar"): 5,
        ("qa", "en"): 10,
        ("mcqa", "ar"): 4,
        ("mcqa", "en"): 8,
        ("chat", "ar"): 1,
        ("chat", "en"): 2,
    }
    assert len({one.id for one in chosen}) == len(chosen) == report["records"]
    assert [row["samples"] for row in report["ratios"]] == [2.0] * 4
    assert report["decisions"]["surplus"] == sum(UNEVEN.values()) - 30
    assert [one.kind for one in chosen] != sorted(one.kind for one in chosen), "kinds and languages are mixed"


@given(
    counts=st.dictionaries(st.tuples(st.sampled_from(KINDS), st.sampled_from(("ar", "en"))), st.integers(0, 10**6)),
    ratio=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_any_ratio_is_exact(counts: dict[tuple[str, str], int], ratio: tuple[int, int]) -> None:
    try:
        wanted = targets.by_ratio(counts, ratio)
    except BimedixError:
        assert all(counts.get((k, "ar"), 0) < ratio[0] or counts.get((k, "en"), 0) < ratio[1] for k in KINDS)
        return
    for kind in {kind for kind, _ in wanted}:
        arabic, english = (wanted[kind, language] for language in ("ar", "en"))
        assert arabic * ratio[1] == english * ratio[0] > 0
        assert arabic <= counts[kind, "ar"]
        assert english <= counts[kind, "en"]
        assert arabic + ratio[0] > counts[kind, "ar"] or english + ratio[1] > counts[kind, "en"], "as large as possible"


def test_the_papers_counts_and_ratios() -> None:
    """Tables 7 and 8 of arXiv 2402.13253: 866.6 K English and 1,311.6 K in all."""
    paper = targets.PRESETS["paper"]
    assert sum(paper.values()) == 1_311_600
    assert sum(targets.PRESETS["paper-english"].values()) == 866_600
    assert sum(targets.PRESETS["paper-arabic"].values()) == 445_000
    shown = [round(paper[kind, "en"] / paper[kind, "ar"], 2) for kind in KINDS]
    assert shown == [1.72, 1.84, 2.85]
    assert targets.by_preset(paper, "paper", scale=False) == paper


def test_too_few_records_for_a_preset_raise_unless_scaled(tmp_path: Path) -> None:
    paper = targets.PRESETS["paper"]
    short = {part: count // 100 for part, count in paper.items()} | {("chat", "ar"): 324}
    with pytest.raises(BimedixError, match=r"qa ar: 1,556 of 155,600.*chat ar: 324 of 64,900.*--scale"):
        targets.by_preset(short, "paper", scale=False)
    scaled = targets.by_preset(short, "paper", scale=True)
    assert scaled["chat", "ar"] == 324
    for part, count in scaled.items():
        assert 0 <= paper[part] * 324 / 64_900 - count < 1
    with pytest.raises(BimedixError, match="there are 0 chat ar"):
        targets.by_preset({**short, ("chat", "ar"): 0}, "paper", scale=True)
    arabic = targets.by_preset(short, "paper-arabic", scale=True)
    assert {language for _, language in arabic} == {"ar"}


def test_scaled_presets_give_all_three_sets(tmp_path: Path) -> None:
    write(tmp_path / "all.jsonl", {(kind, language): 12 for kind in KINDS for language in ("en", "ar")})  # type: ignore
    for preset, languages in (("paper", {"ar", "en"}), ("paper-english", {"en"}), ("paper-arabic", {"ar"})):
        report, chosen = run(tmp_path / preset, config(tmp_path / "all.jsonl", preset=preset, scale=True))
        assert {one.language for one in chosen} == languages
        assert [row["set"] for row in report["tables"] if row["data"] == "Total"][-1] == (
            "bilingual" if len(languages) == 2 else {"en": "English", "ar": "Arabic"}[languages.pop()]
        )
    with pytest.raises(BimedixError, match="qa ar: 12 of 155,600"):
        run(tmp_path / "unscaled", config(tmp_path / "all.jsonl", preset="paper"))


def test_the_set_depends_on_the_seed_but_not_on_workers_or_source_order(tmp_path: Path) -> None:
    half = len(write(tmp_path / "all.jsonl", UNEVEN)) // 2
    made = list(read_jsonl(tmp_path / "all.jsonl"))
    write_jsonl(tmp_path / "a.jsonl", made[:half])
    write_jsonl(tmp_path / "b.jsonl", made[half:])
    sources = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    run(tmp_path / "one", config(*sources))
    run(tmp_path / "two", config(*sources, workers=2))
    run(tmp_path / "turned", config(*reversed(sources)))
    run(tmp_path / "seed", config(*sources, seed=1))
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    sets = {name: (tmp_path / name / "train.jsonl").read_bytes() for name in ("one", "turned", "seed")}
    assert sets["one"] == sets["turned"] != sets["seed"]


def test_contaminated_records_are_removed_with_their_families_and_reported(tmp_path: Path) -> None:
    """If a training question is a test question, its translation and its chat are removed as well."""
    made = write(tmp_path / "all.jsonl", {(kind, language): 8 for kind in KINDS for language in ("en", "ar")})  # type: ignore
    leaked = made[0].model_copy(update={"id": "leaked", "conversations": record("en", "qa", 900).conversations})
    family = [
        record("ar", "qa", 901, provenance={"translation_of": "leaked"}),
        record("en", "chat", 902, provenance={"source_id": "leaked"}),
        record("ar", "chat", 903, provenance={"source_id": "leaked", "translation_of": "chat/en/902"}),
    ]
    arabic = made[-1].model_copy(update={"id": "leaked/ar", "conversations": record("ar", "mcqa", 904).conversations})
    copy = made[3].model_copy(update={"id": "copy"})
    held = record("en", "qa", 905, split="heldout")
    write_jsonl(tmp_path / "more.jsonl", [*family, leaked, arabic, copy, made[1], held])
    write_jsonl(tmp_path / "en.jsonl", [record("en", "qa", 900, "exam").model_copy(update={"id": "test/1"})])
    write_jsonl(tmp_path / "ar.jsonl", [record("ar", "mcqa", 904, "exam").model_copy(update={"id": "test/2"})])
    with (tmp_path / "more.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"id": "broken"}\n\nnot JSON\n')
    report, chosen = run(
        tmp_path / "set",
        config(
            tmp_path / "all.jsonl",
            tmp_path / "more.jsonl",
            evaluation=(str(tmp_path / "en.jsonl"), str(tmp_path / "ar.jsonl")),
            ratio=(1, 1),
        ),
    )
    names = {one.id for one in chosen}
    out = {"leaked", "leaked/ar", *(one.id for one in family), "copy", held.id}
    assert not names & out
    assert report["decisions"] == {
        "kept": 48, "malformed": 2, "heldout": 1, "same_id": 1, "contaminated": 2, "family": 3, "near_duplicate": 1,
        "surplus": 0,
    }  # fmt: skip
    found = {line["record"]: line for line in lines(tmp_path / "set" / "contamination.jsonl")}
    assert set(found) == {"leaked", "leaked/ar", *(one.id for one in family)}
    assert {line["evaluation"] for name, line in found.items() if name != "leaked/ar"} == {"test/1"}
    assert (found["leaked"]["by"], found["leaked"]["share"]) == ("question", 1.0)
    assert (found["chat/ar/903"]["by"], found["chat/ar/903"]["made_from"]) == ("family", "leaked")
    assert lines(tmp_path / "set" / "duplicates.jsonl") == [
        {"record": "copy", "duplicate_of": made[3].id, "similarity": 1.0}
    ]
    rejected = lines(tmp_path / "set" / "quarantine.jsonl")
    assert [row["line"] for row in rejected] == [9, 11]
    assert "Field required" in rejected[0]["reason"]
    card = (tmp_path / "set" / "README.md").read_text()
    for text in ("research only", "CC0-1.0", report["sha256"], "| exam | ar | 1 |", "| near-duplicate | 1 |", "1:1.00"):
        assert text.casefold() in card.casefold()


def test_near_duplicates_can_be_kept_and_the_first_source_has_priority(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {("qa", "en"): 4, ("qa", "ar"): 2})
    copy = record("en", "qa", 1).model_copy(update={"id": "copy", "source": "other"})
    write_jsonl(tmp_path / "b.jsonl", [copy])
    _, first = run(tmp_path / "ab", config(tmp_path / "a.jsonl", tmp_path / "b.jsonl"))
    _, second = run(tmp_path / "ba", config(tmp_path / "b.jsonl", tmp_path / "a.jsonl"))
    assert {one.id for one in first} - {one.id for one in second} == {"qa/en/1"}
    write(tmp_path / "turns.jsonl", {("qa", "ar"): 3, ("qa", "en"): 9})
    few, _ = run(tmp_path / "few", config(tmp_path / "turns.jsonl", limit=5))
    assert (few["sources"][0]["read"], few["records"]) == (5, 3)
    report, _ = run(tmp_path / "kept", config(tmp_path / "a.jsonl", tmp_path / "b.jsonl", near_duplicates=0))
    assert report["decisions"]["near_duplicate"] == 0
    assert report["decisions"]["surplus"] == 1


def test_the_command_counts_tokens_as_packing_does(tmp_path: Path, bytes_tokenizer: Tokenizer, capsys) -> None:
    out = str(tmp_path / "set")
    common = ["--tokenizer", str(bytes_tokenizer.folder), "--workers", "0", "--json"]
    assert main(["data", "mix", "--sources", "sample", "--out", out, *common]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert "overlap was not checked" in captured.err
    assert "by supervised tokens" in captured.err
    assert "no evaluation set was given" in (tmp_path / "set" / "README.md").read_text()
    packing = ["--records", f"{out}/train.jsonl", "--out", str(tmp_path / "packed"), "--sequence-length", "65536"]
    assert main(["data", "pack", *packing, *common]) == 0
    packed = json.loads(capsys.readouterr().out)
    total = report["tables"][-1]
    assert (total["set"], total["data"]) == ("bilingual", "Total")
    assert (total["samples"], total["tokens"], total["learned_tokens"]) == (
        packed["examples"],
        packed["tokens"],
        packed["learned_tokens"],
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "1:0"], "'1:0' is not a ratio"),
        (["--ratio", "two"], "'two' is not a ratio"),
        (["--scale"], "--scale needs a preset"),
        (["--ratio", "1:1", "--preset", "paper"], "not both"),
        (["--near-duplicates", "1.5"], "must be in [0, 1]"),
        (["--workers", "-1"], "--workers -1 is negative"),
        (["--benchmarks", "nowhere"], "lacks the folder"),
        (["--preset", "paper"], "there are fewer records than preset paper needs"),
        (["--ratio", "1:500"], "no kind has the records"),
        (["--evaluation", "none.jsonl"], "there is no none.jsonl"),
    ],
)
def test_invalid_options_and_missing_sources_fail(tmp_path: Path, options: list[str], message: str, capsys) -> None:
    output = tmp_path / "set"
    workers = [] if "--workers" in options else ["--workers", "0"]
    assert main(["data", "mix", "--sources", "sample", "--out", str(output), *workers, *options]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "no files are left"
