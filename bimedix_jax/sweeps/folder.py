"""The folder of a sweep: which runs it has, and how far each of them is.

OUT/report.md, .csv, .html          results of all studies in the folder, from metrics.jsonl and evaluation.json alone
OUT/STUDY-SIZE-effects.png, -curves.png
                                    pictures of these results
OUT/timings.md, .csv                wall time, starts and crashes
OUT/inputs/NAME-HASH/               what runs read (inputs.py)
OUT/cache/                          compiled programs
OUT/STUDY-SIZE/study.json           arms, seeds, primary contrast and the runs that count
OUT/STUDY-SIZE/incidents.jsonl      a line for each start and end of a run
OUT/STUDY-SIZE/runs/ARM-seedN-HASH/
    arm.json                        the resolved experiment, and how it is evaluated
    training/                       the run (training/run_folder.py)
    evaluation.json                 written last: the run is finished
    crash.json                      why it failed; it is not started again before --retry
    log.txt                         output of all starts
    run.lock                        held by the process that runs it

A run is known by its identity, the hash of the resolved experiment, its seed, its data and its base. Another experiment
is another folder, so a changed arm runs again and nothing is overwritten.
"""

import dataclasses
import datetime
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from bimedix_jax import files
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment
from bimedix_jax.sweeps.inputs import Fingerprints, combined
from bimedix_jax.sweeps.study import Size, Study
from bimedix_jax.training.metrics_file import METRICS

ARM, EVALUATION, CRASH, LOG, TRAINING = "arm.json", "evaluation.json", "crash.json", "log.txt", "training"
CONFIG = "config.json"
"""In a folder of a training run: it has begun."""
STUDY, INCIDENTS, RUNS, INPUTS, CACHE = "study.json", "incidents.jsonl", "runs", "inputs", "cache"

State = Literal["waiting", "unfinished", "crashed", "finished", "elsewhere"]
"""Unfinished: it has started and will resume. Elsewhere: another process is running it."""

