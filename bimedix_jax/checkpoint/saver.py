"""Saves training states in the background: a step waits until its state is in host memory, not on the disk.

On CPUs nothing is copied: Orbax reads views of the arrays, and while there is a view, JAX gives the next step new
buffers (`pytest tests/checkpoint/test_saver.py`).
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from bimedix_jax import distributed
from bimedix_jax.checkpoint.steps import save_step, step_folder, steps_in
from bimedix_jax.errors import BimedixError, problem_of
from bimedix_jax.process.clock import Clock

log = logging.getLogger(__name__)


class Saver:
    """Writes one checkpoint at a time. At the end of its block the last one is complete, or its error is raised.

    All processes of a run call `save` and `wait` at the same steps.

    Args:
      folder, keep, before: as in `save_step`.

    Attributes:
      stalls: seconds for which each call of `save` blocked.
      writes: seconds from each call until its checkpoint was complete.
    """

    def __init__(self, folder: Path, keep: int, before: Sequence[Path] = ()):
        self.folder, self.keep, self.before = folder, keep, before
        self.stalls: list[float] = []
        self.writes: list[float] = []
        self._clock = Clock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[int, Future[None]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if self._writing is None:
            return
        if error is None:
            self.wait()
        elif failure := self._writing[1].exception():
            log.error("%s", self._explained(self._writing[0], failure))

    def save(self, step: int, state: Any, position: dict[str, Any]) -> float:
        """Begins to write a checkpoint, after the one before is complete. Returns the seconds that this took.

        Raises:
          BimedixError: this or the previous checkpoint cannot be written.
        """
        began = time.perf_counter()
        self.wait()
        if jump := self._clock.jump():
            log.warning(
                "the clock of this machine jumped by %+.0f s before step %d; times in run.json may be wrong, but "
                "nothing else depends on the clock",
                jump,
                step,
            )
        copied = threading.Event()
        future = self._thread.submit(self._write, step, state, position, copied)
        self._writing = step, future
        future.add_done_callback(lambda _: copied.set())  # an error ends the wait too
        copied.wait()
        self.check()
        self.stalls.append(time.perf_counter() - began)
        return self.stalls[-1]

    def _write(self, step: int, state: Any, position: dict[str, Any], copied: threading.Event) -> None:
        began = time.perf_counter()
        save_step(self.folder, step, state, position, self.keep, copied.set, self.before)
        self.writes.append(time.perf_counter() - began)

    def check(self) -> None:
        """Raises the error of a save that has failed already. With several processes, `wait` does that."""
        if self._writing is not None and self._writing[1].done() and not distributed.is_multiprocess():
            self.wait()

    def wait(self) -> None:
        """Returns when the last checkpoint is complete.

        Raises:
          BimedixError: it cannot be written.
        """
        if self._writing is None:
            return
        (step, future), self._writing = self._writing, None
        failure = future.exception()
        if distributed.any_process(failure is not None):
            raise self._explained(step, failure) from failure

    def _explained(self, step: int, failure: BaseException | None) -> BaseException:
        """The error of a save as one sentence. An error of the program itself is returned unchanged."""
        if failure is None:
            return BimedixError(f"Another process could not save step {step}; its output has the reason.")
        if not isinstance(failure, BimedixError | OSError | ValueError | RuntimeError):
            return failure
        cause = failure.__cause__ if isinstance(failure, BimedixError) and failure.__cause__ else failure
        problem = problem_of(cause) or str(cause).splitlines()[0][:200]
        older = [other for other in steps_in(self.folder) if other != step]
        kept = f"the newest checkpoint is that of step {older[-1]}" if older else "there is no earlier checkpoint"
        return BimedixError(
            f"The checkpoint {step_folder(self.folder, step)} cannot be written: {problem.rstrip('.')}; {kept}. "
            "Correct this and resume the run with --resume."
        )

    def finish(self, console: Console) -> None:
        """`wait`, and prints what saving has cost."""
        self.wait()
        count = len(self.stalls)
        if count:
            console.print(
                f"{count} checkpoint{'s' if count > 1 else ''}: the steps waited {sum(self.stalls):.2f} s in all, "
                f"{max(self.stalls):.2f} s at most; writing took {max(self.writes, default=0.0):.2f} s at most",
                highlight=False,
            )
