"""What `bimedix eval compare` prints and writes: tables for the terminal, a page of Markdown, and CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from bimedix_jax.evals import statistics
from bimedix_jax.process.terminal import FittedTable

MARKDOWN, CSV, JSON, FIGURE = "comparison.md", "comparison.csv", "comparison.json", "comparison.png"
FIELDS = (
    *("table", "protocol", "name", "n", "a", "a_low", "a_high", "b", "b_low", "b_high", "difference", "low", "high"),
    *("only_a", "only_b", "p", "p_bootstrap", "p_holm", "detectable"),
    "detectable_unrelated",
)
HEADS = ("n", "A %", "B %", "B - A", "95 % interval", "only A", "only B", "p", "p (Holm)", "detectable")
CAUTION = (
    "A difference whose interval contains 0 is not shown to exist, nor shown to be absent: compare `detectable`, the "
    "smallest difference that this test finds in four of five cases (`none`: even if all questions on which the models "
    "disagree here spoke for one of them, it would be found less often). Where the interval excludes 0 and p is above "
    "0.05, or the reverse, p decides: its test is exact, and the interval is approximate. Intervals are for other "
    "questions of the same kind, not for other training runs: another seed may change more."
)
"""Stands under the tables."""


def tables(found: Mapping[str, Any]) -> list[FittedTable]:
    """The tables for a terminal."""
    shown = [_table("Tasks", "task", found["tasks"], means(found))]
    shown += [_table(title, kind, rows, []) for title, kind, rows in groups(found)]
    return [*shown, _models(found)]


def parts(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What there is for each protocol: its name, average, calibration and agreement of languages."""
    return [found, *found["other_protocols"]]