ELSEWHERE = ("name", "tracking")
"""Fields of an experiment that do not change its result."""
PLACES = ("model.path", "data.path", "data.heldout")
"""Fields that name files. Their content counts, not their place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One arm with one seed, and its folder."""

    study: str
    size: str
    arm: str
    seed: int
    experiment: Experiment
    identity: str
    folder: Path
    heldout: str | None = None
    limit: int | None = None

    @property
    def label(self) -> str:
        return f"{self.arm} seed {self.seed}"

    def state(self) -> State:
        """How far the run is, from the files in its folder."""
        if is_finished(self.folder):
            return "finished"
        if (self.folder / CRASH).is_file():
            return "crashed"
        return "unfinished" if (self.folder / TRAINING / CONFIG).is_file() else "waiting"

    def reason(self) -> str | None:
        """Why it crashed."""
        return files.peek_json(self.folder / CRASH).get("reason")

    def write(self) -> None:
        """Writes arm.json, which the process of the run reads."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {**fields, "experiment": self.experiment.to_dict()}
        del plain["folder"]
        write_json(self.folder / ARM, plain)


def is_finished(folder: Path) -> bool:
    return "identity" in files.peek_json(folder / EVALUATION)


def identity(experiment: Experiment, prints: Fingerprints, heldout: str | None, limit: int | None) -> str:
    """SHA-256 of everything that a run's result depends on, except for the version of the program and the machine.

    Raises:
      BimedixError: the base or the data are missing.
      OSError: a file of rules or records is missing.
    """
    plain = experiment.to_dict()
    for name in ELSEWHERE:
        del plain[name]
    for name in PLACES:
        part, key = name.split(".")
        del plain[part][key]
    model, data = experiment.model, experiment.data
    if experiment.intervene is not None:
        plain["intervene"] = prints.of_file(Path(experiment.intervene))
    content = {
        "experiment": plain,
        "base": None if model.path is None else prints.of_model(model.path, model.revision),
        "data": None if data.path is None else prints.of_rows(data.path),
        "heldout_rows": None if data.heldout is None else prints.of_rows(data.heldout),
        "heldout": prints.of_file(Path(heldout)) if heldout not in (None, "sample") else heldout,
        "limit": limit,
    }
    return combined(content)


def study_folder(out: Path, study: str, size: str) -> Path:
    return out / f"{study}-{size}"


def run_of(
    study: Study, size: str, arm: str, seed: int, out: Path, changes: dict[str, Any], prints: Fingerprints, given: Size
) -> Run:
    """A run of the grid. `given` is the size with the options of the command line applied."""
    experiment = study.experiment(arm, seed, size, changes)
    found = identity(experiment, prints, given.heldout, given.limit)
    runs, end = study_folder(out, study.name, size) / RUNS, f"-seed{seed}-{found[:10]}"
    folder = runs / f"{arm}{end}"
    if not folder.is_dir():  # the same experiment had another name
        folder = next(iter(sorted(runs.glob(f"*{end}"))), folder)
    return Run(
        study=study.name,
        size=size,
        arm=arm,
        seed=seed,
        experiment=experiment,
        identity=found,
        folder=folder,
        heldout=given.heldout,
        limit=given.limit,
    )


def write_study(study: Study, size: str, runs: Sequence[Run], wanted: Iterable[Run], out: Path) -> list[dict[str, Any]]:
    """Writes study.json, from which reports are made. `runs` are all of the grid, `wanted` those of this command.

    Runs that earlier commands wanted stay wanted while their identity is the same.

    Returns: the declarations of `declarations`.

    Raises:
      BimedixError: the folder has another study of this name.
    """
    path = study_folder(out, study.name, size) / STUDY
    before = files.peek_json(path)
    earlier = {run["identity"] for run in before.get("runs", ())}
    place = str(study.path.resolve())
    if earlier and before.get("file", place) != place and not earlier & {run.identity for run in runs}:
        raise BimedixError(
            f"{path.parent} has the runs of another study, {before['file']}; pass another --out, or rename the file."
        )
    kept = earlier | {run.identity for run in wanted}
    declared = declarations(before, study, size, path.parent)
    document = {
        "study": study.name,
        "size": size,
        "file": place,
        "declarations": declared,
        "question": study.question,
        "primary": dataclasses.asdict(study.primary),
        "arms": list(study.arms),
        "runs": [
            {"arm": run.arm, "seed": run.seed, "identity": run.identity, "folder": f"{RUNS}/{run.folder.name}"}
            for run in runs
            if run.identity in kept
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    return declared


def declarations(before: dict[str, Any], study: Study, size: str, folder: Path) -> list[dict[str, Any]]:
    """Every declaration of the study in this folder: {primary, seeds, begun}.

    A change before the first step replaces the declaration. A later one is added, with the number of runs that had
    begun: it was made when results could be seen.
    """
    now = {"primary": dataclasses.asdict(study.primary), "seeds": list(study.seeds_of(study.size(size)))}
    earlier = before.get("declarations", [])
    if earlier and now == {name: earlier[-1][name] for name in now}:
        return earlier
    begun = sum(has_begun(folder / run["folder"]) for run in before.get("runs", ())) if earlier else 0
    return [*earlier, now | {"begun": begun}] if begun else [*earlier[:-1], now | {"begun": 0}]


def has_begun(folder: Path) -> bool:
    """Whether a run has logged a step."""
    metrics = folder / TRAINING / METRICS
    return metrics.is_file() and metrics.stat().st_size > 0


def read_studies(out: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, study.json) of every study in a sweep's folder, which may also be the folder of one study.

    Raises:
      BimedixError: there is none.
    """
    paths = [out / STUDY] if (out / STUDY).is_file() else sorted(out.glob(f"*/{STUDY}"))
    if not paths:
        raise BimedixError(f"{out} is not the folder of a sweep (no {STUDY} in it); name the --out of `bimedix sweep`.")
    remedy = "run `bimedix sweep` again, which writes it"
    return [(path.parent, files.read_json(path, dict[str, Any], remedy)) for path in paths]


def log_incident(run: Run, event: str, **facts: Any) -> None:
    """Appends a line to incidents.jsonl. One write in append mode is not torn by another process."""
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    line = {"time": time, "event": event, "arm": run.arm, "seed": run.seed, "identity": run.identity, **facts}
    descriptor = os.open(run.folder.parents[1] / INCIDENTS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(line, ensure_ascii=False) + "\n").encode())
    finally:
        os.close(descriptor)


def read_incidents(folder: Path) -> list[dict[str, Any]]:
    """The lines of incidents.jsonl; a line that a crash of the machine cut is left out."""
    path = folder / INCIDENTS
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def write_json(path: Path, value: Any) -> None:
    files.write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")
