"""What the host does while the devices take a step: it reads the next batch, and writes the line of the step before."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment
from bimedix_jax.training.metrics import is_finite, plain

Batch = TypeVar("Batch")


class ReadAhead(Generic[Batch]):
    """The batches of steps `first` to `last` - 1 in order, each read by one thread while the one before is used.

    One thread reads them all, so that files are read in one order, and a single batch waits on the devices.
    """

    def __init__(self, read: Callable[[int], Batch], first: int, last: int):
        self.read, self.step, self.last = read, first, last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: Future[Batch] | None = None

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _start(self) -> None:
        self._ahead = self._thread.submit(self.read, self.step) if self.step < self.last else None

    def next(self) -> Batch:
        """The batch of the next step; what went wrong while reading it is raised here.

        Raises:
          IndexError: there is none.
        """
        if self._ahead is None:
            raise IndexError(f"there is no step {self.step}")
        batch = self._ahead.result()
        self.step += 1
        self._start()
        return batch


class LateLines:
    """Lines of metrics.jsonl, each written one step late: to fetch the metrics of a step is to wait for its end, and
    the devices would be idle until the host has launched the next.

    A step's `seconds` are those since the step before was complete, or since `restart_clock`.
    """

    def __init__(self, experiment: Experiment, writers: Sequence[Callable[[dict[str, Any]], None]]):
        self.experiment, self.writers = experiment, writers
        self.last: dict[str, Any] = {}
        self._waiting: tuple[int, dict[str, Any]] | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out of the next step's seconds what was done since the last one was complete."""
        self._began = time.perf_counter()

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes the metrics of a step that has been launched, and writes the line of the step before it."""
        self.settle()
        self._waiting = step, metrics

    def settle(self, measure: Callable[[], dict[str, Any]] | None = None) -> None:
        """Waits until the last step that was added is complete, and writes its line with what `measure` adds to it.

        Raises:
          BimedixError: its loss is no number. The state of this step, and of any launched since, must not be saved.
        """
        if self._waiting is None:
            return
        (step, metrics), self._waiting = self._waiting, None
        line = {"step": step, **plain(metrics)}
        if not is_finite(line):
            raise BimedixError(diverged(line, self.experiment))
        began, self._began = self._began, time.perf_counter()
        seconds = self._began - began
        line |= {"seconds": seconds, "tokens_per_second": line["tokens"] / seconds}
        line |= {} if measure is None else measure()
        for write in self.writers:
            write(line)
        self.last = line


def diverged(line: dict[str, Any], experiment: Experiment) -> str:
    kept = (line["step"] - 1) // experiment.checkpoint_every * experiment.checkpoint_every
    since = f"the last checkpoint is that of step {kept}" if kept else "there is no checkpoint before it"
    return (
        f"Step {line['step']}: loss {line['loss']}, gradient norm {line['grad_norm']}. The run stops and saves nothing "
        f"of this step; {since}. Lower optimiser.learning_rate or clip_norm, or look at the rows of this step."
    )
