"""`bimedix track upload`: make the runs of a folder again in Weights & Biases."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Make the mirror of a run, or of every run of a sweep, again from metrics.jsonl and the evaluation.

    A run has the same id each time, so that an earlier mirror of it is replaced. Numbers, pictures of numbers and the
    configuration are uploaded, and no text of a record.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of a run or of a sweep."""
    offline: bool = False
    """Write local files only, into the folder of each run; `wandb sync` uploads them."""
    project: str | None = None
    """Project in Weights & Biases; by default that of the run."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Uploads, or writes the local files."""
    from bimedix_jax.sweeps.upload import upload

    mode = "offline" if config.offline else "online"
    runs = upload(config.folder, mode, config.project, lambda line: console.print(line, highlight=False))
    return {"folder": str(config.folder), "mode": mode, "runs": runs}
