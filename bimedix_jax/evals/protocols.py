"""How accuracies of our rows in the paper's tables were measured, for their footnotes."""

import re
from collections.abc import Mapping
from typing import Any

OURS = re.compile(r"bimedix_(\w+)_(en|ar)")
"""A task of the harness that the tables show: by letter."""
OTHERS = re.compile(r"bimedix_\w+_(?:en|ar)_(abjad|text|gen)")
NAMES = {"abjad": "Arabic letters", "text": "the options' texts", "gen": "generated answers"}
"""Ending of a task's name -> how it asks."""


def protocol_of(result: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The protocol of a task's row in a result of `bimedix eval run` or of the harness."""
    if "paper_questions" in row:
        template = result.get("template")
        found = ["bimedix eval run", f"in the chat template {template}" if template else "in the chat template"]
        found.append("by letter or, where options have none, by the option's text")
    else:
        found = ["lm-evaluation-harness"]
        found += ["in the chat template"] if result.get("chat") else []
        found.append("by letter (PubMedQA: by yes, no, maybe)")
        if row.get("primary") not in (None, "acc"):
            found.append(f"metric {row['primary']}")
    shots = row.get("num_fewshot") or 0
    found.append("without solved examples" if not shots else f"with {shots} solved example{'s' if shots > 1 else ''}")
    if result.get("intervene"):
        found.append("with rules for the routers")
    return ", ".join(found)


def left_out(row: Mapping[str, Any]) -> str:
    """The questions of a task of the harness that were not asked, by reason; empty if there are none."""
    excluded = {reason: count for reason, count in (row.get("excluded") or {}).items() if count}
    if not excluded:
        return ""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(excluded.items()))
    return f"{sum(excluded.values()):,} questions left out ({reasons})"


def not_shown(result: Mapping[str, Any]) -> dict[str, int]:
    """Number of tasks that the tables leave out, by how they ask."""
    found: dict[str, int] = {}
    for name in result.get("tasks") or {}:
        match = OTHERS.fullmatch(name)
        if match is not None:
            found[NAMES[match[1]]] = found.get(NAMES[match[1]], 0) + 1
    return found
