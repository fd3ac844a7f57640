"""A lock file that holds on its own machine and on every other machine that shares the file system.

Two things hold it:

- An flock, for the processes of one machine. The operating system releases it, however its holder dies.
- A name and a heartbeat, for other machines, because many shared file systems do not share flocks (NFS without lockd,
  Lustre without `-o flock`). The file names its holder, who changes a number in it every BEAT_SECONDS. A process that
  finds the name of a process on another machine watches the file for STALE_SECONDS. If it changes, the holder is alive.

No two clocks are compared, so a wrong clock does not matter. A holder that was suspended for so long that another
process took the folder over finds a foreign name in the file at its next heartbeat, and stops at once.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from bimedix_jax.errors import BimedixError
from bimedix_jax.process import signals
from bimedix_jax.process.clock import steady

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
"""A holder on another machine that did not change the file for so long is dead, or suspended."""
NAMELESS_SECONDS = 5.0
"""The same for an empty file: its holder is about to write its name, or was killed before it could."""
SETTLE_SECONDS = 2.0
"""Of several processes that take over a stale lock together, the last one to write has it. It is known after this."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def machine() -> dict[str, str]:
    """Names this machine and this start of it. Either id is empty where the system has none, as in most containers."""
    return {
        "host": socket.gethostname(),
        "machine": _read_id("/etc/machine-id"),
        "boot": _read_id("/proc/sys/kernel/random/boot_id"),
    }


def _read_id(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text("ascii", "ignore").strip()
    return ""


@contextlib.contextmanager
def held(path: Path, busy: str) -> Iterator[None]:
    """Holds the lock `path` within the block, and removes it afterwards.

    Args:
      busy: the error message where another process holds it; it begins with the name of that process.

    Raises:
      BimedixError: another process holds it.
      OSError: the file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        file, new, shared = _locked(path, busy, stack)
        name = {
            "holder": f"process {os.getpid()} on {socket.gethostname()}",
            **machine(),
            "token": secrets.token_hex(8),
        }
        found = _content(path)
        limit = 0.0 if new else _doubt(found, name, shared)
        if limit:
            _watch(path, found, limit, busy)
        heart = Heartbeat(path, file, name)
        try:
            heart.beat()
        except OSError:  # the disk is full, for example; an empty file would make the next process wait
            if new:
                path.unlink(missing_ok=True)
            raise
        if limit:
            time.sleep(SETTLE_SECONDS)
            if (other := _parsed(_content(path))).get("token") != name["token"]:
                raise BimedixError(f"{other.get('holder', 'another process')} {busy}")
        stack.enter_context(signals.on_abandon(heart.release))
        with heart:
            yield


def _locked(path: Path, busy: str, stack: contextlib.ExitStack) -> tuple[IO[str], bool, bool]:
    """(the open file with its flock, whether this process made it, whether the file system has flocks)."""
    while True:
        try:
            number, new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            try:
                number, new = os.open(path, os.O_RDWR), False
            except FileNotFoundError:
                continue  # its holder has just removed it
        file = stack.enter_context(os.fdopen(number, "r+", encoding="utf-8"))
        taken = flock(file)
        if taken is None:
            log.warning("the file system of %s has no locks; only the heartbeat in the file shows its holder", path)
        if taken is False:
            who = _parsed(_content(path)).get("holder") or _content(path).strip() or "another process"
            raise BimedixError(f"{who} {busy}")
        if path.exists() and path.stat().st_ino == os.fstat(number).st_ino:
            return file, new, taken is True
        file.close()  # the previous holder has removed it in the meantime


def flock(file: IO[Any]) -> bool | None:
    """Locks a file until it is closed. False if another process has locked it, None if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _doubt(found: str, name: dict[str, str], shared: bool) -> float:
    """How long to watch a lock file with this content, whose flock was free, before its holder counts as dead."""
    if not found:
        return NAMELESS_SECONDS
    holder = _parsed(found)
    if not holder:
        return 0.0 if found.startswith("process ") else STALE_SECONDS  # an older version wrote a name only
    if shared and holder.get("boot") == name["boot"] and name["boot"]:
        return 0.0  # the same kernel, which would still have the flock
    same = all(holder.get(key) == name[key] for key in ("host", "machine"))
    if not name["machine"]:  # many hosts of one name can lack this id; macOS has neither id
        same = same and not name["boot"]
    rebooted = same and holder.get("boot") != name["boot"]
    return 0.0 if rebooted or (same and shared) else STALE_SECONDS


def _watch(path: Path, found: str, limit: float, busy: str) -> None:
    """Returns if the file keeps this content for so many seconds. Raises BimedixError if it changes."""
    who = _parsed(found).get("holder", "a process without a name")
    log.warning("%s names %s; watching for %.0f s whether that one is alive", path, who, limit)
    deadline = steady() + limit
    while steady() < deadline:
        time.sleep(min(1.0, limit / 8))
        now = _content(path)
        if now != found:
            raise BimedixError(f"{_parsed(now).get('holder', who)} {busy}")


def _content(path: Path) -> str:
    """The file, opened anew: on NFS that asks the server. Empty if it is missing."""
    try:
        return path.read_text("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _parsed(content: str) -> dict[str, str]:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class Heartbeat:
    """Changes a lock file every BEAT_SECONDS while its block runs, and removes it afterwards.

    Args:
      name: of the holder, with its token.
    """

    def __init__(self, path: Path, file: IO[str], name: dict[str, str]):
        self.path, self.file, self.name = path, file, name
        self._beats, self._warned = 0, False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lock", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()
        self.release()

    def beat(self) -> None:
        """Writes the name and the next number. Its length stays the same, so no reader sees a shorter file."""
        self._beats += 1
        content = json.dumps({**self.name, "beat": f"{self._beats:012d}"}) + "\n"
        os.pwrite(self.file.fileno(), content.encode(), 0)
        if self._beats == 1:
            os.ftruncate(self.file.fileno(), len(content.encode()))
        os.fsync(self.file.fileno())  # on NFS others see it only now

    def is_ours(self) -> bool:
        """False if another process has written its name into the file."""
        return _parsed(_content(self.path)).get("token", self.name["token"]) == self.name["token"]

    def release(self) -> None:
        """Removes the file, unless it belongs to another process by now."""
        with contextlib.suppress(OSError):
            if self.is_ours():
                self.path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                if not self.is_ours():
                    other = _parsed(_content(self.path)).get("holder", "another process")
                    stop(
                        f"{other} has taken over {self.path.parent}, because this process did not run for more than "
                        f"{STALE_SECONDS:.0f} s; it stops, so that two processes do not write there"
                    )
                    return
                self.beat()
            except OSError as error:
                if not self._warned:
                    log.warning("%s cannot be written (%s); still trying", self.path, error.strerror)
                self._warned = True


def stop(text: str) -> None:
    """Ends the process at once, without cleaning up in a folder that is another's."""
    signals.fail(text)
