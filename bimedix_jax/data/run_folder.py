"""What the config.json of a training run says about its model, read without the model."""

from pathlib import Path
from typing import Any

from bimedix_jax.files import peek_json


def is_run(folder: str | Path) -> bool:
    """Whether `bimedix train` wrote this folder."""
    return "optimiser" in peek_json(Path(folder, "config.json"))


def base_of(run: str | Path) -> str | dict[str, Any] | None:
    """The base of a training run: a folder or hub id, or the sizes of one that was initialised at random."""
    model = peek_json(Path(run, "config.json")).get("model")
    model = model if isinstance(model, dict) else {}
    path, sizes = model.get("path"), model.get("random")
    return path if isinstance(path, str) else sizes if isinstance(sizes, dict) else None
