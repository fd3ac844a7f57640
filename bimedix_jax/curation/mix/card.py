"""The data card of a mixed set: contents, sources, licences, and the records that were left out."""

from collections.abc import Iterable, Sequence
from typing import Any

from bimedix_jax.curation.counts import shown_ratio
from bimedix_jax.curation.mix.candidates import MEANING, Decision
from bimedix_jax.notice import NOTICE_AR, NOTICE_EN


def render(report: dict[str, Any]) -> str:
    """The card in Markdown, with the header that the Hugging Face hub reads. `report` is mix.report.build's."""
    return (
        "\n\n".join(
            part
            for part in (
                _header(report),
                f"# Medical conversations, {_languages(report)}",
                f"> {NOTICE_EN}",
                f"> {NOTICE_AR}",
                _what(report),
                "## Counts",
                _tables(report),
                "## Arabic to English",
                _ratios(report),
                "## Sources and licences",
                "Every record names its source and licence. Each licence applies to the records of its source.",
                _groups(report),
                "## Records left out",
                _left_out(report),
                "## Overlap with evaluation sets",
                _decontamination(report),
                "## How to reproduce this set",
                _again(report),
            )
        )
        + "\n"
    )


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers with separators, right-aligned by the column of the first row."""
    shown = [[_cell(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (list(titles), ["---"] * len(titles), *shown))


def _header(report: dict[str, Any]) -> str:
    languages = sorted({group["language"] for group in report["groups"]})
    lines = ["---", f"language: [{', '.join(languages)}]", "license: other", "tags: [medical, research-only]", "---"]
    return "\n".join(lines)


def _languages(report: dict[str, Any]) -> str:
    names = {"en": "English", "ar": "Arabic"}
    return " and ".join(names[code] for code in sorted({group["language"] for group in report["groups"]}, reverse=True))


def _what(report: dict[str, Any]) -> str:
    settings = report["settings"]
    ratio = ":".join(map(str, settings["ratio"]))
    how = f"{ratio} of Arabic to English in each kind" if settings["preset"] is None else f"preset {settings['preset']}"
    scaled = ", scaled to the available records" if settings["scale"] else ""
    return (
        f"{report['records']:,} conversations in `train.jsonl`, one JSON object a line (`conversations` as "
        f"`from`/`value`, with language, kind, source, licence and provenance): {how}{scaled}, seed {settings['seed']}."
    )


def _tables(report: dict[str, Any]) -> str:
    with_tokens = report["settings"]["tokenizer"] is not None
    titles = ["set", "data", "samples", "avg. turns", *(["tokens", "supervised tokens"] if with_tokens else [])]
    names = ("set", "data", "samples", "average_turns", *(("tokens", "learned_tokens") if with_tokens else ()))
    shown = table(titles, ([row[name] for name in names] for row in report["tables"]))
    note = "A turn is a question with its answer, as in the BiMediX paper (arXiv 2402.13253, Tables 7 and 8)."
    tokens = (
        f"Tokens were counted with `{report['settings']['tokenizer']}`, those of the chat template included."
        if with_tokens
        else "Tokens were not counted, since no tokenizer was given."
    )
    return f"{shown}\n\n{note} {tokens}"


def _ratios(report: dict[str, Any]) -> str:
    with_tokens = report["settings"]["tokenizer"] is not None
    measures = ("samples", *(("tokens", "learned_tokens") if with_tokens else ()))
    titles = ["kind", *(f"by {'supervised tokens' if name == 'learned_tokens' else name}" for name in measures)]
    rows = ([row["kind"], *(shown_ratio(row[name]) for name in measures)] for row in report["ratios"])
    return table(titles, rows)


def _groups(report: dict[str, Any]) -> str:
    rows = sorted(report["groups"], key=lambda group: (group["source"], group["language"], group["kind"]))
    names = ("source", "licence", "language", "kind", "samples")
    return table(names, ([row[name] for name in names] for row in rows))


def _left_out(report: dict[str, Any]) -> str:
    counts = {meaning: report["decisions"][decision.name.lower()] for decision, meaning in MEANING.items()}
    del counts[MEANING[Decision.KEPT]]
    threshold = report["settings"]["near_duplicates"]
    how = f"at least {threshold:.0%} of runs of five words shared" if threshold else "not removed"
    return table(("reason", "records"), counts.items()) + (
        f"\n\nNear-duplicates ({how}) are listed in `duplicates.jsonl`, records that overlap an evaluation set "
        "in `contamination.jsonl`, and rows that are not valid records in `quarantine.jsonl`."
    )


def _decontamination(report: dict[str, Any]) -> str:
    if not report["evaluation"]["sets"]:
        return "**Not checked: no evaluation set was given. Do not report benchmarks of a model trained on this set.**"
    settings = report["settings"]
    sets = table(
        ("evaluation set", "language", "questions"),
        ([row["source"], row["language"], row["records"]] for row in report["evaluation"]["sets"]),
    )
    rule = (
        "A record was removed if it has the id, PubMed id or question of an evaluation record, or contains at least "
        f"{settings['share']:.0%} of the runs of {settings['ngram']} words of an evaluation question or of the text "
        f"that the question is about (all of them if that text has fewer than {2 * settings['ngram']} words). Its "
        "source, its translations and the chats made from it were removed with it."
    )
    if not report["contamination"]:
        return f"{sets}\n\n{rule} No record was removed."
    names = ("evaluation", "source", "language", "kind", "by", "records")
    removed = table(names, ([row[name] for name in names] for row in report["contamination"]))
    return f"{sets}\n\n{rule}\n\n{removed}"


def _again(report: dict[str, Any]) -> str:
    inputs = [*report["sources"], *report["evaluation"]["sources"]]
    hashes = table(
        ("file", "SHA-256"),
        [("`train.jsonl`", report["sha256"])]
        + [(f"`{row['source']}`", row["sha256"] or "none (bundled sample, or the hub)") for row in inputs],
    )
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"`bimedix data mix` with the settings in `report.json` ({versions}) gives the same bytes from these files."
        f"\n\n{hashes}"
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")
