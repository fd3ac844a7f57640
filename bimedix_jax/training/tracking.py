"""Mirrors metrics.jsonl to Weights & Biases: numbers, a picture of the load and the configuration, but no text, code or
machine data.

A run has one id, made from its folder, so that the mirror can be lost and made again. A run that resumes continues its
curve: offline the earlier lines are written again into a new local file, which replaces the old one; online the
server keeps them.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from bimedix_jax import files
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment
from bimedix_jax.training.metrics_file import METRICS, read_metrics

LABELS = "arm.json"
"""Beside the folder of a run that belongs to a sweep: its study, size, arm and identity (sweeps/folder.py)."""
RUN, CONFIG = "run.json", "config.json"
LAYERS_SHOWN = 8
"""At most so many layers have a curve of their own."""


class Mirror:
    """Logs each line of metrics.jsonl. It does nothing in mode "disabled" or without an experiment.

    Args:
      step: the step that the run resumes from, 0 for a new run.

    Raises:
      BimedixError: wandb is enabled and cannot start.
    """

    def __init__(self, experiment: Experiment | None, folder: Path, step: int):
        self.run, self.folder = None, folder
        if experiment is None or experiment.tracking.mode == "disabled":
            return
        offline = experiment.tracking.mode == "offline"
        identity = run_id(folder)
        before = local_files(folder, identity) if offline else []
        while any(time.strftime("%Y%m%d_%H%M%S") in old.name for old in before):
            time.sleep(0.05)  # the new files would have the same name
        self.run = start(experiment, folder, identity, folder, resume=step > 0 and not offline)
        if offline and step and (folder / METRICS).is_file():
            for line in read_metrics(folder):
                self.write(line)
        for old in before:
            shutil.rmtree(old, ignore_errors=True)

    def write(self, line: dict[str, Any]) -> None:
        if self.run is not None:
            self.run.log(flat_numbers(line), step=line["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.run is not None:
            lines = read_metrics(self.folder) if kind is None and (self.folder / METRICS).is_file() else []
            if lines:
                with tempfile.TemporaryDirectory() as scratch:
                    self.run.log(load_picture(lines, Path(scratch)), step=lines[-1]["step"])
            self.run.finish(exit_code=0 if kind is None else 1)


def run_id(folder: Path) -> str:
    """The id of a run in Weights & Biases: a hash of its experiment or identity, and of the time of its first start.

    A copy of the folder has the same id. An agent of a W&B sweep chooses the id itself.
    """
    if os.environ.get("WANDB_SWEEP_ID") and (chosen := os.environ.get("WANDB_RUN_ID")):
        return chosen
    starts = files.peek_json(folder / RUN).get("starts") or [{}]
    what = files.peek_json(folder.parent / LABELS).get("identity")
    if what is None and (folder / CONFIG).is_file():
        what = (folder / CONFIG).read_text("utf-8")
    return hashlib.sha256(f"{what}\n{starts[0].get('time')}".encode()).hexdigest()[:16]


def local_files(folder: Path, identity: str) -> list[Path]:
    """The offline files of a run in its folder."""
    return sorted((folder / "wandb").glob(f"offline-run-*-{identity}"))


def labels(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Name, group, tags and configuration of a run, as arguments of `wandb.init`.

    The group is the part of the experiment's name before the last slash: arms and seeds of a study share it. The
    configuration is flat, so that a table of runs can be sorted by what differs between arms.
    """
    group, _, _ = experiment.name.rpartition("/")
    sweep = files.peek_json(folder.parent / LABELS)
    own = {key: sweep[key] for key in ("study", "size", "arm", "identity") if isinstance(sweep.get(key), str)}
    config = {key.replace(".", "/"): plain(value) for key, value in files.flatten(experiment.to_dict()).items()}
    return {
        "name": f"{experiment.name} seed {experiment.seed}",
        "group": group or experiment.name,
        "tags": [*([own["size"]] if "size" in own else []), *experiment.router.languages],
        "config": config | own,
    }


def plain(value: Any) -> Any:
    """A value of the configuration that a table can sort: a list as one text."""
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def start(experiment: Experiment, folder: Path, identity: str, place: Path, resume: bool = False) -> Any:
    """Starts the run in wandb, with local files in `place`. Without `resume`, one of the same id is replaced."""
    tracking = experiment.tracking
    what = {"id": identity, "resume": "allow" if resume else None, **labels(experiment, folder)}
    return open_run(tracking.mode, tracking.project, place, "tracking.mode", **what)


