"""The table that `bimedix eval harness` prints; it is made from the result, so it needs neither model nor harness."""

from collections.abc import Mapping
from typing import Any

from bimedix_jax.process.terminal import FittedTable


def table(result: Mapping[str, Any]) -> FittedTable:
    """Accuracies of tasks with intervals, and the averages of groups, in percent."""
    found = FittedTable()
    found.add_column("task")
    found.add_column("metric")
    for column in ("accuracy %", "95 % interval", "questions", "flagged"):
        found.add_column(column, justify="right")
    found.add_prose_column("note")
    for name, task in result["tasks"].items():
        interval = f"{100 * task['low']:.1f} to {100 * task['high']:.1f}"
        flagged = f"{task['flagged_questions']:,}" if task["flagged_questions"] else ""
        accuracy = f"{100 * task['accuracy']:.1f}"
        found.add_row(name, task["primary"], accuracy, interval, f"{task['n']:,}", flagged, note_of(task))
    for name, group in result["groups"].items():
        for label, part in {name: group, **{f"{name} ({key})": one for key, one in by_language(group)}}.items():
            note = f"by size {100 * part['by_size']:.1f}; {part['tasks']} tasks"
            found.add_row(label, "average", f"{100 * part['mean']:.1f}", "", f"{part['n']:,}", "", note)
    return found


def by_language(group: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The averages of a group by language, if it has several."""
    return sorted(group.get("by_language", {}).items(), reverse=True)  # en, ar


def note_of(task: Mapping[str, Any]) -> str:
    """Which questions of a task were not asked; empty if all were."""
    notes = [f"first {task['n']:,} of {task['available']:,}"] if task["n"] < task["available"] else []
    excluded = task.get("excluded") or {}
    if excluded:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(excluded.items()))
        notes.append(f"{sum(excluded.values()):,} left out ({reasons})")
    return "; ".join(notes)
