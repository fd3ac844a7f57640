"""Damages checkpoints and disturbs saves: is it noticed, and does a run get the newest good state back, bit by bit?

    python scripts/measure_checkpoint_faults.py --json          # several minutes, 3 s a trial on a busy machine
    python scripts/measure_checkpoint_faults.py --trials 2      # a trial

Each trial has a good checkpoint and a newer one. A flipped bit, a zeroed page, a truncation or a missing file damages a
random file of the newer one. A full disk (a limit on the size of a file, at a random size) or a folder without write
permission disturbs the save of the newer one.

`detected`: the damage is named when a run looks for its newest checkpoint, or the save raises an error. `recovered`:
the run then gets the good state exactly, and can save again.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bimedix_jax.checkpoint.integrity import find_damage
from bimedix_jax.checkpoint.steps import newest_valid, restore_step, save_step, step_folder, steps_in
from bimedix_jax.errors import BimedixError, run_script
from bimedix_jax.process.folders import WRITTEN, sweep

GOOD, NEWER = 5, 10
PAGE = 4096
NOBODY = 65534


def state_at(step: int) -> dict[str, Any]:
    """Parameters and moments of 0.5 MB each, random so that they cannot be compressed."""
    draw = np.random.default_rng(step)
    arrays = {name: jnp.asarray(draw.normal(size=(256, 512)), jnp.float32) for name in ("params", "mu", "nu")}
    return arrays | {"step": jnp.int32(step)}


def save(folder: Path, step: int) -> None:
    save_step(folder, step, state_at(step), {"seed": 0}, keep=9)


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
def disk_full(_folder: Path, draws: random.Random) -> Iterator[None]:
    """No file may become larger than a random size below that of the state."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (draws.randrange(1 << 19), before[1]))
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


DISTURBANCES = {"disk full": disk_full, "read-only folder": read_only}


def is_recovered(folder: Path) -> bool:
    """Whether a run gets the good state exactly, and can then save and restore the newer one."""
    if newest_valid(folder) != GOOD:
        return False
    state, _ = restore_step(folder, GOOD, state_at(GOOD))
    same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), state, state_at(GOOD))
    sweep(folder)
    save(folder, NEWER)
    return all(jax.tree.leaves(same)) and newest_valid(folder) == NEWER and steps_in(folder) == [GOOD, NEWER]


def damage_once(folder: Path, damage: Callable[[Path, random.Random], None], draws: random.Random) -> bool:
    """Whether the damage to a random file of the newer checkpoint is named."""
    save(folder, NEWER)
    target = step_folder(folder, NEWER)
    files = sorted(path for path in target.rglob("*") if path.is_file() and path.name != WRITTEN)
    victims = [path for path in files if path.stat().st_size > 0]
    path = draws.choice(victims)
    before = path.read_bytes()
    while path.exists() and path.read_bytes() == before:  # a page may be zero already
        damage(path, draws)
    return find_damage(target) is not None


def disturb_once(folder: Path, disturbance: Any, draws: random.Random) -> bool:
    """Whether the save raises an error."""
    try:
        with disturbance(folder, draws):
            save(folder, NEWER)
    except (BimedixError, OSError, ValueError):  # Orbax reports a failed write as ValueError
        return True
    return False


def measure(trials: int, seed: int) -> list[dict[str, Any]]:
    draws, rows = random.Random(seed), []
    for fault in (*DAMAGES, *DISTURBANCES):
        detected = recovered = 0
        for _ in range(trials):
            with tempfile.TemporaryDirectory() as name:
                Path(name).chmod(0o755)
                folder = Path(name) / "checkpoints"
                save(folder, GOOD)
                if fault in DAMAGES:
                    detected += damage_once(folder, DAMAGES[fault], draws)
                else:
                    detected += disturb_once(folder, DISTURBANCES[fault], draws)
                recovered += is_recovered(folder)
        rows.append({"fault": fault, "tried": trials, "detected": detected, "recovered": recovered})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10, help="trials of each fault (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
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
