"""Readers turn the files of published data sets into records, one at a time.

A reader takes a place (a file, a folder, or a data set on the hub), a `Quarantine`, and options by name. It calls
`Quarantine.build` for every row, in a fixed order. A malformed row is never repaired by guessing and never dropped
silently: it is quarantined with its file, line and reason. A record's id depends on its own row only. To add a data
set, write such a function in one of these files and add a line to `READERS`.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import parse_qsl

from bimedix_jax.curation.accounting import SourceAccount
from bimedix_jax.curation.quarantine import LimitReached, Quarantine, WrongSource
from bimedix_jax.curation.readers import dialogues, exams, hub, instructions, questions, tables, translations
from bimedix_jax.curation.readers.reading import COMMON, parse_reading
from bimedix_jax.curation.readers.rows import Place
from bimedix_jax.data.records import Record
from bimedix_jax.errors import BimedixError

READERS: dict[str, Callable[..., Iterator[Record]]] = {
    "sample": tables.bundled_sample,
    "records": tables.own_records,
    "table": tables.table,
    "medqa": exams.medqa,
    "medmcqa": exams.medmcqa,
    "mmlu": exams.mmlu,
    "pubmedqa": exams.pubmedqa,
    "pubmedqa_artificial": exams.pubmedqa_artificial,
    "pubmedqa_unlabelled": exams.pubmedqa_unlabelled,
    "medquad": questions.medquad,
    "liveqa": questions.liveqa,
    "medicationqa": questions.medicationqa,
    "mts_dialog": dialogues.mts_dialog,
    "chatdoctor": instructions.chatdoctor,
    "pmc_llama": instructions.pmc_llama,
    "tico19": translations.tico19,
    "sharegpt": dialogues.sharegpt,
    "dialogue": dialogues.dialogue,
    "messages": dialogues.messages,
    "medqa_usmle_en": exams.medqa_usmle_en,
    "medmcqa_en": exams.medmcqa_en,
    "mmlu_medical_en": exams.mmlu_medical_en,
    "mmlu_medical_en_dev": exams.mmlu_medical_en_dev,
}

FOLDERS_ONLY = {"mts_dialog", "liveqa", "medqa_usmle_en", "medmcqa_en", "mmlu_medical_en", "mmlu_medical_en_dev"}
"""Readers of files that only the authors publish, in formats that `datasets` cannot read."""

_TEXTS = ("language", "html", "placeholders", "missing")
_SHARED = {
    **dict.fromkeys(FOLDERS_ONLY | {"medquad"}, _TEXTS),
    **dict.fromkeys(("liveqa", "pubmedqa", "pubmedqa_artificial", "pubmedqa_unlabelled"), (*_TEXTS, "split")),
    "mmlu": (*_TEXTS, "split", "delimiter"),
    "records": ("language",),
}
"""The shared options (readers/reading.py) of readers that do not take all of them."""

_LIKE_DATA = re.compile(r"[.?!؟]\s*$|^[\W\d_]*$")
"""A sentence, a number or nothing, which no column is named."""


def read(source: str, quarantine: Quarantine) -> Iterator[Record]:
    """Records of `NAME=PLACE`, of `sample`, or of the path of a JSONL file of records.

    PLACE is a file, a folder, or `hf:owner/name@revision#config/split` for a data set on the hub. `hf:` before a folder
    reads the folder with the `datasets` package. PLACE may end in options of the reader, `?name=value&name=value`.

    Raises:
        BimedixError: no such reader, option or place, or the place does not have the layout that the reader expects.
    """
    name, place, options = parse(source)
    yield from read_place(name, place, options, quarantine)


def parse(source: str) -> tuple[str, Place, dict[str, str]]:
    """Reader, place and options of a source in the form that `read` takes.

    Raises:
        BimedixError: no such reader, or the source does not have that form.
    """
    name, separator, where = source.partition("=")
    if separator and name not in READERS and Path(source).is_file():
        name, separator, where = source, "", ""  # a file whose path contains =
    if not separator and name != "sample":
        if not name.endswith((".jsonl", ".jsonl.gz")):
            raise BimedixError(
                f"source {source!r} has no path; write NAME=PATH, where NAME is one of {', '.join(READERS)}"
            )
        name, where = "records", source
    if name not in READERS:
        raise BimedixError(f"there is no reader {name!r}; the readers are {', '.join(READERS)}")
    where, _, query = where.partition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    if query and not options:
        raise BimedixError(f"{query!r} in {source!r} is not an option; write ?name=value&name=value")
    for key in options:
        values = [value for option, value in pairs if option == key]
        if len(values) > 1:
            raise BimedixError(f"{key}= is given {len(values)} times in {source!r} ({', '.join(values)}); give it once")
    return name, place_of(where), options


def place_of(text: str) -> Place:
    """The place that a text names: a data set on the hub if it begins with `hf:`, else a path."""
    return hub.parse(text.removeprefix(hub.PREFIX)) if text.startswith(hub.PREFIX) else Path(text).expanduser()


def read_place(name: str, place: Place, options: Mapping[str, str], quarantine: Quarantine) -> Iterator[Record]:
    """Records of a place, read by the reader `name`. Stops at the limit of the quarantine.

    Raises:
        BimedixError: see `read`.
    """
    check_options(name, options)
    if isinstance(place, hub.HubSet):
        if name in FOLDERS_ONLY or name == "sample":
            raise BimedixError(
                f"{name} reads only the files of the authors, not the hub; name the folder that contains them"
            )
    elif name != "sample" and not place.exists():
        raise BimedixError(f"there is no {place}; name the file or folder of the {name} data")
    reading = parse_reading(options)
    own = {key: value for key, value in options.items() if key not in COMMON}
    quarantine.start()
    account, limited = quarantine.account, False
    how = {"reading": reading} if _takes_reading(name) else {}
    try:
        yield from READERS[name](place, quarantine, **own, **how)
    except LimitReached:
        limited = True
    if not account.records:
        raise nothing_read(name, place, account, limited)
    if not limited and account.lines:
        account.check(f"{name}={place}")


def nothing_read(name: str, place: Place, account: SourceAccount, limited: bool) -> WrongSource:
    """The error for a source without a record, with what its file has instead."""
    label = f"{name}={place.label if isinstance(place, hub.HubSet) else place}"
    if not account.rows:
        skipped = f" ({account.skipped:,} were skipped by its options)" if account.skipped else ""
        return WrongSource(f"{label} has no rows{skipped}; name a file with data")
    rows = f"none of the first {account.rows:,} rows" if limited else f"none of its {account.rows:,} rows"
    columns = f"; its columns or keys are {account.listed_columns()}" if account.columns else ""
    hint = ""
    if name == "table" and any(problem.startswith("field ") for problem in account.problems):
        hint = "; name those that hold the question and the answer"
        if any(_LIKE_DATA.search(column) or column.count(" ") > 3 for column in account.columns):
            hint += ". The header looks like a row of data; pass header=no if the file has no header"
    columns += "".join(f" ({note})" for note in account.notes)
    return WrongSource(f"{label}: {rows} is a record ({account.listed_problems()}){columns}{hint}")


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """The options of a reader, by name: its own, then those that it shares with other readers."""
    own = {
        key: value
        for key, value in inspect.signature(READERS[name]).parameters.items()
        if value.kind is inspect.Parameter.KEYWORD_ONLY and key != "reading"
    }
    shared = _SHARED.get(name, COMMON) if _takes_reading(name) else ()
    return own | {key: inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None) for key in shared}


def _takes_reading(name: str) -> bool:
    return "reading" in inspect.signature(READERS[name]).parameters


def check_options(name: str, options: Mapping[str, str]) -> None:
    """Raise BimedixError for an unknown option of a reader, or for a required one that is missing."""
    known = options_of(name)
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise BimedixError(f"{name} has no option {unknown[0]!r}; its options are {', '.join(known) or 'none'}")
    missing = [key for key, parameter in known.items() if parameter.default is parameter.empty and key not in options]
    if missing:
        raise BimedixError(
            f"{name} needs {', '.join(f'{key}=...' for key in missing)}; write them after ? in the source"
        )
