"""Files and folders: written completely or not at all, and JSON that is checked against a schema when it is read."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bimedix_jax.errors import BimedixError, listed

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

T = TypeVar("T")
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
"""How pydantic calls the error of an unknown key, in a model and in a dataclass."""


@contextmanager
def new_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; rename it to `path` on success, remove it on any error or Ctrl-C.

    Readers therefore see either no folder or a complete one. Only a kill that Python cannot catch leaves the sibling
    behind; its name is `.<name>.<random>.partial`.

    Raises:
        BimedixError: `path` is a file, is not empty and `overwrite` is False, or contains the working directory.
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
        check_replaceable(target, overwrite)  # another process may have written there in the meantime
        _replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # exists only after a failure; a success has renamed it


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
    """`folder / name`, checked to stay inside `folder`. For names that we did not write, such as those in an index.

    A symlink may leave the folder only as the Hugging Face hub cache does it: `snapshots/<revision>/name` points to a
    file in `blobs/` beside `snapshots/`. The file itself need not exist.

    Raises:
        BimedixError: `name` is absolute, contains `..`, a backslash or a NUL, or a symlink leads elsewhere.
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
        raise BimedixError(f"{root / name} is a link to {real}, outside its folder; replace the link with a copy")
    return root / name


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sibling(target: Path, suffix: str) -> Path:
    """An unused name in the folder of `target`: on the same file system a rename is atomic."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{suffix}")


def check_replaceable(path: str | os.PathLike[str], overwrite: bool) -> None:
    """The checks of `new_folder`, for callers that work for a long time before they write.

    Raises:
        BimedixError: as `new_folder`.
    """
    target = Path(path).resolve()
    if Path.cwd().is_relative_to(target):
        raise BimedixError(f"{target} contains the working directory; name a new folder")
    if not target.exists():
        return
    if not target.is_dir():
        raise BimedixError(f"{target} is a file; name a folder")
    if not overwrite and any(target.iterdir()):
        raise BimedixError(f"{target} exists and is not empty; name another folder or pass --overwrite")


def _replace(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`. An old folder is renamed first, and renamed back if that fails."""
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


def read_json(path: str | os.PathLike[str], schema: type[T], remedy: str, unique_keys: bool = False) -> T:
    """Reads a JSON file and checks it against `schema`.

    Args:
        schema: anything that pydantic can check: a model, a dataclass, a `dict[str, Any]`. A model with
            `extra="forbid"` refuses unknown keys.
        remedy: what the user can do; every error message ends with it. `{key}` is replaced by the first wrong key.
        unique_keys: refuse an object that has the same key twice.

    Raises:
        BimedixError: the file cannot be read, is not JSON, or does not fit the schema. The message names file and key.
    """
    try:
        text = Path(path).read_text("utf-8")
        value = json.loads(text, object_pairs_hook=unique_pairs if unique_keys else None)
    except OSError as error:
        raise BimedixError(f"{path} cannot be read ({error.strerror}); {remedy}.") from None
    except (ValueError, RecursionError) as error:
        raise BimedixError(f"{path} is not valid JSON ({error}); {remedy}.") from None
    return validate(value, schema, str(path), remedy)


def peek_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file; empty where the file is missing or contains anything else."""
    try:
        value = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def validate(value: Any, schema: type[T], source: str, remedy: str, unknown_remedy: str | None = None) -> T:
    """Checks a JSON value against `schema`; arguments and errors as `read_json`.

    Args:
        source: where the value comes from; every error message begins with it.
        unknown_remedy: used instead of `remedy` for unknown keys.
    """
    from pydantic import TypeAdapter, ValidationError  # here, because the help of the command line imports this file

    try:
        return TypeAdapter(schema).validate_python(value)
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False)
    unknown = [_key(error) for error in errors if error["type"] in UNKNOWN]
    if unknown:
        problem, key = f" has {len(unknown)} unknown key(s): {listed(unknown)}", unknown[0]
        remedy = unknown_remedy or remedy
    else:
        problem, key = _problem(errors[0]), _key(errors[0])
    raise BimedixError(f"{source}{problem}; {remedy.replace('{key}', key)}.")


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(..., object_pairs_hook=)`: raises ValueError where two keys of an object are equal."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _key(error: "ErrorDetails") -> str:
    return ".".join(map(str, error["loc"]))


def _problem(error: "ErrorDetails") -> str:
    """One pydantic error as the rest of a sentence that begins with the name of the file."""
    key, found = _key(error), repr(error["input"])
    if error["type"].startswith("missing"):
        return f" lacks the key {key}"
    if error["type"] == "value_error":  # raised by a schema's own check, whose sentence is complete
        return f": {error['ctx']['error']}" if "ctx" in error else f": {error['msg']}"
    if not key:
        return " is not a JSON object"
    found = found if len(found) < 80 else f"{found[:77]}..."
    problem = error["msg"].removeprefix("Input ")
    return (
        f" has {key} = {found}, but it {problem}" if problem.startswith("should") else f" has a wrong {key}: {problem}"
    )
