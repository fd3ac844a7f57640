"""The results of a study for a terminal and for JSON."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from bimedix_jax.process.terminal import FittedTable
from bimedix_jax.sweeps.report import CSV, HTML, MARKDOWN, described, shown
from bimedix_jax.sweeps.table import StudyTable


def arms_table(table: StudyTable) -> FittedTable:
    """A line for each arm: the primary metric and its difference to the baseline."""
    metric, baseline = table.primary.metric, table.primary.baseline
    found = FittedTable(title=f"{table.study} at size {table.size}: {described(metric)}")
    found.add_column("arm")
    for name in ("seeds", "trained parameters", "mean", f"difference to {baseline}"):
        found.add_column(name, justify="right")
    differences = {one.arm: shown(one.difference) for one in table.comparisons.get(metric, ())}
    for arm in table.arms:
        finished = table.of(arm)
        trained = f"{finished[0].cost['trainable_parameters']:,}" if finished else ""
        value = table.values.get(metric, {}).get(arm)
        mean = "" if value is None else f"{value[0]:.4f}"
        found.add_row(arm, str(len(finished)), trained, mean, differences.get(arm, ""))
    return found


def rows_of(table: StudyTable) -> list[dict[str, Any]]:
    """A flat object for each run."""
    return [
        {
            "arm": result.arm,
            "seed": result.seed,
            "state": result.state,
            "reason": result.reason,
            "identity": result.identity,
            "folder": str(result.folder),
            "steps": len(result.curve),
            "seconds": result.seconds,
            **result.cost,
            **result.metrics,
        }
        for result in table.results
    ]


def document(table: StudyTable, out: Path, elsewhere: Collection[str] = ()) -> dict[str, Any]:
    """The result of a sweep for JSON. `elsewhere` has the identities of runs that another process is running."""
    rows = [row | ({"state": "elsewhere"} if row["identity"] in elsewhere else {}) for row in rows_of(table)]
    return {
        "study": table.study,
        "size": table.size,
        "folder": str(out),
        "report": [str(out / name) for name in (MARKDOWN, CSV, HTML)],
        "rows": rows,
        "primary": table.primary.to_dict(),
    }
