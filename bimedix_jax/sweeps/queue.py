"""Starts the runs of a sweep as processes, several at a time, and ends them with itself.

Each process leads a process group of its own, and reads from a pipe that only this process can write to. When this
process dies, however it dies, the pipe closes, and the process ends its group (`worker.tether`). So killing a sweep
leaves no run alive.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bimedix_jax.errors import BimedixError
from bimedix_jax.process import signals

POLL_SECONDS = 0.05
BUSY = 75
"""Exit code of a process whose folder another process holds (EX_TEMPFAIL of sysexits.h)."""
START_LINE = "=== start "
"""Begins the output of a start in a log."""


@dataclass(frozen=True)
class Job:
    """A command, and the file that its output is appended to."""

    name: str
    command: Sequence[str]
    log: Path


@dataclass(frozen=True)
class Share:
    """What one of several processes at a time may use: cores, and variables that name its devices."""

    cores: frozenset[int] | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Active:
    """A process that runs."""

    job: Job
    process: subprocess.Popen[bytes]
    share: Share
    began: float


def shares(jobs: int, environment: Mapping[str, str], gpus: int, cores: Sequence[int]) -> list[Share]:
    """The machine divided among `jobs` processes: GPUs where it has some, and cores.

    Args:
      gpus: GPUs of the machine; CUDA_VISIBLE_DEVICES in `environment` names fewer.

    Raises:
      BimedixError: there are fewer GPUs or cores than processes.
    """
    if jobs == 1:
        return [Share()]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    devices = [str(i) for i in range(gpus)] if visible is None else [name for name in visible.split(",") if name]
    if environment.get("JAX_PLATFORMS") == "cpu":
        devices = []
    for name, found in (("GPU", devices), ("core", cores)):
        if found and len(found) < jobs:
            raise BimedixError(f"--jobs is {jobs}, and this machine has {len(found)} {name}s to divide; lower --jobs.")
    divided = []
    for number in range(jobs):
        own = frozenset(part(cores, number, jobs))
        gpu = {"CUDA_VISIBLE_DEVICES": ",".join(part(devices, number, jobs))} if devices else {}
        divided.append(Share(own or None, gpu))
    return divided


def part(items: Sequence[object], number: int, parts: int) -> list:
    """Part `number` of `parts` equal ones; what cannot be divided is left over."""
    size = len(items) // parts
    return list(items[number * size : (number + 1) * size])


def machine() -> tuple[int, list[int]]:
    """(number of NVIDIA GPUs, cores that this process may use)."""
    gpus = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return gpus, cores


def start(job: Job, share: Share, environment: Mapping[str, str]) -> Active:
    """Starts a job in its own process group, tied to this process."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        log.write(f"{START_LINE}{time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        log.flush()
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**environment, **share.variables},
            process_group=0,
        )
    if share.cores is not None and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.sched_setaffinity(process.pid, share.cores)
    return Active(job, process, share, time.monotonic())


def send(active: Active, number: signal.Signals) -> None:
    """Sends a signal to the process group of a job."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(active.process.pid, number)


def end(active: Sequence[Active]) -> None:
    """Kills what still runs."""
    for one in active:
        if one.process.poll() is None:
            send(one, signal.SIGKILL)
            one.process.wait()


def run_jobs(
    jobs: Sequence[Job],
    divided: Sequence[Share],
    environment: Mapping[str, str],
    stopping: Callable[[], bool],
    started: Callable[[Job], None],
) -> Iterator[tuple[Job, int, float]]:
    """Runs jobs in order, as many at a time as there are shares.

    When `stopping` becomes true, the running jobs get SIGTERM and no other starts. Whatever ends this generator early,
    an error or a second Ctrl-C, kills the jobs.

    Yields: (job, exit code, seconds) of each job when it ends. A negative code is that of a signal.
    """
    waiting, active, free, told = list(jobs), list[Active](), list(divided), False
    with signals.on_abandon(lambda: end(active)):
        try:
            while waiting or active:
                if stopping() and not told:
                    told, waiting = True, []
                    for one in active:
                        one.process.terminate()  # alone: it ends what it has started after it has saved
                while waiting and free:
                    job = waiting.pop(0)
                    started(job)
                    active.append(start(job, free.pop(0), environment))
                ended = [one for one in active if one.process.poll() is not None]
                for one in ended:
                    active.remove(one)
                    free.append(one.share)
                    if one.process.returncode:
                        send(one, signal.SIGKILL)  # what it started and left
                    if one.process.stdin is not None:
                        one.process.stdin.close()
                    yield one.job, one.process.returncode, time.monotonic() - one.began
                if not ended and active:
                    time.sleep(POLL_SECONDS)
        finally:
            end(active)


def reason_of(log: Path, code: int) -> str:
    """One sentence for a job that failed: its last error message, or else the signal or the last line of its log."""
    text = log.read_text("utf-8", "replace").rpartition(START_LINE)[2] if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return errors[-1] if errors else (lines[-1] if lines else f"exit code {code}")
