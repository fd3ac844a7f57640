"""Makes the runs of a folder in Weights & Biases again, from metrics.jsonl and evaluation.json alone.

One run has one curve and one id, however often it was interrupted. The summary has the final held-out values, and two
tables the evaluation by group and the load of the experts. Numbers and pictures of numbers only: no text of a record.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from bimedix_jax import files
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import read
from bimedix_jax.sweeps.folder import EVALUATION, RUNS, STUDY
from bimedix_jax.sweeps.results import by_group
from bimedix_jax.training.metrics_file import METRICS, read_metrics
from bimedix_jax.training.tracking import CONFIG, load_picture, rebuilt, run_id


def run_folders(folder: Path) -> list[Path]:
    """Every run in a folder: the folder itself, those of a sweep, and any other below it.

    Runs of a sweep that no longer count, because their arm was changed, are left out, as in the report.

    Raises:
      BimedixError: there is none.
    """
    found = sorted(path.parent for path in folder.rglob(METRICS) if (path.parent / CONFIG).is_file())
    for path in folder.rglob(STUDY):
        counted = {path.parent / run["folder"] for run in files.peek_json(path).get("runs", ())}
        found = [run for run in found if path.parent / RUNS not in run.parents or counted & {*run.parents}]
    if not found:
        raise BimedixError(f"{folder} contains no run (no {METRICS} with a {CONFIG}); name the folder of one.")
    return found


def upload(
    folder: Path,
    mode: Literal["offline", "online"],
    project: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Rebuilds every run in `folder`. Returns its folder, id and steps for each."""
    done = []
    for run in run_folders(folder):
        identity, steps = rebuild(run, mode, project)
        tell(f"{run}: {steps} steps as {identity}")
        done.append({"folder": str(run), "id": identity, "steps": steps})
    return done


def rebuild(folder: Path, mode: Literal["offline", "online"], project: str | None = None) -> tuple[str, int]:
    """(id, steps) of a run, which is made again with its evaluation and a picture of its load."""
    import dataclasses

    experiment, lines = read(folder / CONFIG), read_metrics(folder)
    if project is not None:
        experiment = dataclasses.replace(experiment, tracking=dataclasses.replace(experiment.tracking, project=project))
    evaluation = files.peek_json(folder.parent / EVALUATION)
    with rebuilt(experiment, folder, mode) as run, tempfile.TemporaryDirectory() as scratch:
        if lines:
            add_results(run, lines, evaluation, Path(scratch))
    return run_id(folder), len(lines)


def add_results(run: Any, lines: Sequence[dict[str, Any]], evaluation: dict[str, Any], scratch: Path) -> None:
    """Adds the summary, the table of the evaluation and the picture of the load to a run of wandb."""
    import wandb

    last = lines[-1]["step"]
    found = load_picture(lines, scratch)
    groups = by_group(evaluation.get("records", ()))
    if groups:
        columns: list[str | int] = ["group", *next(iter(groups.values()))]
        found["evaluation"] = wandb.Table(columns=columns, data=[[name, *row.values()] for name, row in groups.items()])
    run.log(found, step=last)
    for name, row in groups.items():
        for metric in ("nats_per_token", "bits_per_byte"):
            run.summary[f"final/{metric}/{name}"] = row[metric]
    for name in ("trainable_parameters", "training_flops", "tokens"):
        if name in evaluation:
            run.summary[f"final/{name}"] = evaluation[name]
