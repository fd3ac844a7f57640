"""run.json: versions, devices, fingerprints and costs of a run."""

import datetime
import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bimedix_jax.errors import BimedixError
from bimedix_jax.files import read_json, write_text
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.rows import RowMajor
from bimedix_jax.models.routers import RoutingPlan
from bimedix_jax.routing.interventions import Interventions

RUN = "run.json"
PACKAGES = ("bimedix_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@functools.partial(jax.jit, static_argnames="width")
def weighted_sum(words: jax.Array, width: int) -> jax.Array:
    """uint32 sum of the words, each times an odd number for its layer (the first axis). It fuses, without a copy."""
    bits = jax.lax.bitcast_convert_type(words, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width])
    sums_L = jnp.sum(bits.reshape(bits.shape[0], -1), axis=1, dtype=jnp.uint32)
    places_L = jax.lax.iota(jnp.uint32, sums_L.size) * jnp.uint32(2) + jnp.uint32(1)
    return jnp.sum(sums_L * places_L, dtype=jnp.uint32)


def fingerprint(values: dict[str, Any]) -> str:
    """Checksum of named arrays and packed weights, as fast as memory can be read. It is not cryptographic.

    It is the same on every mesh, and for weights stored by rows. Of a 4-bit weight it covers the nibbles only, since
    sharding may re-encode the scales.
    """
    words = {name: v.packed if isinstance(v, NF4Tensor | RowMajor) else v for name, v in sorted(values.items())}
    sums = {name: int(weighted_sum(leaf, leaf.dtype.itemsize)) for name, leaf in words.items()}
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def git_commit(folder: Path) -> str | None:
    """Commit of the git work tree that contains `folder`, with '+changes' if files differ; None outside of git."""
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):  # git is not installed or too slow
        return None
    return described.stdout.strip() or None if described.returncode == 0 else None


def environment() -> dict[str, Any]:
    """Versions and devices."""
    device = jax.devices()[0]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "git_commit": git_commit(Path(__file__).parent),
    }


def identity(
    frozen: dict[str, Any],
    data_fingerprint: str,
    steps: int,
    plan: RoutingPlan | None = None,
    rules: Interventions | None = None,
) -> dict[str, Any]:
    """What must not change when a run is resumed, besides its experiment."""
    same = {"base_fingerprint": fingerprint(frozen), "data_fingerprint": data_fingerprint, "steps": steps}
    return {
        **same,
        "plan": None if plan is None else plan.digest(),
        "intervene": None if rules is None else rules.digest(),
    }


def read_run(folder: Path) -> dict[str, Any]:
    return read_json(folder / RUN, dict[str, Any], "restore it from a copy, or start a new run")


def check_identity(folder: Path, same: dict[str, Any]) -> None:
    """Raises BimedixError if base weights, data or number of steps differ from those at the start of the run."""
    earlier = read_run(folder)
    changed = [name for name, value in same.items() if earlier.get(name) != value]
    if changed:
        raise BimedixError(
            f"{', '.join(changed)} differs from that of the run in {folder}: its model, data or rules have changed; "
            "restore them, or start a new run."
        )


def write_run(folder: Path, covered: dict[str, Any], same: dict[str, Any], step: int, cost: dict[str, Any]) -> None:
    """Writes run.json. A resumed run appends to the list of starts.

    Args:
      covered: the coverage table of the model.
      same: the result of `identity`.
      step: number of steps done at this start.
      cost: compile time, memory and kernel backends of the step.
    """
    earlier = read_run(folder)["starts"] if (folder / RUN).exists() else []
    starts = [*earlier, {"step": step, **environment(), **cost}]
    run = {**same, "coverage": covered, "starts": starts}
    write_text(folder / RUN, json.dumps(run, indent=2) + "\n")


def add_to_start(folder: Path, facts: dict[str, Any]) -> None:
    """Adds facts to the newest start in run.json."""
    run = read_run(folder)
    run["starts"][-1] |= facts
    write_text(folder / RUN, json.dumps(run, indent=2) + "\n")
