"""Tables 3, 4 and 5 of the BiMediX paper: its published rows, and ours beside them.

The published figures are in assets/paper/tables.toml, as printed. Their averages are computed again, and a footnote
says where the printed one is wrong.
"""

import dataclasses
import functools
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from bimedix_jax import files
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.protocols import OURS, left_out, not_shown, protocol_of
from bimedix_jax.evals.tables import task_note
from bimedix_jax.evals.tasks import TASKS
from bimedix_jax.evals.typeset import Cell, Sheet

BENCHMARKS = {"bilingual": 3, "Arabic": 4, "English": 5}
"""Benchmark -> number of the paper's table."""
CODES = {"en": "English", "ar": "Arabic"}
"""Language of a result -> benchmark."""
HARNESS = {"medqa_4options": "medqa"}
"""lm-evaluation-harness's name of a task -> ours, where they differ."""
DERIVED = "BiMediX (Bilingual), derived"
PROTOCOL = "which names lm-evaluation-harness and no number of solved examples."
ROUNDING = 0.05 + 1e-9
"""Largest difference between a mean and its first decimal."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of the paper: accuracies in percent in the order of TASKS, and the average as printed."""

    model: str
    accuracies: tuple[float, ...]
    average: float
    cited: str = ""

    @property
    def mean(self) -> float:
        """The unweighted mean of the nine columns."""
        return sum(self.accuracies) / len(self.accuracies)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One of the paper's tables of accuracies."""

    number: int
    benchmark: str
    rows: tuple[Published, ...]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Speed:
    """A row of Table 6: active parameters as printed, seconds for `Efficiency.tokens` tokens, and tokens/s."""

    model: str
    active: str
    latency: float
    tokens_per_s: float
    architecture: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of one of the models of Table 6; a dense model has one expert."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int
    experts: int
    top_k: int


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Table 6."""

    number: int
    tokens: int
    rows: tuple[Speed, ...]
    architectures: dict[str, Architecture]


@dataclasses.dataclass(frozen=True)
class Paper:
    """The published figures."""

    source: str
    tables: tuple[Benchmark, ...]
    efficiency: Efficiency

    def table(self, benchmark: str) -> Benchmark:
        return next(table for table in self.tables if table.benchmark == benchmark)


@dataclasses.dataclass(frozen=True)
class Ours:
    """Accuracies of one of our models on one benchmark: rows of a result by task, and their unweighted mean.

    `others`: number of tasks of the results under protocols that the tables leave out, by protocol.
    """

    name: str
    rows: Mapping[str, Mapping[str, Any]]
    others: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def average(self) -> float | None:
        """The mean in percent; None if a task is missing."""
        if set(self.rows) != set(TASKS):
            return None
        return 100 * sum(row["accuracy"] for row in self.rows.values()) / len(TASKS)


@functools.cache
def published() -> Paper:
    """The paper's figures, from the package."""
    path = resources.files("bimedix_jax") / "assets/paper/tables.toml"
    paper = files.validate(tomllib.loads(path.read_text("utf-8")), Paper, path.name, "install the package again")
    assert all(len(row.accuracies) == len(TASKS) for table in paper.tables for row in table.rows)
    return paper


def derived_english(paper: Paper) -> Published:
    """The English accuracies of the bilingual model: 2 x Table 3 - Table 4, since Table 3 is the mean of the two."""
    both, arabic = (
        next(row for row in paper.table(name).rows if row.model == "BiMediX (Bilingual)")
        for name in ("bilingual", "Arabic")
    )
    values = tuple(2 * b - a for b, a in zip(both.accuracies, arabic.accuracies, strict=True))
    return Published(DERIVED, values, sum(values) / len(values))


def by_benchmark(name: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Ours]:
    """Benchmark -> our row, from the results of one model in one or both languages.

    A model with all of a task's results in both languages also has a bilingual accuracy, the mean of the two as in the
    paper.

    Raises:
      BimedixError: two results have the same task in the same language.
    """
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    others: Counter[str] = Counter()
    for result in results:
        others.update(not_shown(result))
        for (benchmark, task), row in accuracies_of(result).items():
            if task in found.setdefault(benchmark, {}):
                raise BimedixError(f"two results of {name} have task {task} in {benchmark}; leave one of them out")
            found[benchmark][task] = row
    english, arabic = found.get("English", {}), found.get("Arabic", {})
    for task in [task for task in TASKS if task in english and task in arabic]:
        found.setdefault("bilingual", {})[task] = mean_of(english[task], arabic[task])
    return {
        benchmark: Ours(name, {task: rows[task] for task in TASKS if task in rows}, others)
        for benchmark in BENCHMARKS
        if (rows := found.get(benchmark, {}))
    }


