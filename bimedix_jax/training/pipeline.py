"""Host work during a step on the devices: reading the next batch, and writing the line of the previous step."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import jax

from bimedix_jax.training.metrics import is_finite, plain
from bimedix_jax.training.observe import Observer
from bimedix_jax.training.skips import Skips

Batch = TypeVar("Batch")
POLL_SECONDS = 0.002
"""How often a loop that waits for a batch looks whether the devices have become idle."""


class ReadAhead(Generic[Batch]):
    """The batches of steps `first` to `last` - 1 in order. A thread reads each one while the previous one is used.

    There is one thread, so that files are read in order and at most one batch waits.
    """

    def __init__(
        self,
        read: Callable[[int], Batch],
        first: int,
        last: int,
        waited: Callable[[float], None] = lambda seconds: None,
    ):
        self.read, self.step, self.last, self.waited = read, first, last, waited
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

    def next(self, busy: Callable[[], bool] = lambda: False) -> Batch:
        """The batch of the next step. An error while reading it is raised here.

        Args:
          busy: whether the devices still run an earlier step. `waited` is called with the seconds after that in which
            there was no batch.

        Raises:
          IndexError: there is no further step.
        """
        if self._ahead is None:
            raise IndexError(f"there is no step {self.step}")
        while busy() and not self._ahead.done():
            wait([self._ahead], POLL_SECONDS)
        began = time.perf_counter()
        batch = self._ahead.result()
        self.waited(time.perf_counter() - began)
        self.step += 1
        self._start()
        return batch


class LateLines:
    """Writes the lines of metrics.jsonl one step late.

    Fetching the metrics of a step blocks until it ends. If the host did that before it launches the next step, the
    devices would be idle.

    A step's `seconds` run from the end of the previous step, or from `restart_clock`. A skipped step has no line.
    """

    def __init__(
        self, skips: Skips, writers: Sequence[Callable[[dict[str, Any]], None]], observer: Observer | None = None
    ):
        self.skips, self.writers, self.observer = skips, writers, observer
        self.last: dict[str, Any] = {}
        self.timings: dict[str, float] = {}
        """What the next line has besides, such as how long the save before it blocked."""
        self._waiting: tuple[int, dict[str, Any]] | None = None
        self.restart_clock()

    def busy(self) -> bool:
        """Whether the devices still run the last added step."""
        loss: Any = None if self._waiting is None else self._waiting[1]["loss"]
        return isinstance(loss, jax.Array) and not loss.is_ready()  # pyright: ignore[reportAttributeAccessIssue]

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
        line = {"step": step, **(plain(metrics) if self.observer is None else self.observer.plain(metrics))}
        began, self._began = self._began, time.perf_counter()
        if not is_finite(line):
            if self.observer is not None:
                self.observer.goodput.lost["skipped"] += self._began - began
            self.skips.add(step, line["loss"], line["grad_norm"])
            return
        self.skips.finite()
        seconds = self._began - began
        line |= {"seconds": seconds, "tokens_per_second": line["tokens"] / seconds}
        line |= self.timings
        self.timings = {}
        line |= {} if measure is None else measure()
        line |= {} if self.observer is None else self.observer.timings(line)
        for write in self.writers:
            write(line)
        self.last = line
