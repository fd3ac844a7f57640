"""`bimedix checkpoints prune`: removes damaged and older checkpoints of a run."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from bimedix_jax.errors import BimedixError, listed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Remove damaged checkpoints of a run, and all intact ones but the newest.

    Every file is compared with the manifest first. If no checkpoint is intact, none is removed.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run. It must not be training."""
    keep: int = 1
    """Number of intact checkpoints to keep, the newest ones."""
    dry_run: bool = False
    """Print what would be removed, and remove nothing."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise BimedixError(f"--keep must be at least 1, got {self.keep}.")


def run(config: Config, console: Console) -> dict[str, Any]:
    """Removes checkpoints. Raises BimedixError while a process trains in the folder."""
    from bimedix_jax.checkpoint.kept import prune, read_kept, to_prune
    from bimedix_jax.process import folders
    from bimedix_jax.training.run_folder import CHECKPOINTS

    def choose() -> tuple[list[int], list[Any]]:
        kept = read_kept(config.run / CHECKPOINTS, hashes=True)
        doomed = to_prune(kept, config.keep)
        return [one.step for one in kept if one not in doomed], doomed

    if config.dry_run:
        left, doomed = choose()
    else:
        read_kept(config.run / CHECKPOINTS, hashes=False)  # before a lock is created in a folder that is no run
        with folders.one_writer(config.run, "trains"):
            left, doomed = choose()
            prune(doomed)
    if not doomed:
        console.print(f"nothing to remove; intact: {listed([f'step {step}' for step in left])}", highlight=False)
    for one in doomed:
        why = f"damaged: {one.damage}" if one.damage else "older"
        console.print(f"step {one.step} {'would be' if config.dry_run else 'is'} removed ({why})", highlight=False)
    return {
        "folder": str(config.run),
        "kept": left,
        "removed": [dataclasses.asdict(one) for one in doomed],
        "bytes": sum(one.bytes for one in doomed),
        "dry_run": config.dry_run,
    }
