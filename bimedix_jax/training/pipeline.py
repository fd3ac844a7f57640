"""Host work during a step on the devices: reading the next batch, and writing the line of the previous step."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from bimedix_jax.training.metrics import is_finite, plain
from bimedix_jax.training.skips import Skips

Batch = TypeVar("Batch")


class ReadAhead(Generic[Batch]):
    """The batches of steps `first` to `last` - 1 in order. A thread reads each one while the previous one is used.

    There is one thread, so that files are read in order and at most one batch waits.
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
        """The batch of the next step. An error while reading it is raised here.

        Raises:
          IndexError: there is no further step.
        """
        if self._ahead is None:
            raise IndexError(f"there is no step {self.step}")
        batch = self._ahead.result()
        self.step += 1
        self._start()
        return batch


class LateLines:
    """Writes the lines of metrics.jsonl one step late.

    Fetching the metrics of a step blocks until it ends. If the host did that before it launches the next step, the
    devices would be idle.

    A step's `seconds` run from the end of the previous step, or from `restart_clock`. A skipped step has no line.
    """

    def __init__(self, skips: Skips, writers: Sequence[Callable[[dict[str, Any]], None]]):
        self.skips, self.writers = skips, writers
        self.last: dict[str, Any] = {}
        self.timings: dict[str, float] = {}
        """What the next line has besides, such as how long the save before it blocked."""
        self._waiting: tuple[int, dict[str, Any]] | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Excludes the time since the last step ended from the seconds of the next step."""
        self._began = time.perf_counter()

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Adds the metrics of a launched step, and writes the line of the step before it."""
        self.settle()
        self._waiting = step, metrics

    def settle(self, measure: Callable[[], dict[str, Any]] | None = None) -> None:
        """Waits for the last added step, and writes its line, extended by the result of `measure`.

        Raises:
          Diverged: the step was skipped, as the last one in a row that may be.
        """
        if self._waiting is None:
            return
        (step, metrics), self._waiting = self._waiting, None
        line = {"step": step, **plain(metrics)}
        began, self._began = self._began, time.perf_counter()
        if not is_finite(line):
            self.skips.add(step, line["loss"], line["grad_norm"])
            return
        self.skips.finite()
        seconds = self._began - began
        line |= {"seconds": seconds, "tokens_per_second": line["tokens"] / seconds}
        line |= self.timings
        self.timings = {}
        line |= {} if measure is None else measure()
        for write in self.writers:
            write(line)
        self.last = line
