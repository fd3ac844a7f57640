"""One function over many batches in several processes: results in the order of the batches, bounded memory."""

import collections
import concurrent.futures
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from bimedix_jax.errors import BimedixError

In = TypeVar("In")
Out = TypeVar("Out")

_task: Callable[[Any], Any] | None = None  # what this worker process runs


def available_cores() -> int:
    """Cores that this process may use, which a container or a batch system can have lowered."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_of(wanted: int | None) -> int:
    """The number of processes that was asked for, one a core where none was.

    Raises:
        BimedixError: it is negative.
    """
    if wanted is not None and wanted < 0:
        raise BimedixError("there cannot be fewer than 0 workers; give --workers 0 to work in one process")
    return available_cores() if wanted is None else wanted


def ordered_map(task: Callable[[In], Out], batches: Iterable[In], workers: int) -> Iterator[Out]:
    """`task` of each batch, in order; `workers` 0 runs it in this process, with the same results.

    At most three batches a worker are under way or wait to be taken, however many there are. `task` is pickled once for
    each worker; what it builds for its work it should build there. Workers are fresh interpreters: forking would copy
    threads that other libraries have started.

    Raises:
        BimedixError: a worker was killed, which is nearly always for want of memory. What `task` raises comes through.
    """
    if workers == 0:
        yield from map(task, batches)
        return
    waiting: collections.deque[concurrent.futures.Future[Out]] = collections.deque()
    source = iter(batches)
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(task,)
    )
    try:
        waiting.extend(pool.submit(_run, batch) for batch in itertools.islice(source, 3 * workers))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(_run, batch) for batch in itertools.islice(source, 1))
            yield result
    except BrokenProcessPool as error:
        raise BimedixError(
            "a worker process was killed, probably for want of memory; give fewer --workers and run again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def batched(
    lines: Iterable[tuple[int, bytes]], records: int = 256, size: int = 1 << 20
) -> Iterator[list[tuple[int, bytes]]]:
    """Numbered lines in lists of at most `records`, closed early once they hold `size` bytes."""
    batch: list[tuple[int, bytes]] = []
    held = 0
    for line in lines:
        batch.append(line)
        held += len(line[1])
        if len(batch) == records or held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _start(task: Callable[[Any], Any]) -> None:
    global _task
    _task = task
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers in order
    # every core has its worker: threads of the libraries inside would only get into each other's way
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"


def _end_with_parent() -> None:
    """Leave when the parent is killed: a worker that waits for its next batch would otherwise wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run(batch: Any) -> Any:
    assert _task is not None
    return _task(batch)
