"""Sentences with a professional translation, for measurements on pairs: TICO-19."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bimedix_jax.curation.accounting import SourceAccount
from bimedix_jax.curation.quarantine import Quarantine
from bimedix_jax.curation.readers.reading import Reading
from bimedix_jax.curation.readers.rows import Place, Row, build_all, optional, rows, said, split_for
from bimedix_jax.data.records import Language, Record, conversation

REQUESTS: dict[Language, str] = {"en": "Write a sentence about health.", "ar": "اكتب جملة عن الصحة."}
"""What the sentence answers, since a conversation begins with a human turn."""


def tico19(place: Place, quarantine: Quarantine, *, reading: Reading | None = None) -> Iterator[Record]:
    """TICO-19 (Anastasopoulos et al. 2020): 3,071 English sentences of 31 documents and their translations into Arabic.

    Reads the authors' TSV of a language pair (sourceString, targetString, stringID, ...) or rows {id, source, en, ar}.
    A row gives two records, one in each language, or one with `language`. The provenance has `pair`, which both share,
    and `document`, which all sentences of a document share: these are the units of statistics on pairs. A document is
    never split between training and held-out records.
    """
    how, account = reading or Reading(), quarantine.account

    def make(row: Row, fields: dict[str, Any]) -> Record:
        language: Language = "en" if row.key == "en" else "ar"
        fields = _sentence(fields, language)
        name = said(fields["id"])
        document = name.rpartition(":")[0]
        if not document:
            raise ValueError(f"the id {name!r} does not name a document, as in PubMed_10:901")
        return Record(
            id=f"tico19/{name}/{language}",
            language=language,
            kind="qa",
            source="tico19",
            licence="CC0-1.0",
            split=split_for(row, how, account),
            conversations=conversation(REQUESTS[language], said(fields["text"])),
            provenance={"pair": name, "document": document, "group": document, "url": optional(fields["url"])},
        )

    yield from build_all("tico19", _sentences(place, how, account), quarantine, make, how)


def _sentences(place: Place, how: Reading, account: SourceAccount) -> Iterator[Row]:
    """A row for each language of each row; `key` is the language."""
    languages: tuple[Language, ...] = ("en", "ar") if how.language is None else (how.language,)
    for row in rows(place, reading=how, account=account):
        account.lines += row.lines * (len(languages) - 1)
        for language in languages:
            yield replace(row, key=language)


def _sentence(fields: dict[str, Any], language: Language) -> dict[str, Any]:
    """id, url and text in one language, of either layout. Fields that are missing stay so."""
    if "stringID" not in fields:
        names = {"id": "id", "url": "source", "text": language}
    elif fields.get("sourceLang") == language:
        names = {"id": "stringID", "url": "url", "text": "sourceString"}
    elif str(fields.get("targetLang")).partition("-")[0] == language:
        names = {"id": "stringID", "url": "url", "text": "targetString"}
    else:
        names = {"id": "stringID", "text": language}
    found = {name: fields[own] for name, own in names.items() if own in fields}
    return {"url": "", **found}
