"""Damages checkpoints and disturbs saves: is it noticed, and does a run get the newest good state back, bit by bit?

    python scripts/measure_checkpoint_faults.py --json          # several minutes, 3 s a trial on a busy machine
    python scripts/measure_checkpoint_faults.py --trials 2      # a trial

Each trial has a good checkpoint and a newer one. A flipped bit, a zeroed page, a truncation or a missing file damages a
random file of the newer one; an I/O error hinders reading one. A full disk (a mounted one of 16 MB; where that is not
allowed, a limit on the size of a file), a folder without write permission, or an I/O error when a file is synced to the
disk disturbs the save of the newer one. A clock jumps by a minute to ten years during a save.

`detected`: the damage is named when a run looks for its newest checkpoint, the save ends with one sentence that names
the good checkpoint, or a warning names the jump. `recovered`: the run then gets the newest good state exactly, and can
save again.
"""

import argparse
import contextlib
import errno
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from bimedix_jax.checkpoint.integrity import find_damage
from bimedix_jax.checkpoint.saver import Saver
from bimedix_jax.checkpoint.steps import newest_valid, restore_step, step_folder, steps_in
from bimedix_jax.errors import BimedixError, natural, positive, run_script
from bimedix_jax.process.folders import WRITTEN, sweep

GOOD, NEWER, LATER = 5, 10, 15
PAGE = 4096
DISK_BYTES = 16 << 20
Outcome = tuple[bool, bool]
"""Whether a fault was detected, and whether the run recovered."""
NOBODY = 65534


def state_at(step: int) -> dict[str, Any]:
    """Parameters and moments of 0.5 MB each, random so that they cannot be compressed."""
    draw = np.random.default_rng(step)
    arrays = {name: jnp.asarray(draw.normal(size=(256, 512)), jnp.float32) for name in ("params", "mu", "nu")}
    return arrays | {"step": jnp.int32(step)}


def save(folder: Path, step: int) -> None:
    """As a run does it, in the background."""
    with Saver(folder, keep=9) as writer:
        writer.save(step, state_at(step), {"seed": 0})


