"""Tables of results for a terminal, of one run or of two side by side.

They are made from the dicts in the JSON result files, so no model is needed to show an old result.
"""

from typing import Any

from rich.console import Console

from bimedix_jax.process.terminal import FittedTable

FEWEST = 5
"""Groups with fewer questions have no line in a table, since their accuracy means little. The JSON has all groups."""


def loss_table(result: dict[str, Any], before: dict[str, Any] | None = None) -> FittedTable:
    """Held-out loss by group (`HeldoutLoss.to_dict`); with `before`, old value, new value and change."""
    table = FittedTable(
        title="Held-out loss" + ("" if before is None else ": before -> after"),
        caption=_left_out("record", result["too_long"]),
    )
    table.add_column("group")
    for column in ("nats/token", "bits/byte", "tokens", "bytes", "records"):
        table.add_column(column, justify="right")
    for group, loss in result["nats_per_token"].items():
        bits = result["bits_per_byte"][group]
        cells = [
            _change(loss, None if before is None else before["nats_per_token"].get(group)),
            _change(bits, None if before is None else before["bits_per_byte"].get(group)),
        ]
        table.add_row(group, *cells, *(f"{result[key][group]:,}" for key in ("tokens", "text_bytes", "records")))
    return table


def accuracy_table(result: dict[str, Any], before: dict[str, Any] | None = None) -> FittedTable:
    """Multiple-choice accuracy by group (`MultipleChoice.to_dict`), in percent; with `before`, old, new and change."""
    small = sum(score["n"] < FEWEST for score in result["by_group"].values())
    notes = [_left_out("question", result["too_long"])]
    notes.append(f"{small} groups of fewer than {FEWEST} questions are not shown." if small else None)
    table = FittedTable(
        title="Multiple choice" + ("" if before is None else ": before -> after"),
        caption=" ".join(note for note in notes if note) or None,
    )
    table.add_column("group")
    for column in ("accuracy %", "95 % interval", "by text %", "chance %", "n"):
        table.add_column(column, justify="right")
    for group, score in result["by_group"].items():
        if score["n"] < FEWEST:
            continue
        old = None if before is None else before["by_group"].get(group)
        old_text = None if before is None else before["by_group_text"].get(group)
        table.add_row(
            group,
            _percent(score, old),
            _interval(score),
            _percent(result["by_group_text"][group], old_text),
            f"{100 * result['chance'][group]:.1f}",
            f"{score['n']:,}",
        )
    return table


def task_table(
    results: dict[str, dict[str, Any]], mean: float | None, before: dict[str, dict[str, Any]] | None = None
) -> FittedTable:
    """Tasks (`TaskResult.to_dict` by name), in percent, with the paper's AVG if all nine are there. What concerns the
    paper is left out if none of its tasks is there."""
    paper = sum(row["paper_questions"] is not None for row in results.values())
    caption = f"{paper} of 9 tasks, so there is no average." if paper else None
    if mean is not None:
        caption = "AVG is the unweighted mean of the nine tasks, as in the paper."
    table = FittedTable(title="Benchmarks" + ("" if before is None else ": before -> after"), caption=caption)
    table.add_column("task")
    columns = ("accuracy %", "95 % interval", "by text %", "chance %", "n", *(["of the paper's"] if paper else ()))
    for column in columns:
        table.add_column(column, justify="right")
    table.add_prose_column("note")
    for name, row in results.items():
        old = (before or {}).get(name)
        table.add_row(
            name,
            _percent(row, old),
            _interval(row),
            _percent(row["by_text"], None if old is None else old["by_text"]),
            f"{100 * row['chance']:.1f}",
            f"{row['n']:,}",
            *(["" if row["paper_questions"] is None else f"{row['paper_questions']:,}"] if paper else ()),
            task_note(row),
        )
    if mean is not None:
        table.add_section()
        table.add_row("AVG", f"{100 * mean:.1f}")
    return table


def sensitivity_table(result: dict[str, dict[str, Any]]) -> FittedTable:
    """Accuracies in other forms of the same questions (`variants.sensitivity` by set), in percent."""
    table = FittedTable(title="Other orders of the options and other wordings")
    table.add_column("set")
    for column in ("form", "as it is %", "lowest %", "highest %", "sd", "same answer in all %", "n"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for name, kinds in result.items():
        for kind, row in kinds.items():
            shares = (row["accuracies"][0], row["lowest"], row["highest"], row["sd"], row["same"])
            table.add_row(name, kind, *(f"{100 * share:.1f}" for share in shares), f"{row['n']:,}")
    return table


def contamination_table(result: dict[str, Any]) -> FittedTable:
    """Accuracy on questions that the training set contains and on the others, in percent."""
    table = FittedTable(title=f"Questions in {result['file']}")
    table.add_column("set")
    for column in ("in it", "by id", "by question", "by words", "accuracy on them %", "others", "accuracy %"):
        table.add_column(column, justify="right")
    for name, row in result["sets"].items():
        seen, others = row["seen"], row["others"]
        shown = ["" if "accuracy" not in one else f"{100 * one['accuracy']:.1f}" for one in (seen, others)]
        ways = (f"{row['by'][way]:,}" for way in ("id", "question", "words"))
        table.add_row(name, f"{seen['n']:,}", *ways, shown[0], f"{others['n']:,}", shown[1])
    return table


def task_note(row: dict[str, Any]) -> str:
    """Why a task's number is not comparable with the paper's; empty if it is."""
    notes = []
    if row["limited"]:
        notes.append(f"first {row['n'] + row['too_long']} of {row['available']}")
    elif row["paper_questions"] not in (None, row["available"]):
        notes.append("questions differ from the paper's")
    if row["too_long"]:
        notes.append(f"{row['too_long']} too long, not scored")
    if row["rejected"]:
        notes.append(f"{row['rejected']} invalid rows in the files")
    return "; ".join(notes)


def print_left_out(console: Console, sequences: Any) -> None:
    """Prints how many records did not fit."""
    if (note := _left_out("record", dict(sequences.too_long))) is not None:
        console.print(note)


def _left_out(what: str, too_long: dict[str, int]) -> str | None:
    count = sum(number for group, number in too_long.items() if "/" not in group)
    return f"{count} {what}s exceed the maximum length and were not scored." if count else None


def _change(value: float, before: float | None) -> str:
    return f"{value:.4f}" if before is None else f"{before:.4f} -> {value:.4f} ({value - before:+.4f})"


def _percent(score: dict[str, Any], before: dict[str, Any] | None) -> str:
    value = 100 * score["accuracy"]
    if before is None:
        return f"{value:.1f}"
    return f"{100 * before['accuracy']:.1f} -> {value:.1f} ({value - 100 * before['accuracy']:+.1f})"


def _interval(score: dict[str, Any]) -> str:
    return f"{100 * score['low']:.1f} - {100 * score['high']:.1f}"
