"""`bimedix checkpoints list`: the checkpoints of a run."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """List the checkpoints of a run with step, size and time.

    Names and sizes of the files are compared with the manifest. `bimedix checkpoints verify` also reads them.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Prints a table."""
    from bimedix_jax.checkpoint.kept import read_kept
    from bimedix_jax.training.run_folder import CHECKPOINTS

    kept = read_kept(config.run / CHECKPOINTS, hashes=False)
    for one in kept:
        state = f"damaged: {one.damage}" if one.damage else "complete"
        console.print(f"step {one.step}  {one.bytes / 1e6:,.1f} MB  {one.saved}  {state}", highlight=False)
    return {"folder": str(config.run), "checkpoints": [dataclasses.asdict(one) for one in kept]}