def flip_bit(path: Path, draws: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    path.write_bytes(content)


def zero_page(path: Path, draws: random.Random) -> None:
    content = bytearray(path.read_bytes())
    first = draws.randrange(-(-len(content) // PAGE)) * PAGE
    size = len(content[first : first + PAGE])
    content[first : first + PAGE] = bytes(size)
    path.write_bytes(content)


def truncate(path: Path, draws: random.Random) -> None:
    os.truncate(path, draws.randrange(path.stat().st_size))


def delete(path: Path, _draws: random.Random) -> None:
    path.unlink()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "flipped bit": flip_bit,
    "zeroed page": zero_page,
    "truncation": truncate,
    "missing file": delete,
}


@contextlib.contextmanager
def small_disk(folder: Path, wanted: bool) -> Iterator[None]:
    """Makes the folder a disk of DISK_BYTES, if the machine allows that. Unmounts it at the end."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    can = wanted and shutil.which("mount") is not None
    mounted = can and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def disk_full(folder: Path, draws: random.Random) -> Iterator[None]:
    """A small disk has less space left than the state needs. Without one, no file may become larger than that."""
    left = draws.randrange(1 << 20)
    if folder.parent.is_mount():
        filler = folder.parent / "filler"
        free = shutil.disk_usage(folder).free
        filler.write_bytes(bytes(max(free - left, 0)))
        try:
            yield
        finally:
            filler.unlink()
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left // 2, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def read_only(folder: Path, _draws: random.Random) -> Iterator[None]:
    """The folder cannot be written. Permissions do not bind root, which therefore becomes another user for a while."""
    mode, user = folder.stat().st_mode, os.geteuid()
    folder.chmod(0o555)
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(0)
        folder.chmod(mode)


@contextlib.contextmanager
def input_output_error(_folder: Path, draws: random.Random) -> Iterator[None]:
    """One of the next syncs of a file or folder to the disk fails, as on a disk with a bad block."""
    original, left = os.fsync, [draws.randrange(10)]

    def failing(number: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(number)

    with mock.patch.object(os, "fsync", failing):
        yield


DISTURBANCES = {"disk full": disk_full, "read-only folder": read_only, "I/O error while writing": input_output_error}
READING, CLOCK = "I/O error while reading", "clock that jumps"
FAULTS = (*DAMAGES, *DISTURBANCES, READING, CLOCK)


def is_good(folder: Path, step: int) -> bool:
    """Whether a run resumes from this step and gets its state exactly."""
    if newest_valid(folder) != step:
        return False
    state, _ = restore_step(folder, step, state_at(step))
    same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), state, state_at(step))
    return all(jax.tree.leaves(same))


def goes_on(folder: Path) -> bool:
    """Whether a run can save the newer state (again) and resume from it."""
    sweep(folder)
    save(folder, NEWER)
    return is_good(folder, NEWER) and steps_in(folder) == [GOOD, NEWER]


def damage_once(folder: Path, damage: Callable[[Path, random.Random], None], draws: random.Random) -> Outcome:
    """A random file of the newer checkpoint is damaged."""
    save(folder, NEWER)
    target = step_folder(folder, NEWER)
    files = sorted(path for path in target.rglob("*") if path.is_file() and path.name != WRITTEN)
    victims = [path for path in files if path.stat().st_size > 0]
    path = draws.choice(victims)
    before = path.read_bytes()
    while path.exists() and path.read_bytes() == before:  # a page may be zero already
        damage(path, draws)
    detected = find_damage(target) is not None
    return detected, is_good(folder, GOOD) and goes_on(folder)


def disturb_once(folder: Path, disturbance: Any, draws: random.Random) -> Outcome:
    """The save of the newer checkpoint is disturbed. It has to end with one sentence that names the good one."""
    detected = False
    try:
        with disturbance(folder, draws):
            save(folder, NEWER)
    except BimedixError as error:
        text = str(error)
        detected = "cannot be written" in text and f"that of step {GOOD}" in text and "\n" not in text
    return detected, is_good(folder, GOOD) and goes_on(folder)


def misread_once(folder: Path, draws: random.Random) -> Outcome:
    """A random file of the newer checkpoint cannot be read."""
    save(folder, NEWER)
    target = step_folder(folder, NEWER)
    victim = draws.choice(sorted(path for path in target.rglob("*") if path.is_file()))
    original = Path.open

    def failing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == victim:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return original(path, *arguments, **options)

    with mock.patch.object(Path, "open", failing):
        detected = "cannot be read" in str(find_damage(target))
        recovered = is_good(folder, GOOD)
    return detected, recovered and goes_on(folder)


def jump_once(folder: Path, draws: random.Random) -> Outcome:
    """The clock jumps during a save. That checkpoint and the next are complete, and a warning names the jump."""
    jump = draws.choice((-1, 1)) * 60 * 10 ** draws.uniform(0.0, 6.7)
    after, original, began, named = draws.uniform(0.0, 0.1), time.time, time.monotonic(), Messages()

    def jumped() -> float:
        return original() + (jump if time.monotonic() - began > after else 0.0)

    logging.getLogger("bimedix_jax").addHandler(named)
    logging.disable(logging.INFO)
    with Saver(folder, keep=9) as writer, mock.patch.object(time, "time", jumped):
        writer.save(NEWER, state_at(NEWER), {"seed": 0})
        writer.wait()
        time.sleep(after)
        writer.save(LATER, state_at(LATER), {"seed": 0})
    logging.disable()
    logging.getLogger("bimedix_jax").removeHandler(named)
    os.utime(step_folder(folder, LATER), (original() + jump, original() + jump))
    detected = any("the clock of this machine jumped" in text for text in named.texts)
    return detected, is_good(folder, LATER) and steps_in(folder) == [GOOD, NEWER, LATER]


class Messages(logging.Handler):
    """Keeps the messages."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def once(fault: str, folder: Path, draws: random.Random) -> Outcome:
    if fault in DAMAGES:
        return damage_once(folder, DAMAGES[fault], draws)
    if fault in DISTURBANCES:
        return disturb_once(folder, DISTURBANCES[fault], draws)
    return misread_once(folder, draws) if fault == READING else jump_once(folder, draws)


def measure(trials: int, seed: int) -> list[dict[str, Any]]:
    draws, rows = random.Random(seed), []
    for fault in FAULTS:
        outcomes = []
        for _ in range(trials):
            with tempfile.TemporaryDirectory() as name, small_disk(Path(name), fault == "disk full"):
                Path(name).chmod(0o755)
                folder = Path(name) / "checkpoints"
                save(folder, GOOD)
                outcomes.append(once(fault, folder, draws))
        detected, recovered = (sum(column) for column in zip(*outcomes, strict=True))
        rows.append({"fault": fault, "tried": trials, "detected": detected, "recovered": recovered})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=positive, default=10, help="trials of each fault (default: 10)")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    logging.disable()  # a warning for each damaged checkpoint, an error of Orbax for each disturbed save
    rows = measure(options.trials, options.seed)
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    run_script(main)
