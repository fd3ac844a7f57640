"""Routes of a fixed set of rows over training: recorded at steps 0, 1, 2, 4, 8, ... and after the last.

    probe/step-00000004/   a recording (routing/recording.py)
    probe/curves.csv       by step and layer: saturation, and how the routes changed since the step before

Saturation is the overlap of each token's experts with those of the last step (OLMoE, arXiv 2409.02060).
"""

import csv
import dataclasses
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bimedix_jax import distributed, files
from bimedix_jax.experiment import Experiment
from bimedix_jax.routing.recorded import counting_roles
from bimedix_jax.routing.recorded_data import Data
from bimedix_jax.routing.recorder import RecordSettings, record_routes
from bimedix_jax.routing.recording import MANIFEST, Recording
from bimedix_jax.training.run_folder import PROBE
from bimedix_jax.training.state import Structure, TrainState

CURVES = "curves.csv"
COLUMNS = ("step", "layer", "saturation", "changed", "overlap")


@dataclasses.dataclass(frozen=True)
class Probe:
    """Records the routes of a run's probe. Without one it does nothing."""

    data: Data | None
    folder: Path
    structure: Structure
    frozen: dict[str, Any]
    last: int

    @classmethod
    def of_run(
        cls,
        experiment: Experiment,
        folder: Path,
        structure: Structure,
        state: TrainState,
        frozen: dict[str, Any],
        last: int,
    ) -> "Probe":
        """The probe of a run that is at the step of `state`, whose routes it records.

        Recordings of later steps are removed: the run that made them has been interrupted, and repeats them.
        """
        probe = cls(data_of(experiment), folder / PROBE, structure, frozen, last)
        if distributed.is_process_zero():
            for step, path in recorded_steps(folder):
                if step > int(state.step):
                    shutil.rmtree(path)
        probe.record(state, int(state.step))
        return probe

    def is_due(self, step: int) -> bool:
        """Whether the routes of this step are recorded: of powers of two, and of the last."""
        return self.data is not None and (step == self.last or step & (step - 1) == 0)

    def record(self, state: TrainState, step: int) -> None:
        """Records the routes, unless they are recorded or the step is none that is. Every process must call it."""
        out = self.folder / f"step-{step:08d}"
        if self.data is None or not self.is_due(step) or distributed.any_process((out / MANIFEST).exists()):
            return
        model = self.structure.merge(state.params, {**self.frozen, **state.router})
        record_routes(model, self.data, out, RecordSettings(), options={"step": step})
        if step == self.last:
            distributed.on_process_zero(lambda: write_curves(self.folder.parent))


def data_of(experiment: Experiment) -> Data | None:
    """The rows of the experiment's probe; None without one.

    Raises:
      BimedixError: the folder is none of packed rows, or was changed.
    """
    return None if experiment.probe is None else Data.packed(experiment.probe)


def recorded_steps(run: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of the recordings of a run, in order."""
    for path in sorted((run / PROBE).glob("step-*")):
        yield int(path.name.removeprefix("step-")), path


def curves(run: Path) -> list[dict[str, float]]:
    """Saturation and changes of routes, means over the records of the probe, by step and layer.

    `changed` is the share of tokens with another set of experts than at the recorded step before, `overlap` the share
    of experts that were kept; both are NaN at the first step. Template tokens and first positions are left out.
    """
    from bimedix_jax.routing.measures import flips, saturation  # which need SciPy: a second at the start of every run

    steps, found, record_N = [], [], np.zeros(0, int)
    recording: Recording | None = None
    for step, path in recorded_steps(run):
        recording = Recording.open(path)
        columns = recording.tokens("record", "role", "experts")
        kept_N = counting_roles(recording.manifest.roles, None)[columns["role"]]
        record_N = columns["record"][kept_N].astype(np.int64)
        steps.append(step)
        found.append(columns["experts"][kept_N].swapaxes(0, 1))
    if recording is None:
        return []
    records, experts = recording.manifest.records, recording.manifest.experts
    saturated_SL = np.nanmean(saturation(np.stack(found), record_N, records, experts), axis=1)
    rows = []
    for place, step in enumerate(steps):
        changed_L = overlap_L = np.full(saturated_SL.shape[1], np.nan)
        if place:
            change = flips(found[place - 1], found[place], record_N, records, experts)
            changed_L, overlap_L = np.nanmean(change.changed_RL, axis=0), np.nanmean(change.overlap_RL, axis=0)
        for layer in recording.layer_numbers:
            values = (step, layer, saturated_SL[place, layer], changed_L[layer], overlap_L[layer])
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def write_curves(run: Path) -> None:
    """Writes curves.csv of a run; empty cells where a value does not exist."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in curves(run):
        writer.writerow(["" if np.isnan(row[name]) else row[name] for name in COLUMNS])
    files.write_text(run / PROBE / CURVES, text.getvalue())
