"""Several processes as one program: joining them, exchanging values, and stopping when one of them dies.

`jax.distributed` does the work. It detects the processes of SLURM, TPU pods, Open MPI and Kubernetes; elsewhere three
environment variables name the coordinator and number the processes. Every process runs the same command.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bimedix_jax.errors import BimedixError

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 40
"""A process without a heartbeat for this long counts as dead; the others learn of it within about as long again."""
START_SECONDS = 300
"""How long the processes wait for each other when they start."""
VARIABLES = ("BIMEDIX_COORDINATOR", "BIMEDIX_PROCESSES", "BIMEDIX_PROCESS")
"""host:port of process 0, number of processes, and the number of this process from 0; for plain ssh and tests."""


def start() -> None:
    """Joins the other processes of this run, for `--distributed`. Call it before any other use of JAX.

    Raises:
      BimedixError: JAX detects no cluster and VARIABLES are not set, or the other processes cannot be reached.
    """
    # collectives between CPU processes use Gloo; this has no effect on accelerators
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if given and len(given) < len(VARIABLES):
        missing = ", ".join(name for name in VARIABLES if name not in given)
        raise BimedixError(f"{', '.join(given)} is set, but {missing} is not; set all of them, or none.")
    chosen: dict[str, Any] = {}
    if given:
        coordinator, processes, process = (given[name] for name in VARIABLES)
        if not (processes.isdigit() and process.isdigit() and int(process) < int(processes)):
            raise BimedixError(f"There is no process {process} of {processes}; BIMEDIX_PROCESS counts from 0.")
        chosen = {"coordinator_address": coordinator, "num_processes": int(processes), "process_id": int(process)}
    try:
        jax.distributed.initialize(
            **chosen, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, initialization_timeout=START_SECONDS
        )
    except (ValueError, RuntimeError) as error:  # JaxRuntimeError is a RuntimeError
        raise BimedixError(
            f"The processes of this run cannot connect to each other ({str(error).splitlines()[0]}); start them with "
            f"SLURM, on a TPU pod or with mpirun, or set {', '.join(VARIABLES)} for each (see scripts/launch/)."
        ) from error


def is_process_zero() -> bool:
    """Whether this process writes the files and prints progress."""
    return jax.process_index() == 0


def is_multiprocess() -> bool:
    return jax.process_count() > 1


def any_process(condition: bool) -> bool:
    """Whether the condition holds on any process. Every process must call this at the same point."""
    return bool(np.max(multihost_utils.process_allgather(np.int32(condition)))) if is_multiprocess() else condition


def any_process_later(condition: Callable[[], bool]) -> Callable[[], bool]:
    """`any_process` without blocking: returns a function that gives the answer.

    With several processes the condition is evaluated and exchanged now; the returned function waits at most for the
    programs that were launched before. With one process the condition is evaluated when the function is called.
    """
    if not is_multiprocess():
        return condition
    devices = np.array(jax.devices()).reshape(jax.process_count(), -1)
    mesh = Mesh(devices, ("process", "device"))
    each = multihost_utils.host_local_array_to_global_array(np.array([condition()]), mesh, P("process"))
    anyone = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))(each)
    return lambda: bool(anyone.addressable_data(0))


def on_process_zero(action: Callable[[], Any]) -> None:
    """Runs an action on process 0. If it fails there, all processes raise."""
    failure: Exception | None = None
    if is_process_zero():
        try:
            action()
        except Exception as error:
            if not is_multiprocess():
                raise
            failure = error
    if any_process(failure is not None):
        raise failure or BimedixError("Process 0 failed; its output has the reason.")


def broadcast_token(token: str) -> str:
    """The ASCII token of process 0, returned on every process."""
    if not is_multiprocess():
        return token
    raw = np.frombuffer(token.encode("ascii"), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(raw))).decode("ascii")


def on_host(value: jax.Array) -> np.ndarray:
    """The whole array in host memory, on every process.

    If the array is sharded over several processes, all of them must call this.
    """
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


LOST = ("closed by peer", "connection reset", "socket closed", "gloo", "coordination", "barrier", "unavailable")
"""Parts of the messages with which JAX's runtime reports that a process has died."""


@contextlib.contextmanager
def joined(wanted: bool) -> Iterator[None]:
    """Runs the block as one of several processes, if `wanted`. If another one dies, this one exits within a minute.

    If the runtime raises an error for it, one sentence is printed. If the runtime ends the process itself, the output
    has the runtime's own message. In both cases the exit code is not 0, and the checkpoints remain valid.
    """
    if not wanted:
        yield
        return
    start()
    try:
        yield
    except Exception as error:
        print(f"error: {lost_peer(error) or error}", file=sys.stderr)
        if not isinstance(error, BimedixError):
            log.debug("", exc_info=error)
        exit_without_waiting(1)
    jax.distributed.shutdown()


def lost_peer(error: BaseException) -> str | None:
    """A one-sentence message if the error means that another process died, else None."""
    text = str(error)
    if isinstance(error, BimedixError) or not any(sign in text.lower() for sign in LOST):
        return None
    return (
        f"another process of this run has stopped, so process {jax.process_index()} stops too "
        f"({text.splitlines()[0][:160]}); read the output of that process, then restart all of them with --resume."
    )


def exit_without_waiting(code: int) -> None:
    """Exits immediately: the normal shutdown of JAX's runtime would wait for processes that are dead."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
