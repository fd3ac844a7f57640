"""What `bimedix eval compare` prints and writes: tables for the terminal, a page of Markdown, and CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from bimedix_jax.evals import statistics
from bimedix_jax.process.terminal import FittedTable

MARKDOWN, CSV, JSON, FIGURE = "comparison.md", "comparison.csv", "comparison.json", "comparison.png"
FIELDS = (
    *("table", "name", "n", "a", "a_low", "a_high", "b", "b_low", "b_high", "difference", "low", "high"),
    *("only_a", "only_b", "p", "p_bootstrap", "p_holm", "detectable"),
    "detectable_unrelated",
)
HEADS = ("n", "A %", "B %", "B - A", "95 % interval", "only A", "only B", "p", "p (Holm)", "detectable")
CAUTION = (
    "A difference whose interval contains 0 is not shown to exist, nor shown to be absent: compare `detectable`, the "
    "smallest difference that this test finds in four of five cases. Intervals are for other questions of the same "
    "kind, not for other training runs: another seed may change more."
)


def tables(found: Mapping[str, Any]) -> list[FittedTable]:
    """The tables for a terminal."""
    shown = [_table("Tasks", "task", found["tasks"], found["average"])]
    shown += [_table(f"By {kind}", kind, rows, None) for kind, rows in found["groups"].items() if rows]
    return [*shown, _models(found)]


def _table(title: str, first: str, rows: Sequence[Mapping[str, Any]], average: Mapping[str, Any] | None) -> FittedTable:
    table = FittedTable(title=title)
    table.add_column(first)
    for head in HEADS:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(row["name"], *cells(row))
    if average is not None and average["tasks"] > 1:
        table.add_section()
        table.add_row(f"mean of {average['tasks']} tasks", "", *cells(average)[1:])
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

    def add(name: str, part: str, shown: Any) -> None:
        values = [found[part].get(side) for side in ("a", "b")]
        if any(values):
            a, b = ("" if value is None else shown(value) for value in values)
            rows.append((name, a, b))

    tied = [str(found[side]["ties"]) for side in ("a", "b")]
    rows.append(("ties, which rounding decides", tied[0], tied[1]))
    add("calibration error, %", "calibration", lambda v: _with_interval(v, "ece"))
    add("the same by chance, %", "calibration", lambda v: f"{100 * v['ece_by_chance']:.1f}")
    add("same option in English and Arabic, %", "languages", lambda v: f"{100 * v['same_option']:.1f} of {v['n']:,}")
    add("kappa of English and Arabic", "languages", lambda v: f"{v['kappa']:.2f} ({v['low']:.2f} to {v['high']:.2f})")
    add(
        "Arabic minus English, points",
        "languages",
        lambda v: (
            f"{100 * v['arabic_minus_english']:+.1f} ({100 * v['arabic_minus_english_low']:+.1f} to "
            f"{100 * v['arabic_minus_english_high']:+.1f})"
        ),
    )
    for kind in ("orders", "wordings"):
        names = {
            name
            for side in ("a", "b")
            for name, parts in (found["sensitivity"].get(side) or {}).items()
            if kind in parts
        }
        for name in sorted(names):
            a, b = (_spread((found["sensitivity"].get(side) or {}).get(name, {}).get(kind)) for side in ("a", "b"))
            rows.append((f"{name}: lowest to highest over {kind}, %", a, b))
    return rows


def _spread(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{100 * value['lowest']:.1f} to {100 * value['highest']:.1f}, {100 * value['same']:.0f} % unchanged"


def _with_interval(value: Mapping[str, Any], name: str) -> str:
    return f"{100 * value[name]:.1f} ({100 * value['low']:.1f} to {100 * value['high']:.1f})"


def markdown(found: Mapping[str, Any]) -> str:
    """The page."""
    a, b = found["a"], found["b"]
    lines = [f"# {b['name']} (B) against {a['name']} (A)", ""]
    lines.append(f"{found['n']:,} questions that both answered. B - A is in percentage points.")
    only = [f"{one['questions_of_this_only']:,} only {side}" for side, one in (("A", a), ("B", b))]
    if any(one["questions_of_this_only"] for one in (a, b)):
        lines.append(f"Not compared: questions that {' and '.join(only)} answered.")
    if found["differs"]:
        lines += ["", f"**Compared although they differ:** {'; '.join(found['differs'])}."]
    lines += ["", CAUTION, "", *_markdown_table("task", found["tasks"], found["average"])]
    for kind, rows in found["groups"].items():
        if rows:
            lines += ["", f"## By {kind}", "", *_markdown_table(kind, rows, None)]
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


def _markdown_table(first: str, rows: Sequence[Mapping[str, Any]], average: Mapping[str, Any] | None) -> list[str]:
    body = [(row["name"], *cells(row)) for row in rows]
    if average is not None and average["tasks"] > 1:
        body.append((f"mean of {average['tasks']} tasks", *cells(average)))
    return _grid((first, *HEADS), body)


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"

    return [line(heads), "|" + "---|" * len(heads), *map(line, rows)]


def csv_text(found: Mapping[str, Any]) -> str:
    """All rows of all tables; shares, not percent."""
    written = io.StringIO()
    writer = csv.DictWriter(written, FIELDS, restval="", lineterminator="\n")
    writer.writeheader()
    parts = {"tasks": found["tasks"], **found["groups"]}
    for table, rows in parts.items():
        writer.writerows({"table": table, **row} for row in rows)
    average = {name: value for name, value in found["average"].items() if name != "tasks"}
    writer.writerow({"table": "average", "name": f"mean of {found['average']['tasks']} tasks", **average})
    return written.getvalue()


def sentence(found: Mapping[str, Any]) -> str:
    """What the tests over all tasks say, in one sentence."""
    clear = [row for row in found["tasks"] if row["p_holm"] < statistics.ALPHA]
    total = len(found["tasks"])
    if not clear:
        return f"No difference on any of {total} tasks is significant after adjustment for their number (Holm, 0.05)."
    named = ", ".join(f"{row['name']} ({100 * row['difference']:+.1f})" for row in clear)
    return f"Significant after adjustment for {total} tasks (Holm, 0.05): {named}."
