"""Steps whose loss or gradient is not finite: their records, and another order of data after several in a row.

skipped.jsonl   a line for each skipped step: step, how often the data had been reordered by then, loss, gradient norm
                and the ids of all records in its rows
orders.json     the steps from which the remaining batches were reordered, one for each time the run went back

The step itself leaves the state unchanged on the device (training/step.py). Here the host counts and decides. All
decisions follow from the losses, so a run that is killed and resumed makes the same ones.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment
from bimedix_jax.files import read_json, write_text
from bimedix_jax.training.metrics_file import readable
from bimedix_jax.training.rows import Rows

SKIPPED, ORDERS = "skipped.jsonl", "orders.json"
SHOWN_IDS = 3


class Diverged(BimedixError):
    """As many steps in a row were skipped as the experiment allows."""


def read_skips(folder: Path) -> list[dict[str, Any]]:
    """The lines of skipped.jsonl. An incomplete last line, after a kill, is left out."""
    return [value for _, value in readable(folder / SKIPPED)]


def read_orders(folder: Path) -> list[int]:
    """The steps from which the batches were reordered, in the order in which that happened."""
    if not (folder / ORDERS).is_file():
        return []
    return read_json(folder / ORDERS, dict[str, list[int]], "restore it from a copy, or start a new run")["from_step"]


def write_orders(folder: Path, orders: Sequence[int]) -> None:
    write_text(folder / ORDERS, json.dumps({"from_step": list(orders)}) + "\n")


def reordered(rows: Rows, orders: Sequence[int], seed: int) -> Rows:
    """`rows` with the batches of the remaining steps permuted, once for each step in `orders`.

    Every batch is still read exactly once, so an epoch stays an epoch.
    """
    if not orders:
        return rows
    places = np.arange(rows.steps)
    for number, first in enumerate(orders):
        draw = np.random.default_rng([seed, number, first])
        places[first:] = draw.permutation(places[first:])

    def place(step: int) -> int:
        return int(places[step])

    return dataclasses.replace(
        rows,
        batch=lambda step, positions: rows.batch(place(step), positions),
        whole=lambda step: rows.whole(place(step)),
    )


class Skips:
    """Counts skipped steps, writes down their records and warns.

    Args:
      folder: of the run. Only one process passes `writes`, and all of them count.
      done: steps done before, by this process or an earlier one.
      order: how often the data were reordered.
    """

    def __init__(
        self, experiment: Experiment, folder: Path, rows: Rows, done: int, order: int, console: Console, writes: bool
    ):
        self.experiment, self.folder, self.rows = experiment, folder, rows
        self.order, self.console, self.writes = order, console, writes
        lines = read_skips(folder)
        self.known = {line["step"] for line in lines if line["order"] == order}
        self.in_a_row = 0
        while done - self.in_a_row in self.known:
            self.in_a_row += 1
        if writes and (folder / SKIPPED).exists():  # without an incomplete last line
            write_text(folder / SKIPPED, "".join(json.dumps(line) + "\n" for line in lines))

    def finite(self) -> None:
        """A step was not skipped."""
        self.in_a_row = 0

    def add(self, step: int, loss: float, grad_norm: float) -> None:
        """Step `step` (from 1) was skipped.

        Raises:
          Diverged: it was the last one in a row that may be.
        """
        self.in_a_row += 1
        if self.writes:
            ids = [segment.id for row in self.rows.whole(step - 1) for segment in row.segments]
            self._write(step, loss, grad_norm, ids)
            self.console.print(
                f"[bold yellow]step {step} skipped[/]: loss {loss}, gradient norm {grad_norm}. Weights and moments are "
                f"unchanged; {SKIPPED} lists its {len(ids)} records ({shown(ids)})",
                highlight=False,
            )
        if self.in_a_row >= self.experiment.skip_limit:
            raise Diverged(
                f"Step {step}: loss {loss}, gradient norm {grad_norm}; {counted(self.in_a_row)} skipped in a row."
            )

    def _write(self, step: int, loss: float, grad_norm: float, ids: list[str]) -> None:
        if step in self.known:  # a resumed run repeats it
            return
        self.known.add(step)
        line = {"step": step, "order": self.order, "loss": str(loss), "grad_norm": str(grad_norm), "records": ids}
        with (self.folder / SKIPPED).open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line) + "\n")


def count_skips(folder: Path, console: Console) -> int:
    """The number of skipped steps of a run. Prints it."""
    skipped = len(read_skips(folder))
    if skipped:
        console.print(
            f"[bold yellow]skipped steps: {skipped}[/], listed with their records in {folder / SKIPPED}",
            highlight=False,
        )
    return skipped


def shown(ids: Sequence[str]) -> str:
    return ", ".join([*ids[:SHOWN_IDS], *(["..."] if len(ids) > SHOWN_IDS else [])])


def counted(steps: int) -> str:
    return "1 step was" if steps == 1 else f"{steps} steps were"


def stopped(error: Diverged, experiment: Experiment, folder: Path, kept: int) -> BimedixError:
    """The report of a run that may not go back again. `kept` is the step of its newest checkpoint, 0 without."""
    since = f"the last checkpoint is that of step {kept}" if kept else "there is no checkpoint before it"
    back = f" (the data were reordered {experiment.reorders} times)" if experiment.reorders else ""
    return BimedixError(
        f"{error} The run stops{back}; {since}, and {folder / SKIPPED} lists the records of these steps. Lower "
        "optimiser.learning_rate or clip_norm, or remove these records, and start a new run."
    )