def open_run(
    mode: Literal["disabled", "offline", "online"], project: str, place: Path, option: str, **what: Any
) -> Any:
    """Starts a run in wandb that sends numbers only: no code, output, or data of the machine.

    Args:
      place: folder for its local files.
      option: the option that sets `mode`, for messages.
      what: further arguments of `wandb.init`.

    Raises:
      BimedixError: wandb is not installed or cannot start.
    """
    remedy = f'set {option} to "offline" or "disabled"'
    try:
        import wandb
    except ImportError as error:
        raise BimedixError(
            f"{option} is {mode}, and wandb cannot be imported ({error}); install it or {remedy}."
        ) from error
    settings = wandb.Settings(
        console="off",  # otherwise wandb captures the output of the program
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        silent=True,
    )
    try:
        return wandb.init(project=project, dir=str(place), mode=mode, settings=settings, **what)
    except (wandb.Error, OSError) as error:
        raise BimedixError(
            f"wandb cannot start in mode {mode} ({error}); log in with `wandb login`, or {remedy}."
        ) from error


@contextlib.contextmanager
def rebuilt(experiment: Experiment, folder: Path, mode: Literal["offline", "online"]) -> Iterator[Any]:
    """The run in wandb, made again from metrics.jsonl; what the block logs is added. It replaces an earlier mirror.

    Offline, the new local files replace the old ones when they are complete.
    """
    tracking = dataclasses.replace(experiment.tracking, mode=mode)
    experiment, identity = dataclasses.replace(experiment, tracking=tracking), run_id(folder)
    before = local_files(folder, identity)
    with contextlib.ExitStack() as stack:
        place = folder
        if mode == "offline":
            place = folder / ".wandb-rebuilt.partial"  # a second run of one second and id would have the same name
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            stack.callback(shutil.rmtree, place, ignore_errors=True)
        run = start(experiment, folder, identity, place)
        try:
            for line in read_metrics(folder):
                run.log(flat_numbers(line), step=line["step"])
            yield run
        except BaseException:
            run.finish(exit_code=1)
            raise
        run.finish(exit_code=0)
        if mode == "offline":
            for old in before:
                shutil.rmtree(old)
            (folder / "wandb").mkdir(exist_ok=True)
            for new in local_files(place, identity):
                new.rename(folder / "wandb" / new.name)
            for link in (folder / "wandb").iterdir():
                if not link.exists():  # it led to the old files
                    link.unlink()


def load_picture(lines: Sequence[dict[str, Any]], scratch: Path) -> dict[str, Any]:
    """The load of the experts as an image of wandb, drawn into the folder `scratch`."""
    import wandb

    from bimedix_jax.training.picture import draw_load  # with matplotlib, which a run needs at its end only

    return {"load": wandb.Image(str(draw_load(lines, scratch / "load.png")))}


def flat_numbers(line: dict[str, Any], layers: int = LAYERS_SHOWN) -> dict[str, float]:
    """Flattens a line: scalars unchanged, nested names joined by /, and mean, minimum and maximum of a list.

    A list over layers also has some of its layers, evenly spaced from the first to the last: as curves of their own,
    those of 32 layers would hide each other. Lists of a language or group have no single layers. The shares of single
    experts are in the picture of the load only.
    """
    flat: dict[str, float] = {}
    for name, value in line.items():
        if name in ("step", "load"):
            continue
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": number for key, number in flat_numbers(value, layers=0).items()}
        elif isinstance(value, list):
            numbers = [x for row in value for x in (row if isinstance(row, list) else [row])]
            flat |= {
                f"{name}/mean": math.fsum(numbers) / len(numbers),
                f"{name}/min": min(numbers),
                f"{name}/max": max(numbers),
            }
            if layers and len(numbers) == len(value):
                flat |= {f"{name}/layer_{place}": value[place] for place in spread(len(value), layers)}
        else:
            flat[name] = value
    return flat


def spread(length: int, number: int) -> list[int]:
    """At most `number` indices of a list, evenly spaced, with the first and the last."""
    count = min(length, number)
    return sorted({round(place * (length - 1) / max(count - 1, 1)) for place in range(count)})