def accuracies_of(result: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """(benchmark, task) -> accuracy with its interval, `note` and `protocol`.

    From a result of `bimedix eval run` or of the harness.

    Tasks of the harness are `bimedix_TASK_LANGUAGE`; their other protocols, whose names go on (`_text`, `_gen`), are
    not in the tables. The harness's own tasks, and those of `bimedix eval run`, are in English.
    """
    found = {}
    for key, row in result.get("tasks", {}).items():
        match = OURS.fullmatch(key)
        task, language = (match[1], match[2]) if match else (HARNESS.get(key, key), "en")
        if task in TASKS:
            note = note_of(row) if "paper_questions" in row else counted(task, row, result.get("limit"))
            found[CODES[language], task] = {**row, "note": note, "protocol": protocol_of(result, row)}
    return found


def counted(task: str, row: Mapping[str, Any], limit: int | None) -> str:
    """A note if a task of the harness has another number of questions than in the paper."""
    wanted, parts = TASKS[task].questions, []
    if row["n"] != wanted:
        first = "first " if limit is not None and row["n"] == limit else ""
        parts.append(f"{first}{row['n']:,} of the paper's {wanted:,} questions in {TASKS[task].label}")
    return "; ".join([*parts, *filter(None, [left_out(row)])])


def mean_of(english: Mapping[str, Any], arabic: Mapping[str, Any]) -> dict[str, Any]:
    """The mean of two accuracies on the same questions in two languages. It has no interval of its own."""
    notes = [note for note in (note_of(english), note_of(arabic)) if note]
    protocols = [row["protocol"] for row in (english, arabic)]
    both = protocols[0] if protocols[0] == protocols[1] else f"in English {protocols[0]}; in Arabic {protocols[1]}"
    return {
        "accuracy": (english["accuracy"] + arabic["accuracy"]) / 2,
        "n": english["n"] + arabic["n"],
        "note": "; ".join(dict.fromkeys(notes)),
        "protocol": both,
    }


def note_of(row: Mapping[str, Any]) -> str:
    """Why a figure is not comparable with the paper's; empty if it is."""
    if "note" in row:
        return row["note"]
    needed = {"limited", "available", "paper_questions", "too_long", "rejected"}
    return task_note(dict(row)) if needed <= set(row) else ""


def sheet(paper: Paper, benchmark: str, ours: Iterable[Ours]) -> Sheet:
    """One of Tables 3 to 5 with our rows, footnotes and all."""
    table, notes = paper.table(benchmark), list(paper.table(benchmark).notes)
    rows = [published_row(row, notes) for row in table.rows]
    if benchmark == "English":
        rows.append(published_row(derived_english(paper), notes))
    rows += [our_row(one, notes) for one in ours]
    if any(cell.low is not None for row in rows for cell in row):
        notes.append("In brackets: Wilson's 95 % interval.")
    return Sheet(
        name=f"table{table.number}",
        title=f"Table {table.number}: accuracy on the {benchmark} benchmark, %",
        columns=("model", *(task.label for task in TASKS.values()), "AVG"),
        rows=tuple(rows),
        notes=(*notes, f"Published rows: {paper.source}, {PROTOCOL} AVG is the unweighted mean of the nine tasks."),
    )


def published_row(row: Published, notes: list[str]) -> tuple[Cell, ...]:
    average = Cell(f"{row.average:.1f}", row.average)
    if abs(row.mean - row.average) > ROUNDING:
        notes.append(f"{row.model}: the paper prints {row.average:.1f}; the mean of its row is {row.mean:.1f}.")
        average = dataclasses.replace(average, note=len(notes))
    name = f"{row.model} ({row.cited})" if row.cited else row.model
    return Cell(name), *(Cell(f"{value:.1f}", value) for value in row.accuracies), average


def our_row(ours: Ours, notes: list[str]) -> tuple[Cell, ...]:
    """Our accuracies with their 95 % intervals. Footnotes say how they were measured, and what is not comparable."""
    protocols = list(dict.fromkeys(row["protocol"] for row in ours.rows.values()))
    shared = f"measured with {protocols[0]}" if len(protocols) == 1 else ""
    kinds = " and ".join(f"{count} by {kind}" for kind, count in ours.others.items())
    others = f"the tables leave out tasks under other protocols, {kinds}" if kinds else ""
    about = "; ".join(filter(None, [shared, others]))
    cells = [Cell(ours.name, note=noted(f"{ours.name}: ", about, notes), ours=True)]
    for task in TASKS:
        row = ours.rows.get(task)
        if row is None:
            cells.append(Cell("", ours=True))
            continue
        own = "; ".join(filter(None, ["" if shared else f"measured with {row['protocol']}", note_of(row)]))
        cells.append(our_cell(row, noted(f"{ours.name}: ", own, notes)))
    average = ours.average
    if average is None:
        missing = f"{len(ours.rows)} of {len(TASKS)} tasks, so there is no average"
        return *cells, Cell("", note=noted(f"{ours.name}: ", missing, notes), ours=True)
    return *cells, Cell(f"{average:.1f}", average, ours=True)


def our_cell(row: Mapping[str, Any], note: int | None) -> Cell:
    low, high = (100 * row[end] if end in row else None for end in ("low", "high"))
    return Cell(f"{100 * row['accuracy']:.1f}", 100 * row["accuracy"], note, ours=True, low=low, high=high)


def noted(prefix: str, note: str, notes: list[str]) -> int | None:
    """Number of a footnote, which is added unless it is there; None without one."""
    if not note:
        return None
    text = f"{prefix}{note}."
    if text not in notes:
        notes.append(text)
    return notes.index(text) + 1
