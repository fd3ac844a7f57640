"""Tables of open answers for a terminal, of one run or of two side by side; made from the dicts in result files."""

from typing import Any

from bimedix_jax.process.terminal import FittedTable


def tables_of(result: dict[str, Any], before: dict[str, Any]) -> list[FittedTable]:
    """The tables of a result's part `open`."""
    found = []
    if "answers" in result:
        found.append(answers_table(result["answers"], before.get("answers")))
    if "behaviour" in result:
        found.append(behaviour_table(result["behaviour"], before.get("behaviour")))
    if "judge" in result:
        found.append(judge_table(result["judge"]))
    return found


def answers_table(result: dict[str, Any], before: dict[str, Any] | None) -> FittedTable:
    """Scores of generated answers by group."""
    old = {} if before is None else before["by_group"]
    longest = result["max_new_tokens"]
    table = _table(
        "Open answers" + ("" if before is None else ": before -> after"),
        "group",
        *("chrF", "ROUGE-L", "95 % interval", "in the language %", f"ended by {longest} tokens %", "answers"),
    )
    for group, row in result["by_group"].items():
        earlier, rouge = old.get(group, {}), row.get("rouge_l", {})
        table.add_row(
            group,
            _change(row.get("chrf"), earlier.get("chrf")),
            _change(rouge.get("mean"), earlier.get("rouge_l", {}).get("mean")),
            _ends(rouge),
            _percent(row["in_language"], earlier.get("in_language")),
            f"{100 * row['finished']:.0f}",
            f"{row['n']:,}",
        )
    return table


def behaviour_table(result: dict[str, Any], before: dict[str, Any] | None) -> FittedTable:
    """Share of passed items by language and category."""
    old = {} if before is None else before["by_group"]
    title = "Behaviour" + ("" if before is None else ": before -> after")
    table = _table(title, "group", "passed %", "95 % interval", "in the language %", "items")
    table.caption = result["limits"] + "."
    for group, row in result["by_group"].items():
        passed, earlier = row["passed"], old.get(group, {})
        table.add_row(
            group,
            _percent(passed, earlier.get("passed")),
            f"{100 * passed['low']:.0f} - {100 * passed['high']:.0f}",
            _percent(row["in_language"], earlier.get("in_language")),
            f"{passed['n']}",
        )
    return table


def judge_table(result: dict[str, Any]) -> FittedTable:
    """Wins, ties and losses by language."""
    columns = ("wins", "ties", "losses", "score", "contradictory")
    table = _table(f"{result['judge']} on the answers, against {result['against']}", "group", *columns, "A first %")
    table.caption = "Each pair is judged in both orders; only agreeing verdicts are wins or losses. " + (
        f"{result['unreadable']} verdicts could not be read." if result["unreadable"] else ""
    )
    for group, row in result["by_group"].items():
        shown = [f"{row[name]:.3f}" if name == "score" else f"{row[name]:,}" for name in columns]
        first = row["first_position"]
        table.add_row(group, *shown, "" if first is None else f"{100 * first:.0f}")
    return table


def _table(title: str, first: str, *columns: str) -> FittedTable:
    table = FittedTable(title=title)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _change(value: float | None, before: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if before is None else f"{before:.1f} -> {value:.1f}"


def _ends(score: dict[str, Any]) -> str:
    """An interval; "-" if there are too few records for one."""
    if not score:
        return ""
    return "-" if score["low"] is None else f"{score['low']:.1f} - {score['high']:.1f}"


def _percent(score: dict[str, Any], before: dict[str, Any] | None) -> str:
    value = f"{100 * score['accuracy']:.0f}"
    return value if before is None else f"{100 * before['accuracy']:.0f} -> {value}"
