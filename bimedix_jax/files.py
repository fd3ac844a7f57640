"""Files and folders: written completely or not at all, and JSON that is checked against a schema when it is read."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bimedix_jax.errors import BimedixError, is_full, listed, problem_of
from bimedix_jax.process import folders, signals
from bimedix_jax.process.stand_ins import BYTE_ORDER_MARK, stand_in

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

T = TypeVar("T")
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
"""How pydantic calls the error of an unknown key, in a model and in a dataclass."""
LISTS = ("list_type", "tuple_type", "set_type", "frozen_set_type")
"""How pydantic calls the error of a value that should be a list in JSON."""
OBJECTS = ("dict_type", "model_type", "model_attributes_type", "dataclass_type")
"""The same of a value that should be an object."""


@contextmanager
def new_folder(path: str | os.PathLike[str], overwrite: bool = False, ours: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; rename it to `path` on success, remove it on any error or Ctrl-C.

    Readers therefore see either no folder or a complete one, after a loss of power too. Only a kill that Python cannot
    catch leaves the sibling behind; its name is `.<name>.<random>.partial`, and the next call for the same path removes
    it.

    Args:
        overwrite: replace an old folder, if this program wrote every file in it.
        ours: the caller knows that this program wrote every file, because the folder is a part of a run or of the
        cache. No list WRITTEN is added to it.

    Raises:
        BimedixError: `path` is a file, is not empty and may not be replaced, contains the working directory, or cannot
            be written.
    """
    target = Path(path).resolve()  # a symlink to a folder remains, and the contents of the folder are replaced
    folders.sweep(target.parent, target.name)
    check_replaceable(target, overwrite, ours)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(folders.made_parents(target.parent))
            partial, written = stack.enter_context(folders.partial_folder(target.parent, target.name))
        except OSError as error:
            raise _cannot_create(target, error) from error
        try:
            yield partial
            check_replaceable(target, overwrite, ours)  # another process may have written there in the meantime
            folders.list_written(partial, written)
            if ours:
                (partial / folders.WRITTEN).unlink()
            replace_folder(partial, target)
        except Exception as error:
            if not is_full(error):
                raise
            raise BimedixError(f"{target} cannot be written: {problem_of(error)}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8, newlines as given) so that a reader sees the old file or the new one, never a part."""
    target = Path(path).resolve()
    folders.sweep(target.parent, target.name)
    partial = _sibling(target, "partial")
    try:
        with signals.on_abandon(lambda: partial.unlink(missing_ok=True)):
            with partial.open("w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
            folders.sync_entries(target.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling of `path` for a new file; rename it to `path` on success, remove it on any error."""
    target = Path(path).resolve()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(folders.made_parents(target.parent))
        except OSError as error:
            raise _cannot_create(target, error, "file") from error
        folders.sweep(target.parent, target.name)
        partial = _sibling(target, "partial")
        try:
            with signals.on_abandon(lambda: partial.unlink(missing_ok=True)):
                yield partial
                folders.sync_file(partial)
                partial.replace(target)
                folders.sync_entries(target.parent)
        finally:
            partial.unlink(missing_ok=True)


def inside(folder: str | os.PathLike[str], name: str) -> Path:
    """`folder / name`, where the name is checked. For names that we did not write, such as those in an index.

    Symlinks may lead anywhere: whoever put them into the folder chose their targets, and the caches of Hugging Face
    consist of them. The file itself need not exist.

    Raises:
        BimedixError: `name` is absolute, contains `..`, a backslash or a NUL.
    """
    root = Path(folder)
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        raise BimedixError(f"{root} refers to {name!r}, which is not a path inside that folder; do not trust its files")
    return root / name


def require_content(path: str | os.PathLike[str], text: bool = False, markup: bool = False) -> None:
    """Checks by its first bytes that a file is not a stand-in for its content.

    Args:
        text: the file is text; UTF-16 and UTF-32 are refused.
        markup: the file may be HTML or XML.

    Raises:
        BimedixError: it is a git-lfs pointer, or a web page or error message that was saved in place of the file.
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        problem = stand_in(file.read(512), text, markup)
    if problem:
        raise BimedixError(f"{path} {problem}.")


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Every text that others wrote is read here.

    Raises:
        BimedixError: it is in another encoding, or a stand-in for the file (see `require_content`).
        OSError: it cannot be read.
    """
    return decode(Path(path).read_bytes(), str(path))


def decode(data: bytes, source: str) -> str:
    """`read_text` of bytes that were read already; `source` begins the messages."""
    problem = stand_in(data[:512], text=True)
    if problem:
        raise BimedixError(f"{source} {problem}.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BimedixError(
            f"{source} is not UTF-8 text (byte {data[error.start]:#04x} at position {error.start}); save it as UTF-8, "
            "or fetch it again."
        ) from None


def text_lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The lines of a UTF-8 file as bytes, without a byte order mark; errors as `require_content`."""
    require_content(path, text=True)
    with Path(path).open("rb") as file:
        yield file.readline().removeprefix(BYTE_ORDER_MARK)
        yield from file


def where_instead(folder: str | os.PathLike[str], name: str) -> str:
    """A remedy where `folder` lacks the file `name`: the subfolders that have it, else a general one."""
    found = sorted(path.parent for path in Path(folder).glob(f"*/{name}")) if Path(folder).is_dir() else []
    if not found:
        return f"name a folder that contains {name}"
    return f"name the subfolder that has it: {listed([str(path) for path in found])}"


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sibling(target: Path, suffix: str) -> Path:
    """An unused name in the folder of `target`: on the same file system a rename is atomic."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{suffix}")


def check_replaceable(path: str | os.PathLike[str], overwrite: bool, ours: bool = False) -> None:
    """The checks of `new_folder`, for callers that work for a long time before they write.

    Raises:
        BimedixError: as `new_folder`.
    """
    target = Path(path).resolve()
    if Path.cwd().is_relative_to(target):
        raise BimedixError(f"{target} contains the working directory; name a new folder")
    try:
        if target.exists() and not target.is_dir():
            raise BimedixError(f"{target} is a file; name a folder")
        folders.check_writable(target.parent)
        foreign = [] if ours or not target.exists() else folders.foreign_files(target)
        filled = target.exists() and any(target.iterdir())
    except OSError as error:
        raise _cannot_create(target, error) from error
    if foreign:
        raise BimedixError(
            f"{target} is not empty and contains files that bimedix did not write, or that were changed since "
            f"({listed(foreign)}), so it is never replaced; name another folder"
        )
    if filled and not overwrite:
        raise BimedixError(f"{target} exists and is not empty; name another folder or pass --overwrite")


def check_file(path: str | os.PathLike[str], overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    """The same checks for a single file that a command writes at its end.

    Args:
        is_ours: whether this program wrote the file that exists.

    Raises:
        BimedixError: `path` is a folder, exists and may not be replaced, or cannot be written.
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise BimedixError(f"{target} is a folder; name a file")
    try:
        folders.check_writable(target.parent)
    except OSError as error:
        raise _cannot_create(target, error, "file") from error
    if not target.exists():
        return
    if not is_ours(target):
        raise BimedixError(f"{target} exists, and bimedix did not write it, so it is not replaced; name another file")
    if not overwrite:
        raise BimedixError(f"{target} exists; name another file or pass --overwrite")


def _cannot_create(target: Path, error: OSError, kind: str = "folder") -> BimedixError:
    return BimedixError(f"cannot create {target} ({error.strerror}); name a {kind} that can be written")


def replace_folder(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`, which survives a loss of power. An old folder is renamed first, and renamed back if
    that fails."""
    folders.sync_tree(partial)
    if not target.exists():
        partial.rename(target)
        folders.sync_entries(target.parent)
        return
    old = _sibling(target, "old")
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    folders.sync_entries(target.parent)
    shutil.rmtree(old)


def read_json(path: str | os.PathLike[str], schema: type[T], remedy: str, unique_keys: bool = False) -> T:
    """Reads a JSON file and checks it against `schema`.

    Args:
        schema: anything that pydantic can check: a model, a dataclass, a `dict[str, Any]`. A model with
            `extra="forbid"` refuses unknown keys.
        remedy: what the user can do; every error message ends with it. `{key}` is replaced by the first wrong key, and
            `{keys}` by all unknown ones.
        unique_keys: refuse an object that has the same key twice.

    Raises:
        BimedixError: the file cannot be read, is not JSON, or does not fit the schema. The message names file and key.
    """
    try:
        value = json.loads(read_text(path), object_pairs_hook=unique_pairs if unique_keys else None)
    except OSError as error:
        raise BimedixError(f"{path} cannot be read ({error.strerror}); {remedy}.") from None
    except (ValueError, RecursionError) as error:
        raise BimedixError(f"{path} is not valid JSON ({error}); {remedy}.") from None
    return validate(value, schema, str(path), remedy)


def peek_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file; empty where the file is missing or contains anything else."""
    try:
        value = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError, BimedixError):
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
    unknown = [_key(error, value) for error in errors if error["type"] in UNKNOWN]
    if unknown:
        problem, key = f" has {len(unknown)} unknown key(s): {listed(unknown)}", unknown[0]
        remedy = unknown_remedy or remedy
    else:
        key = _key(errors[0], value)
        problem = _problem(errors[0], key)
    raise BimedixError(f"{source}{problem}; {remedy.replace('{key}', key).replace('{keys}', ' '.join(unknown))}.")


def flatten(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} as {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(..., object_pairs_hook=)`: raises ValueError where two keys of an object are equal."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _key(error: "ErrorDetails", value: Any) -> str:
    """Where in `value` the error is, without the names that pydantic gives the branches of a union."""
    kept = []
    for part in error["loc"]:
        entries: Any = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(entries, dict) and part in entries:
            value = entries[part]
        elif not (isinstance(value, dict) and error["type"].startswith("missing") and part == error["loc"][-1]):
            continue
        kept.append(str(part))
    return ".".join(kept)


def _problem(error: "ErrorDetails", key: str) -> str:
    """One pydantic error as the rest of a sentence that begins with the name of the file."""
    found = repr(error["input"])
    if error["type"].startswith("missing"):
        return f" lacks the key {key}"
    if error["type"] == "value_error":  # raised by a schema's own check, whose sentence is complete
        return f": {error['ctx']['error']}" if "ctx" in error else f": {error['msg']}"
    if not key:
        return f" is not a JSON {'list' if error['type'] in LISTS else 'object'}"
    found = found if len(found) < 80 else f"{found[:77]}..."
    if error["type"] in LISTS:
        return f" has {key} = {found}, but it should be a list"
    if error["type"] in ("too_short", "too_long") and "ctx" in error:
        least, most = (error["ctx"].get(name) for name in ("min_length", "max_length"))
        limit = f"at least {least}" if most is None else f"at most {most}"
        count = error["ctx"]["actual_length"]
        return f" has {count} value{'s' * (count != 1)} in {key}, but it should have {limit}"
    if error["type"] in OBJECTS:
        return f" has {key} = {found}, but it should be an object"
    if error["type"] == "union_tag_not_found" and "ctx" in error:
        return f" lacks the key {key}.{error['ctx']['discriminator'][1:-1]}"
    if error["type"] == "union_tag_invalid" and "ctx" in error:
        tag = error["ctx"]
        return (
            f" has {key}.{tag['discriminator'][1:-1]} = {tag['tag']!r}, but it should be one of {tag['expected_tags']}"
        )
    problem = error["msg"].removeprefix("Input ")
    return (
        f" has {key} = {found}, but it {problem}" if problem.startswith("should") else f" has a wrong {key}: {problem}"
    )
