"""Mirrors metrics.jsonl to Weights & Biases: numbers and the configuration, but no text, code or machine data.

A resumed run is a new wandb run in the same group, since resuming an offline run would give overlapping steps.
"""

import math
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment


class Mirror:
    """Logs each line of metrics.jsonl. It does nothing in mode "disabled" or without an experiment.

    Raises:
      BimedixError: wandb is enabled and cannot start.
    """

    def __init__(self, experiment: Experiment | None, folder: Path, step: int):
        self.run = None
        if experiment is not None and experiment.tracking.mode != "disabled":
            self.run = start(experiment, folder, step)

    def write(self, line: dict[str, Any]) -> None:
        if self.run is not None:
            self.run.log(flat_numbers(line), step=line["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.run is not None:
            self.run.finish(exit_code=0 if kind is None else 1)


def start(experiment: Experiment, folder: Path, step: int) -> Any:
    tracking = experiment.tracking
    remedy = 'set tracking.mode to "offline" or "disabled"'
    try:
        import wandb
    except ImportError as error:
        raise BimedixError(
            f"tracking.mode is {tracking.mode}, and wandb cannot be imported ({error}); install it or {remedy}."
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
        return wandb.init(
            project=tracking.project,
            name=experiment.name if step == 0 else f"{experiment.name} from step {step}",
            group=experiment.name,
            dir=str(folder),
            mode=tracking.mode,
            config=experiment.to_dict(),
            settings=settings,
        )
    except (wandb.Error, OSError) as error:
        raise BimedixError(
            f"wandb cannot start in mode {tracking.mode} ({error}); log in with `wandb login`, or {remedy}."
        ) from error


def flat_numbers(line: dict[str, Any]) -> dict[str, float]:
    """Flattens a line: scalars unchanged, mean, minimum and maximum of a list over layers, nested names joined by /."""
    flat: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": number for key, number in flat_numbers(value).items()}
        elif isinstance(value, list):
            numbers = [x for row in value for x in (row if isinstance(row, list) else [row])]
            flat |= {
                f"{name}/mean": math.fsum(numbers) / len(numbers),
                f"{name}/min": min(numbers),
                f"{name}/max": max(numbers),
            }
        elif name != "step":
            flat[name] = value
    return flat
