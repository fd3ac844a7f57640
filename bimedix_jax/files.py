"""Writing folders and files so that a failure leaves nothing half-written, and reading only inside the named folder."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bimedix_jax.errors import BimedixError


@contextmanager
def new_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; rename it to `path` on success, remove it on any error or Ctrl-C.

    Readers therefore see either no folder or a complete one. Only a kill that Python cannot catch leaves the sibling
    behind, under a name that says so: `.<name>.<random>.partial`.

    Raises:
        BimedixError: `path` is a file, is not empty and `overwrite` is False, or holds the working directory (replacing
            that is never what was meant).
    """
    target = Path(path).resolve()  # a symlink to a folder keeps pointing there; its contents are replaced
    check_replaceable(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _sibling(target, "partial")
        partial.mkdir()
    except OSError as error:
        raise BimedixError(f"cannot create {target} ({error.strerror}); name a folder that can be written") from error
    try:
        yield partial
        check_replaceable(target, overwrite)  # long work lies in between: someone else may have written there
        _replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone after a success; here only what failed is left


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8, newlines as given) so that a reader sees the old file or the new one, never a part."""
    target = Path(path).resolve()
    partial = _sibling(target, "partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def inside(folder: str | os.PathLike[str], name: str) -> Path:
    """`folder / name`, checked to stay inside `folder`. `name` comes from a file we did not write, an index for one.

    A symlink may leave the folder only as the Hugging Face hub cache does it: `snapshots/<revision>/name` points to a
    file in `blobs/` beside `snapshots/`. The file itself need not exist.

    Raises:
        BimedixError: `name` is absolute, climbs with `..`, holds a backslash or a NUL, or a symlink leads elsewhere.
    """
    root = Path(folder)
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        raise BimedixError(f"{root} refers to {name!r}, which is not a path inside that folder; do not trust its files")
    real_root, real = root.resolve(), (root / name).resolve()
    allowed = [real_root]
    if real_root.parent.name == "snapshots":
        allowed.append(real_root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise BimedixError(f"{root / name} is a link to {real}, outside its folder; put a copy there instead")
    return root / name


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sibling(target: Path, suffix: str) -> Path:
    """A fresh name beside `target`: the same file system, so that a rename is atomic."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{suffix}")


def check_replaceable(path: str | os.PathLike[str], overwrite: bool) -> None:
    """What `new_folder` checks, for callers with long work before they write.

    Raises:
        BimedixError: as `new_folder`.
    """
    target = Path(path).resolve()
    if Path.cwd().is_relative_to(target):
        raise BimedixError(f"{target} holds the working directory; name a new folder")
    if not target.exists():
        return
    if not target.is_dir():
        raise BimedixError(f"{target} is a file; name a folder")
    if not overwrite and any(target.iterdir()):
        raise BimedixError(f"{target} exists and is not empty; name another folder or pass --overwrite")


def _replace(partial: Path, target: Path) -> None:
    """Put `partial` in the place of `target`. An old folder is moved aside first and back if the move in fails."""
    if not target.exists():
        partial.rename(target)
        return
    old = _sibling(target, "old")
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)
