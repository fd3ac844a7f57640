"""`bimedix data stats`: count a set of records by language, kind and source."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from bimedix_jax.curation.accounting import SourceAccount
    from bimedix_jax.curation.counts import TokenCounter
    from bimedix_jax.data.records import Record

LANGUAGES = {"en": "English", "ar": "العربية"}

# columns of the table, with titles short enough for 80 characters
COLUMNS = {
    "language": "language",
    "kind": "kind",
    "source": "source",
    "records": "records",
    "turns": "turns",
    "tokens": "tokens",
    "tokens_per_word": "/word",
    "tokens_per_character": "/char",
}


@dataclass(frozen=True)
class Config:
    """Count records and turns. With a tokenizer, count tokens too, also per word, character and UTF-8 byte.

    The second table has the layout of Tables 7 and 8 of the BiMediX paper (arXiv 2402.13253). There, a turn is a
    question with its answer.
    """

    sources: tuple[str, ...] = ("sample",)
    """Sources to read: NAME=PATH with the name of a reader, `sample`, or the path of a JSONL file of records."""

    tokenizer: Path | None = None
    """Checkpoint folder whose tokenizer counts the tokens."""

    examples: int = 0
    """Number of records of each language whose first turn is printed."""

    bidi: bool = False
    """Reorder and join Arabic letters before printing, for terminals without bidirectional text. Files keep the logical
    order."""

    limit: int | None = None
    """Maximum number of records to read from each source."""

    against: Path | None = None
    """JSONL file of records to compare with, such as the training set. For each source, this prints the share of the
    runs of eight words in its answers that are also in the answers of this file."""


@dataclass
class Count:
    """Sums over the records of one group."""

    records: int = 0
    turns: int = 0
    exchanges: int = 0
    words: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    learned: int = 0


def run(config: Config, console: Console) -> dict[str, Any]:
    """Count and print."""
    import itertools

    from tqdm import tqdm

    from bimedix_jax.bidi import is_needed
    from bimedix_jax.curation.counts import TokenCounter
    from bimedix_jax.curation.quarantine import Quarantine
    from bimedix_jax.curation.readers import read
    from bimedix_jax.data.tokenizer import load_tokenizer

    tokens_of = TokenCounter(load_tokenizer(config.tokenizer)) if config.tokenizer else None
    quarantine = Quarantine()
    counts: dict[tuple[str, str, str], Count] = defaultdict(Count)
    openings: dict[str, list[str]] = defaultdict(list)
    accounts: dict[str, SourceAccount] = {}

    def records_of(source: str) -> "Iterator[Record]":
        for record in itertools.islice(read(source, quarantine), config.limit):
            accounts[source] = quarantine.account
            yield record

    everything = itertools.chain.from_iterable(map(records_of, config.sources))
    for record in tqdm(everything, desc="counting", unit=" records", disable=None):
        _add(counts[record.language, record.kind, record.source], record, tokens_of)
        if len(openings[record.language]) < config.examples:
            openings[record.language].append(record.conversations[0].value)
    rows = [_row(*key, count, tokens_of is not None) for key, count in sorted(counts.items())]
    for language in sorted({key[0] for key in counts}):
        total = _sum(count for key, count in counts.items() if key[0] == language)
        rows.append(_row(language, "all", "all", total, tokens_of is not None))
    paper = _paper_tables(counts)
    _print(rows, openings, console, is_needed(config.bidi, console.file))
    print_tables(paper, tokens_of is not None, console)
    for source, account in accounts.items():
        console.print(source, style="bold", highlight=False, markup=False)
        for sentence in account.sentences():
            console.print(f"  {sentence}", highlight=False, markup=False)
    if quarantine.rejected:
        console.print(f"[bold yellow]{len(quarantine.rejected):,} rows could not be read[/]:")
        for (source, reason), number in quarantine.reasons().most_common(12):
            console.print(f"  {number:,} of {source}: {reason}", highlight=False, markup=False)
    sources = [{"source": source, **account.to_dict()} for source, account in accounts.items()]
    result = {"groups": rows, "tables": paper, "quarantined": len(quarantine.rejected), "sources": sources}
    return result if config.against is None else {**result, "overlap": _overlap(config, config.against, console)}


def _overlap(config: Config, against: Path, console: Console) -> list[dict[str, Any]]:
    """Rows of `curation.overlap.overlap`. Unreadable rows are not counted again."""
    import itertools

    from bimedix_jax.curation.overlap import overlap
    from bimedix_jax.curation.quarantine import Quarantine
    from bimedix_jax.curation.readers import read
    from bimedix_jax.data.records import read_jsonl

    unread = Quarantine()
    own = itertools.chain.from_iterable(itertools.islice(read(s, unread), config.limit) for s in config.sources)
    rows = overlap(own, read_jsonl(against))
    for row in rows:
        console.print(
            f"{row['source']}: {row['seen_share']:.1%} of the runs of eight words in answers are also in "
            f"{against.name}; more than half of them in {row['mostly_seen']:.1%} of {row['records']:,} records",
            highlight=False,
        )
    return rows


def _add(count: Count, record: "Record", tokens_of: "TokenCounter | None") -> None:
    count.records += 1
    count.turns += len(record.conversations)
    for turn in record.conversations:
        tokens = 0 if tokens_of is None else tokens_of(turn.value)
        count.words += len(turn.value.split())
        count.characters += len(turn.value)
        count.bytes += len(turn.value.encode())
        count.tokens += tokens
        if turn.speaker == "gpt":
            count.exchanges += 1
            count.learned += tokens if turn.learned else 0


def _paper_tables(counts: Mapping[tuple[str, str, str], Count]) -> list[dict[str, Any]]:
    """The counts in the layout of `curation.counts.tables`."""
    from bimedix_jax.curation import counts as by_kind

    found: dict[tuple[str, str], by_kind.Count] = defaultdict(by_kind.Count)
    for (language, kind, _), count in counts.items():
        found[kind, language] += by_kind.Count(count.records, count.exchanges, count.tokens, count.learned)
    return by_kind.tables(found)


def print_tables(rows: list[dict[str, Any]], with_tokens: bool, console: Console) -> None:
    """Print the rows that `curation.counts.tables` returns."""
    from rich import box

    from bimedix_jax.process.terminal import FittedTable

    names = {"set": "set", "data": "data", "samples": "samples", "average_turns": "avg. turns"}
    names |= {"tokens": "tokens", "learned_tokens": "supervised"} if with_tokens else {}
    table = FittedTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, title in names.items():
        table.add_column(title, justify="left" if name in ("set", "data") else "right")
    for row in rows:
        shown = {**row, "average_turns": "" if row["average_turns"] is None else f"{row['average_turns']:.2f}"}
        table.add_row(*(_cell(shown[name]) for name in names), style="bold" if row["data"] == "Total" else "")
    if rows:
        console.print(table)


def _sum(counts: Iterable[Count]) -> Count:
    total = Count()
    for count in counts:
        for name, value in vars(count).items():
            setattr(total, name, getattr(total, name) + value)
    return total


def _row(language: str, kind: str, source: str, count: Count, with_tokens: bool) -> dict[str, Any]:
    row = {"language": language, "kind": kind, "source": source, **vars(count)}
    if not with_tokens:
        del row["tokens"], row["learned"]
        return row
    per = {"word": count.words, "character": count.characters, "byte": count.bytes}
    return {**row, **{f"tokens_per_{unit}": count.tokens / total for unit, total in per.items()}}


def _print(rows: list[dict[str, Any]], openings: dict[str, list[str]], console: Console, bidi: bool) -> None:
    from rich import box
    from rich.text import Text

    from bimedix_jax.process.terminal import FittedTable, wrapped

    if not rows:
        console.print("no records")
        return
    titles = {name: title for name, title in COLUMNS.items() if name in rows[0]}
    table = FittedTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, title in titles.items():
        is_number = isinstance(rows[0][name], int | float)
        table.add_column(title, justify="right" if is_number else "left")
    for row in rows:
        shown = {**row, "language": _display(LANGUAGES[row["language"]], bidi)}
        table.add_row(*(_cell(shown[name]) for name in titles), style="bold" if row["kind"] == "all" else "")
    console.print(table)
    for texts in openings.values():
        for text in texts:
            if not console.file.isatty():
                console.print(Text(text), soft_wrap=True)
                console.print()
                continue
            justify = "right" if any("\u0600" <= letter <= "\u06ff" for letter in text) else "left"
            for line in wrapped(Text(text), console.width - 2):
                console.print(Text(_display(line.plain.strip(), bidi), justify=justify))
            console.print()


def _cell(value: str | int | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def _display(text: str, bidi: bool) -> str:
    """Text in logical order, or with `bidi` in visual order."""
    if not bidi:
        return text
    from bimedix_jax.bidi import visual

    return visual(text)
