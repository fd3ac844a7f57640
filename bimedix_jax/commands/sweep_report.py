"""`bimedix sweep report`: tables, curves and tests of the studies in a folder."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Write the report of a sweep again, from metrics.jsonl and evaluation files alone.

    report.md, report.csv and report.html have the paired differences to the baseline over seeds, by language and kind,
    the declared contrasts with exact tests, and the curves. timings.md and timings.csv have wall time and crashes.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of the sweep, which `bimedix sweep --out` wrote."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Writes the files and prints the primary contrasts."""
    from bimedix_jax.sweeps.page import arms_table, rows_of
    from bimedix_jax.sweeps.report import CSV, HTML, MARKDOWN, TIMINGS, primary_sentence, write_report

    tables = write_report(config.folder)
    for table in tables:
        console.print(arms_table(table))
        console.print(primary_sentence(table).replace("**", ""), highlight=False)
    names = (MARKDOWN, CSV, HTML, TIMINGS)
    console.print(f"written: {', '.join(str(config.folder / name) for name in names)}", highlight=False)
    return {
        "folder": str(config.folder),
        "files": [str(config.folder / name) for name in names],
        "studies": [
            {"study": table.study, "size": table.size, "primary": table.primary.to_dict(), "rows": rows_of(table)}
            for table in tables
        ],
    }
