"""Several processes as one program: start, agreement, and what becomes of the others when one dies.

JAX's own runtime does the work (`jax.distributed`): it finds the processes of SLURM, TPU pods, Open MPI and Kubernetes
by itself; elsewhere three environment variables say who is who. Every process runs the same command.
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
"""Silence after which a process counts as dead; the others are told within about as long again."""
START_SECONDS = 300
"""How long processes wait for each other at the start."""
VARIABLES = ("BIMEDIX_COORDINATOR", "BIMEDIX_PROCESSES", "BIMEDIX_PROCESS")
"""host:port of process 0, number of processes, and this process's number from 0: for plain ssh and for tests."""


def start() -> None:
    """Joins the other processes of this run; to be called before any other use of JAX, by `--distributed`.

    Raises:
      BimedixError: no cluster is recognised and VARIABLES are not set, or the others cannot be reached.
    """
    # CPU processes reduce over Gloo; where there are accelerators this changes nothing
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
            f"The processes of this run do not find each other ({str(error).splitlines()[0]}); start them "
            f"by SLURM, on a TPU pod or with mpirun, or set {', '.join(VARIABLES)} in each (see scripts/launch/)."
        ) from error


def leader() -> bool:
    """Whether this process writes the files and speaks to the user."""
    return jax.process_index() == 0


def several() -> bool:
    return jax.process_count() > 1


def agree(asked: bool) -> bool:
    """Whether any process asks; all must call this at the same point."""
    return bool(np.max(multihost_utils.process_allgather(np.int32(asked)))) if several() else asked


def agree_later(asks: Callable[[], bool]) -> Callable[[], bool]:
    """`agree` without a wait: what it returns gives the answer, and waits no longer than for what was launched before.

    Several processes exchange their present answers; a single one is asked when the result is called.
    """
    if not several():
        return asks
    devices = np.array(jax.devices()).reshape(jax.process_count(), -1)
    mesh = Mesh(devices, ("process", "device"))
    each = multihost_utils.host_local_array_to_global_array(np.array([asks()]), mesh, P("process"))
    anyone = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))(each)
    return lambda: bool(anyone.addressable_data(0))


def by_leader(action: Callable[[], Any]) -> None:
    """Runs an action on process 0, and raises on all where it fails there."""
    failure: Exception | None = None
    if leader():
        try:
            action()
        except Exception as error:
            if not several():
                raise
            failure = error
    if agree(failure is not None):
        raise failure or BimedixError("process 0 stopped; its message says why.")


def shared_token(token: str) -> str:
    """Process 0's token (ASCII), on all."""
    if not several():
        return token
    raw = np.frombuffer(token.encode("ascii"), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(raw))).decode("ascii")


def wait(name: str) -> None:
    """Until all processes are here."""
    if several():
        multihost_utils.sync_global_devices(name)


def on_host(value: jax.Array) -> np.ndarray:
    """A whole array on every process; all must call this where it lies on the devices of several."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


LOST = ("closed by peer", "connection reset", "socket closed", "gloo", "coordination", "barrier", "unavailable")
"""What JAX's runtime says, in one of many ways, when a process has gone."""


@contextlib.contextmanager
def joined(wanted: bool) -> Iterator[None]:
    """The block as one process of several, if `wanted`; when another process dies this one ends within a minute.

    Where the runtime reports the loss, that becomes one sentence; where it ends the process itself, its own words stand
    in the output. Either way the exit code is not 0, and checkpoints stay whole.
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
        leave_at_once(1)
    jax.distributed.shutdown()


def lost_peer(error: BaseException) -> str | None:
    """One clear sentence for an error that means that another process died, else None."""
    text = str(error)
    if isinstance(error, BimedixError) or not any(sign in text.lower() for sign in LOST):
        return None
    return (
        f"another process of this run has stopped, so process {jax.process_index()} stops too "
        f"({text.splitlines()[0][:160]}); look at that process's output, then continue all with --resume."
    )


def leave_at_once(code: int) -> None:
    """Ends this process without waiting for the others: the runtime's own farewell waits for those that are dead."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
