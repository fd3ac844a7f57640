"""`bimedix checkpoints verify`: compares the checkpoints of a run with their manifests."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from bimedix_jax.errors import BimedixError, listed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compare every file of a run's checkpoints with its SHA-256 in the manifest.

    The exit code is 1 if one is damaged. `bimedix train --resume` skips damaged checkpoints, and `bimedix checkpoints
    prune` removes them.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Reads every file and prints a line for each checkpoint. Raises BimedixError if one is damaged."""
    from bimedix_jax.checkpoint.kept import read_kept
    from bimedix_jax.training.run_folder import CHECKPOINTS

    kept = read_kept(config.run / CHECKPOINTS, hashes=True)
    for one in kept:
        console.print(f"step {one.step}  {f'damaged: {one.damage}' if one.damage else 'intact'}", highlight=False)
    result = {"folder": str(config.run), "checkpoints": [dataclasses.asdict(one) for one in kept]}
    damaged, intact = ([one.step for one in kept if bool(one.damage) == wanted] for wanted in (True, False))
    if damaged:
        usable = f"resume from step {intact[-1]} with --resume, or restore" if intact else "none is intact; restore"
        raise BimedixError(
            f"{len(damaged)} of {len(kept)} checkpoints in {config.run} {'are' if len(damaged) > 1 else 'is'} damaged "
            f"({listed([f'step {step}' for step in damaged])}); {usable} the files from a copy.",
            document=result,
        )
    return result
