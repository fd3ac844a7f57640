"""The folder of a quickstart: it has one writer, and a run that fails before anything is made leaves none."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bimedix_jax import files
from bimedix_jax.errors import BimedixError
from bimedix_jax.process import folders

SETTINGS = "settings.json"


@contextmanager
def run_folder(folder: Path, settings: dict[str, Any], resume: bool) -> Iterator[None]:
    """Holds the folder of the run, and writes the settings of a new one. An error before anything is made removes it.

    Raises:
      BimedixError: the folder is in use, cannot be written, or belongs to something else.
    """
    check_folder(folder, resume)
    with ExitStack() as stack:
        try:
            stack.enter_context(folders.made_parents(folder))
            stack.enter_context(folders.one_writer(folder, "runs the quickstart"))
            check_folder(folder, resume)
            if not resume:
                write_json(folder / SETTINGS, settings)
        except OSError as error:
            raise BimedixError(f"cannot write to {folder} ({error.strerror}); name another with --out") from error
        try:
            yield
        except Exception:
            if {path.name for path in folder.iterdir()} <= {SETTINGS, folders.LOCK, "dense"}:
                (folder / SETTINGS).unlink(missing_ok=True)
                shutil.rmtree(folder / "dense", ignore_errors=True)
            raise


def check_folder(folder: Path, resume: bool) -> None:
    if resume or not folder.exists():
        return
    if folder.is_file() or any(path.name != folders.LOCK for path in folder.iterdir()):
        raise BimedixError(f"{folder} exists already; resume it with --resume, or name another folder with --out")


def write_json(path: Path, value: Any) -> None:
    files.write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")
