"""Map a function over batches in a pool of worker processes, with results in order and bounded memory."""

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

_task: Callable[[Any], Any] | None = None  # the task of this worker process


def available_cores() -> int:
    """Number of cores that this process may use; a container or a batch system can limit it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_of(wanted: int | None) -> int:
    """The wanted number of worker processes, by default one per core.

    Raises:
        BimedixError: `wanted` is negative.
    """
    if wanted is not None and wanted < 0:
        raise BimedixError(f"--workers {wanted} is negative; give 0 to use no worker processes")
    return available_cores() if wanted is None else wanted


def ordered_map(task: Callable[[In], Out], batches: Iterable[In], workers: int) -> Iterator[Out]:
    """Yield `task` of each batch, in order. With 0 `workers` it runs in this process, with the same results.

    At most three batches per worker are submitted ahead of the consumer, which bounds the memory. `task` is pickled
    once for each worker, so large objects should be built in the worker. Workers are spawned, not forked: a fork would
    copy the state of threads that other libraries have started.

    Raises:
        BimedixError: a worker was killed, nearly always because memory ran out. Exceptions of `task` are passed on.
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
            "a worker process was killed, probably because memory ran out; lower --workers and run again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def batched(
    lines: Iterable[tuple[int, bytes]], records: int = 256, size: int = 1 << 20
) -> Iterator[list[tuple[int, bytes]]]:
    """Group numbered lines into lists of at most `records` lines; a list also ends once it has `size` bytes."""
    batch: list[tuple[int, bytes]] = []
    total = 0
    for line in lines:
        batch.append(line)
        total += len(line[1])
        if len(batch) == records or total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _start(task: Callable[[Any], Any]) -> None:
    global _task
    _task = task
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives Ctrl-C as well, and stops its workers
    # there is a worker per core already, so threads inside the libraries would only compete with each other
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"


def _end_with_parent() -> None:
    """Exit when the parent is killed; otherwise a worker would wait for its next batch forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run(batch: Any) -> Any:
    assert _task is not None
    return _task(batch)
