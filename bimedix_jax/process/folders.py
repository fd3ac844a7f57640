"""Which process writes a folder, which files this program wrote, and what a killed process left.

process/lock.py has the lock of a folder that one process writes. Partial folders have an flock, which the operating
system releases when a process dies, however it dies.
"""

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from bimedix_jax.process import lock, signals

log = logging.getLogger(__name__)

WRITTEN = ".bimedix.json"
"""The list of its files, in every folder that this program writes. --overwrite deletes only files that are listed and
unchanged."""
HASHED_BYTES = 16 << 20
LOCK = "run.lock"
UNLOCKED_SECONDS = 60.0
"""A partial file, or a partial folder of an older version, has no lock. It counts as abandoned when it has not changed
for this long."""
_LEFTOVER = re.compile(r"\.(?P<name>.+?)\.([0-9a-f]{8}\.)?(?P<kind>partial|old|removed)")
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP)
"""How a file system says that it cannot sync a folder."""


@contextmanager
def partial_folder(parent: Path, name: str) -> Iterator[tuple[Path, IO[str]]]:
    """A new folder `.<name>.<random>.partial`, locked and removed at the end, and its file WRITTEN, open.

    Those that killed processes left under the same name are removed first.

    Raises:
        OSError: `parent` cannot be written.
    """
    sweep(parent, name)
    while True:
        folder = parent / f".{name}.{secrets.token_hex(4)}.partial"
        folder.mkdir()
        with suppress(FileNotFoundError):  # another process has just removed the empty folder as a leftover
            file = (folder / WRITTEN).open("w+", encoding="utf-8")
            break

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)

    with file, signals.on_abandon(remove):
        _lock(file)
        try:
            yield folder, file
        finally:
            with signals.shielded():
                remove()


def sweep(parent: Path, name: str | None = None) -> None:
    """Removes what killed processes left in `parent` for the target `name`, or for any where this process owns it."""
    with suppress(OSError):
        for path in list(parent.iterdir()):
            found = _LEFTOVER.fullmatch(path.name)
            if not found or (name is not None and found["name"] != name):
                continue
            target = parent / found["name"]
            if found["kind"] == "old" and not target.exists():
                path.rename(target)  # killed between the two renames that replace a folder
            elif _is_abandoned(path, owned=name is None):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_abandoned(path: Path, owned: bool) -> bool:
    """Whether no process holds the lock of a partial folder. Without a lock, its age decides, unless it is `owned`."""
    try:
        if (path / WRITTEN).exists():
            with (path / WRITTEN).open("r+", encoding="utf-8") as file:
                return _lock(file)
        newest = max(entry.stat().st_mtime for entry in (path, *path.rglob("*")))
        return owned or time.time() - newest > UNLOCKED_SECONDS
    except OSError:  # it has just been removed or renamed
        return False


def list_written(folder: Path, file: IO[str]) -> None:
    """Writes the names, sizes and hashes of the files of a folder into its WRITTEN."""
    written = {name: _print_of(folder / name) for name in sorted(files_in(folder) - {WRITTEN})}
    file.seek(0)
    file.truncate()
    json.dump({"written_by": "bimedix_jax", "files": written}, file, indent=2)
    file.write("\n")
    file.flush()


def _print_of(path: Path) -> str:
    """Identifies the content of a written file: its size, and its hash unless it is large."""
    size = path.lstat().st_size
    if path.is_symlink() or size > HASHED_BYTES:
        return f"{size} bytes"
    return f"{size} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def files_in(folder: Path) -> set[str]:
    """Relative names of all files and links, those in subfolders too."""
    found = set()
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found |= {Path(place, name).relative_to(folder).as_posix() for name in [*names, *links]}
    return found


def foreign_files(folder: Path) -> list[str]:
    """The files of a folder that this program did not write, or that were changed since."""
    try:
        written = dict(json.loads((folder / WRITTEN).read_text("utf-8"))["files"])
        ours = {WRITTEN}
    except (OSError, ValueError, LookupError, TypeError):
        written, ours = {}, set()
    return sorted(name for name in files_in(folder) - ours if written.get(name) != _print_of(folder / name))


def sync_file(path: Path) -> None:
    """Returns when the content of a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_entries(folder: Path) -> None:
    """Returns when the names in a folder, as after a rename, are on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(number)


def sync_tree(folder: Path) -> None:
    """Returns when all files in a folder are on the disk. Afterwards a rename of the folder is safe against power loss.

    Without this, a file system may write the rename before the content, and leave empty files under the final name.
    """
    for place, _, names in os.walk(folder):
        for name in names:
            if not Path(place, name).is_symlink():
                sync_file(Path(place, name))
        sync_entries(Path(place))


def check_writable(parent: Path) -> None:
    """Creates and removes a folder in the nearest folder that exists, which finds every reason why it cannot be done.

    Raises:
        OSError: the reason.
    """
    while not parent.exists():
        parent = parent.parent
    probe = parent / f".bimedix.{secrets.token_hex(4)}.partial"
    probe.mkdir()
    probe.rmdir()


@contextmanager
def made_parents(folder: Path) -> Iterator[None]:
    """Creates `folder` and its parents; on an error in the block those that were created and are empty are removed."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]

    def remove() -> None:
        for place in missing:
            with suppress(OSError):
                place.rmdir()

    folder.mkdir(parents=True, exist_ok=True)
    with signals.on_abandon(remove):
        try:
            yield
        except BaseException:
            remove()
            raise


@contextmanager
def one_writer(folder: Path, doing: str) -> Iterator[None]:
    """Holds the lock of an existing folder. While it is held, what killed processes left there is removed.

    Args:
        doing: what the other process does, for the message, such as "trains".

    Raises:
        BimedixError: another process holds it.
        OSError: the folder cannot be written.
    """
    busy = f"{doing} in {folder}; wait until it has ended or stop it, or name another folder with --out"
    with lock.held(folder / LOCK, busy):
        sweep(folder)
        yield


def _lock(file: IO[str]) -> bool:
    """Locks a file until it is closed. False if another process has locked it."""
    taken = lock.flock(file)
    if taken is None:
        log.warning("the file system of %s has no locks, so a second writer would not be noticed", file.name)
    return taken is not False
