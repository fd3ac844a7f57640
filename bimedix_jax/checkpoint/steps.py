"""Training states by step: Orbax writes the arrays, a manifest detects damage, and a rename makes a save atomic.

checkpoints/00000120/state/...        Orbax: trained parameters, optimiser state, step
checkpoints/00000120/position.json    step, position in the data, seed, and further values of the caller
checkpoints/00000120/manifest.json    SHA-256 of every file, written last
"""

import contextlib
import json
import logging
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from bimedix_jax import distributed
from bimedix_jax.checkpoint.integrity import find_damage, write_manifest
from bimedix_jax.errors import BimedixError
from bimedix_jax.files import new_folder
from bimedix_jax.process import folders

log = logging.getLogger(__name__)

STATE, POSITION = "state", "position.json"
SETTLE_SECONDS = 0.5
"""Time for TensorStore's other writes to end after one of them has failed."""
TIMEOUT_SECONDS = 10 * 365 * 24 * 3600
"""Orbax 0.12.8 measures the time of a save with a clock that can be set: after a jump by an hour, each save failed."""


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """Steps that have a folder, damaged or not, in ascending order."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdigit())


def save_step(
    folder: Path,
    step: int,
    state: Any,
    position: dict[str, Any],
    keep: int,
    copied: Callable[[], None] = lambda: None,
    before: Sequence[Path] = (),
) -> Path:
    """Writes a checkpoint, then removes all but the newest `keep`. A reader sees a complete checkpoint or none.

    Several processes on one file system write their parts of the arrays together. This process then has no news of
    what happens in the others (checkpoint/saver.py exchanges it).

    Args:
      state: pytree of jax arrays.
      position: JSON values that are needed to resume the run.
      copied: is called when the state is in host memory, so that the next step may donate its arrays.
      before: files that have to be on the disk before the checkpoint is, where they exist.

    Raises:
      BimedixError: the folder cannot be written.
    """
    target = step_folder(folder, step)

    def complete(partial: Path) -> None:
        for path in before:
            if path.is_file():
                folders.sync_file(path)
        finish(partial, step, state, position)

    if distributed.is_multiprocess():
        partial = target.with_name(f".{target.name}.{distributed.broadcast_token(secrets.token_hex(4))}.partial")
        distributed.on_process_zero(lambda: partial.mkdir(parents=True))
        save_arrays(partial, state, copied)
        if distributed.is_process_zero():
            complete(partial)
            folders.sync_tree(partial)
            if target.exists():
                remove(target)
            partial.rename(target)
            folders.sync_entries(folder)
    else:
        with new_folder(target, overwrite=True, ours=True) as partial:
            save_arrays(partial, state, copied)
            complete(partial)
    if distributed.is_process_zero():
        for old in [other for other in steps_in(folder) if other != step][: -(keep - 1) or None]:
            remove(step_folder(folder, old))
    return target


def save_arrays(partial: Path, state: Any, copied: Callable[[], None] = lambda: None) -> None:
    options = ocp.options.AsyncOptions(timeout_secs=TIMEOUT_SECONDS)
    with quiet_failures(), ocp.StandardCheckpointer(async_options=options) as checkpointer:
        checkpointer.save(partial.resolve() / STATE, state)  # blocks until the arrays are in host memory
        copied()


@contextlib.contextmanager
def quiet_failures() -> Iterator[None]:
    """Drops what Orbax and TensorStore print when a write fails in their threads: 200 lines of tracebacks.

    The exception of the save has the reason. TensorStore's other writes still end after that, in an event loop that
    Orbax has closed.
    """
    previous = sys.unraisablehook

    def of_orbax(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    absl = logging.getLogger("absl")
    absl.addFilter(of_orbax)
    sys.unraisablehook = hook
    try:
        yield
    except Exception:
        time.sleep(SETTLE_SECONDS)
        raise
    finally:
        sys.unraisablehook = previous
        absl.removeFilter(of_orbax)


def finish(partial: Path, step: int, state: Any, position: dict[str, Any]) -> None:
    """Completes a checkpoint, whose arrays are already written, with its position and manifest."""
    record = {"step": step, **position, "leaves": shapes_of(state)}
    (partial / POSITION).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    write_manifest(partial)


def shapes_of(state: Any) -> dict[str, str]:
    """Every leaf as 'float32[3, 4]' by its path."""
    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def remove(folder: Path) -> None:
    """Removes a checkpoint. It is renamed first, so that an interrupted removal leaves nothing that looks complete."""
    doomed = folder.with_name(f".{folder.name}.removed")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def newest_valid(folder: Path, at_most: int | None = None) -> int:
    """The newest step with undamaged files; warns of every damaged newer one.

    Args:
      at_most: prefer steps up to this one. Later ones count only if there is no other.

    Raises:
      BimedixError: there is no checkpoint, or none that is valid.
    """
    steps = steps_in(folder)
    if not steps:
        raise BimedixError(f"{folder} contains no checkpoint to resume from; start the run without --resume.")
    damages = []
    early = [step for step in steps if at_most is None or step <= at_most]
    for step in [*reversed(early), *(step for step in reversed(steps) if step not in early)]:
        damage = find_damage(step_folder(folder, step))
        if damage is None:
            for line in damages:
                log.warning("%s; resuming from the %s step %d.", line, "earlier" if step in early else "later", step)
            return step
        damages.append(f"Checkpoint {step_folder(folder, step)} is damaged: {damage}")
    raise BimedixError(
        f"{'; '.join(damages)}. No earlier one is valid: restore it from a copy, or start the run again."
    )


def restore_step(folder: Path, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
    """(state, position) of a checkpoint that `newest_valid` chose.

    Args:
      template: pytree of arrays (or jax.ShapeDtypeStruct) with the structure, shapes, dtypes and shardings to restore.

    Raises:
      BimedixError: the checkpoint has another structure or other shapes.
    """
    place = step_folder(folder, step)
    position = json.loads((place / POSITION).read_text("utf-8"))
    stored, wanted = position["leaves"], shapes_of(template)
    different = sorted(name for name in stored | wanted if stored.get(name) != wanted.get(name))
    if different:
        name = different[0]
        raise BimedixError(
            f"{place} contains another training state: {len(different)} differences, such as {name}: "
            f"{stored.get(name)} there and {wanted.get(name)} here; resume with the experiment that wrote it."
        )
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), template
    )
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(place.resolve() / STATE, abstract)
    return state, position


def read_arrays(folder: Path, step: int) -> dict[str, np.ndarray]:
    """The whole arrays of a checkpoint by their path, such as "['params']['layers.moe.w1.lora.a']", on any devices."""
    place = step_folder(folder, step).resolve() / STATE
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree: Any = checkpointer.metadata(place).item_metadata
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree.tree, is_leaf=has_shape)
        restored = checkpointer.restore(place, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    leaves, _ = jax.tree.flatten_with_path(restored)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def has_shape(leaf: Any) -> bool:
    return hasattr(leaf, "shape")
