"""`bimedix routes export`: write a recording of routes in the format of another program."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Write a recording of routes as one file that other programs read. docs/formats.md describes the formats."""

    recording: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="R")]
    """Folder that `bimedix routes record` or `bimedix routes import` wrote."""
    format: Literal["jsonl", "olmoe", "counts", "vllm"]
    """jsonl: a record a line. olmoe: lines of OLMoE's analysis. counts: CSV of counts by token id. vllm: responses with
    routed_experts."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """File to write; counts with the ending .gz are compressed."""
    overwrite: bool = False
    """Replace --out if it exists."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Exports, prints what was written, and returns it.

    Raises:
      BimedixError: there is no such recording, or it lacks what the format needs.
    """
    from bimedix_jax.files import check_file
    from bimedix_jax.routing.formats.exports import export_routes, is_export
    from bimedix_jax.routing.recording import Recording

    recording = Recording.open(config.recording)
    check_file(config.out, config.overwrite, is_ours=is_export)
    lines = export_routes(recording, config.format, config.out)
    console.print(f"{config.out}: {lines:,} lines of {config.format}", highlight=False)
    return {"output": str(config.out), "format": config.format, "lines": lines}