def means(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The mean of each protocol with several tasks, and its name."""
    named = [(part["protocol"], part["average"]) for part in parts(found)]
    return [(f"mean of {average['tasks']} tasks ({name})", average) for name, average in named if average["tasks"] > 1]


def groups(found: Mapping[str, Any]) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    """(title, kind, rows) of the tables of groups: one for each protocol, since protocols ask the same questions."""
    shown = []
    for kind, rows in found["groups"].items():
        for name in dict.fromkeys(row["protocol"] for row in rows):
            own = [row for row in rows if row["protocol"] == name]
            shown.append((f"By {kind} ({name})", kind, own))
    return shown


def _table(
    title: str, first: str, rows: Sequence[Mapping[str, Any]], averages: Sequence[tuple[str, Mapping[str, Any]]]
) -> FittedTable:
    table = FittedTable(title=title)
    table.add_column(first)
    for head in HEADS:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(row["name"], *cells(row))
    if averages:
        table.add_section()
    for name, average in averages:
        table.add_row(name, *cells(average))
    return table


def cells(row: Mapping[str, Any]) -> list[str]:
    """The values of a row under HEADS, in percent and percentage points; empty where the row has none."""
    counts = ("n", "only_a", "only_b")
    n, only_a, only_b = (f"{row[name]:,}" if name in row else "" for name in counts)
    smallest = row.get("detectable")
    return [
        n,
        f"{100 * row['a']:.1f}",
        f"{100 * row['b']:.1f}",
        f"{100 * row['difference']:+.1f}",
        f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
        only_a,
        only_b,
        probability(row.get("p")),
        probability(row.get("p_holm")),
        ("none" if smallest is None else f"{100 * smallest:.1f}") if "detectable" in row else "",
    ]


def probability(p: float | None) -> str:
    """A p value with two digits, or as a bound."""
    if p is None:
        return ""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _models(found: Mapping[str, Any]) -> FittedTable:
    table = FittedTable(title="Each model")
    for head in ("measure", "A", "B"):
        table.add_column(head, justify="left" if head == "measure" else "right")
    for row in model_rows(found):
        table.add_row(*row)
    return table


def model_rows(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Calibration, agreement between languages and sensitivity of both models, where they were measured."""
    rows: list[tuple[str, str, str]] = []
    tied = [str(found[side]["ties"]) for side in ("a", "b")]
    rows.append(("ties, which rounding decides", tied[0], tied[1]))
    for part in parts(found):
        own = _rows_of_protocol(part)
        rows += [(f"{name} ({part['protocol']})" if found["other_protocols"] else name, a, b) for name, a, b in own]
    for kind in ("orders", "wordings"):
        names = {
            name
            for side in ("a", "b")
            for name, kinds in (found["sensitivity"].get(side) or {}).items()
            if kind in kinds
        }
        for name in sorted(names):
            a, b = (_spread((found["sensitivity"].get(side) or {}).get(name, {}).get(kind)) for side in ("a", "b"))
            rows.append((f"{name}: lowest to highest over {kind}, %", a, b))
    return rows


def _rows_of_protocol(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []

    def add(name: str, part: str, shown: Any) -> None:
        values = [found[part].get(side) for side in ("a", "b")]
        if any(values):
            a, b = ("" if value is None else shown(value) for value in values)
            rows.append((name, a, b))

    def gap(value: Mapping[str, Any]) -> str:
        low, high = (value[f"arabic_minus_english_{end}"] for end in ("low", "high"))
        return f"{100 * value['arabic_minus_english']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"

    add("calibration error, %", "calibration", lambda v: _with_interval(v, "ece", 100, 1))
    add("the same by chance, %", "calibration", lambda v: f"{100 * v['ece_by_chance']:.1f}")
    add("same option in English and Arabic, %", "languages", lambda v: f"{100 * v['same_option']:.1f} of {v['n']:,}")
    add("kappa of English and Arabic", "languages", lambda v: _with_interval(v, "kappa", 1, 2))
    add("Arabic minus English, points", "languages", gap)
    return rows


def _spread(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{100 * value['lowest']:.1f} to {100 * value['highest']:.1f}, {100 * value['same']:.0f} % unchanged"


def _with_interval(value: Mapping[str, Any], name: str, scale: int, digits: int) -> str:
    """A value with its interval, or with "-" where there are too few questions for one."""
    ends = [value[end] for end in ("low", "high")]
    shown = "-" if None in ends else " to ".join(f"{scale * end:.{digits}f}" for end in ends)
    return f"{scale * value[name]:.{digits}f} ({shown})"


def markdown(found: Mapping[str, Any]) -> str:
    """The page."""
    a, b = found["a"], found["b"]
    lines = [f"# {b['name']} (B) against {a['name']} (A)", ""]
    lines.append(f"{found['n']:,} questions that both answered. B - A is in percentage points.")
    if found["other_protocols"]:
        names = ", ".join(part["protocol"] for part in parts(found))
        lines.append(f"A question counts once under each protocol ({names}); protocols are not pooled.")
    only = [f"{one['questions_of_this_only']:,} only {side}" for side, one in (("A", a), ("B", b))]
    if any(one["questions_of_this_only"] for one in (a, b)):
        lines.append(f"Not compared: questions that {' and '.join(only)} answered.")
    if found["differs"]:
        lines += ["", f"**Compared although they differ:** {'; '.join(found['differs'])}."]
    lines += ["", CAUTION, "", *_markdown_table("task", found["tasks"], means(found))]
    for title, kind, rows in groups(found):
        lines += ["", f"## {title}", "", *_markdown_table(kind, rows, [])]
    lines += ["", "## Each model", "", *_grid(("measure", "A", "B"), model_rows(found))]
    lines += ["", f"![differences and calibration]({FIGURE})", "", "## What was compared", ""]
    facts = ("model", "adapter", "base", "dtype", "router", "harness", "versions", "hashes", "records")
    lines += _grid(("", "A", "B"), [(name, *(_plain(one.get(name)) for one in (a, b))) for name in facts])
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text


def _markdown_table(
    first: str, rows: Sequence[Mapping[str, Any]], averages: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[str]:
    named = [*((row["name"], row) for row in rows), *averages]
    return _grid((first, *HEADS), [(name, *cells(row)) for name, row in named])


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"

    return [line(heads), "|" + "---|" * len(heads), *map(line, rows)]


def csv_text(found: Mapping[str, Any]) -> str:
    """All rows of all tables; shares, not percent."""
    written = io.StringIO()
    writer = csv.DictWriter(written, FIELDS, restval="", lineterminator="\n")
    writer.writeheader()
    for table, rows in {"tasks": found["tasks"], **found["groups"]}.items():
        writer.writerows({"table": table, **row} for row in rows)
    for part in parts(found):
        average = {name: value for name, value in part["average"].items() if name != "tasks"}
        name = f"mean of {part['average']['tasks']} tasks"
        writer.writerow({"table": "average", "protocol": part["protocol"], "name": name, **average})
    return written.getvalue()


def sentence(found: Mapping[str, Any]) -> str:
    """What the tests over all tasks say, in one sentence."""
    clear = [row for row in found["tasks"] if row["p_holm"] < statistics.ALPHA]
    total = len(found["tasks"])
    if not clear:
        return f"No difference on any of {total} tasks is significant after adjustment for their number (Holm, 0.05)."
    named = ", ".join(f"{row['name']} ({100 * row['difference']:+.1f})" for row in clear)
    return f"Significant after adjustment for {total} tasks (Holm, 0.05): {named}."
