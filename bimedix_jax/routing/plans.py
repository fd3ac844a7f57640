"""Routing plans on disk: a safetensors file with one tensor for each field."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from bimedix_jax.errors import BimedixError
from bimedix_jax.files import new_file
from bimedix_jax.models.plans import RoutingPlan


def write_plan(plan: RoutingPlan, path: Path) -> None:
    """Writes the fields that are set. The file gets its name when it is complete."""
    with new_file(path) as partial:
        save_file(plan.to_numpy(), partial)


def read_plan(path: str | Path) -> RoutingPlan:
    """The plan that `write_plan` wrote.

    Raises:
      BimedixError: the file cannot be read, or it is not a routing plan.
    """
    try:
        return RoutingPlan.from_numpy(load_file(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise BimedixError(f"{path} cannot be read as a routing plan ({error}); name another file.") from error
