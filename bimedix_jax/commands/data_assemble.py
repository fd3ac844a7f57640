"""`bimedix data assemble`: published data sets into one training and one held-out file of records."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console


@dataclass(frozen=True)
class Config:
    """Read data sets, check every row, split, keep evaluation out of training, and write records as JSONL.

    A source is NAME=PATH with a reader's name (medquad, mts_dialog, pubmedqa, medqa_usmle_en, medmcqa_en,
    mmlu_medical_en, mmlu_medical_en_dev, records), `sample` for the sample that ships with the package, or the path of
    a JSONL file of records.
    """

    sources: tuple[str, ...]
    """What to read, for instance `medquad=data/medquad sample`."""

    output: Path
    """Folder to write: train.jsonl, heldout.jsonl, quarantine.jsonl, report.json."""

    evaluation: tuple[str, ...] = ()
    """Sources that training must not overlap; only their held-out records count, and they are not written."""

    seed: int = 0
    """Decides, with the record's id, the split of records whose source has none."""

    heldout_fraction: float = 0.02
    """Share of such records that is held out."""

    limit: int | None = None
    """At most so many records of each source."""

    overwrite: bool = False
    """Replace the output folder if it exists."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Assemble and report."""
    from rich.table import Table

    from bimedix_jax import files
    from bimedix_jax.data.assemble import QUARANTINE, assemble

    with files.new_folder(config.output, config.overwrite) as folder:
        report = assemble(config.sources, folder, config.evaluation, config.seed, config.heldout_fraction, config.limit)
    table = Table("source", title=f"records in {config.output}")
    for name in ("train", "heldout"):
        table.add_column(name, justify="right")
    for source, row in report["records"].items():
        table.add_row(source, f"{row['train']:,}", f"{row['heldout']:,}")
    table.add_row("all", f"{report['train']:,}", f"{report['heldout']:,}", style="bold")
    console.print(table)
    if report["quarantined"]:
        where = config.output / QUARANTINE
        console.print(f"[bold yellow]{report['quarantined']:,} rows were left out[/], each with its reason in {where}:")
        for row in report["reasons"][:12]:
            console.print(f"  {row['rows']:,} of {row['source']}: {row['reason']}", highlight=False, markup=False)
    return {"output": str(config.output), **report}
