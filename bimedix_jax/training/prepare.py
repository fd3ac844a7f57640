"""Preparations for a run: its mesh, a model that fits the experiment, and a plan that fits the model."""

import dataclasses
import math
from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bimedix_jax import distributed
from bimedix_jax.adapters import add_lora
from bimedix_jax.checkpoint.load import read_base, with_router_of
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import RoutingPlan, checked_plan
from bimedix_jax.sharding.layout import Layout
from bimedix_jax.sharding.placement import shard
from bimedix_jax.sharding.rules import BATCH_AXES, make_mesh
from bimedix_jax.training.run_folder import check_plan
from bimedix_jax.training.state import Params


def mesh_of(experiment: Experiment) -> Mesh | None:
    """The mesh of the experiment; None on one device.

    Raises:
      BimedixError: the mesh does not fit the devices or the rows.
    """
    wanted = experiment.mesh
    if wanted is None:
        if distributed.is_multiprocess():
            raise BimedixError("Several processes need a mesh over their devices; set mesh.fsdp, for example.")
        return None
    mesh = make_mesh(wanted.data, wanted.fsdp, wanted.expert, wanted.tensor)
    parts = math.prod(mesh.shape[name] for name in BATCH_AXES)
    if experiment.batch.rows % parts:
        raise BimedixError(
            f"{experiment.batch.rows} rows of a micro-batch cannot be divided among the {parts} shards of this mesh; "
            f"make batch.rows a multiple of {parts}, or mesh.tensor larger."
        )
    return mesh


def prepare_model(experiment: Experiment, model: Mixtral | None, mesh: Mesh | None) -> Mixtral:
    """The given base, or the one that the experiment names, with the adapters of the experiment.

    With a mesh the model is in host memory, and has the parts for this process's devices.
    """
    if model is not None and model.placement is not None:
        raise BimedixError("The model is already sharded; pass one that is not.")
    if model is None:
        model = read_base(experiment, mesh)
    else:
        model = with_router_of(experiment, model, "the given model")
    check_fit(experiment, model)
    wanted, found = experiment.lora, model.lora
    if found is None:
        return model if wanted is None else add_lora(model, wanted, experiment.seed)
    if (
        wanted is None
        or dataclasses.replace(wanted, targets=found.targets) != found
        or set(wanted.targets) != set(found.targets)
    ):
        raise BimedixError(f"The model has adapters {found}, the experiment asks for {wanted}; make them equal.")
    return model


def check_fit(experiment: Experiment, model: Mixtral) -> None:
    if experiment.data.sequence_length > model.config.max_position_embeddings:
        raise BimedixError(
            f"Rows of {experiment.data.sequence_length} tokens exceed the model's "
            f"{model.config.max_position_embeddings} positions; pack the data with a smaller sequence length."
        )


def plan_of_run(
    experiment: Experiment, model: Mixtral, plan: RoutingPlan | None, resumed: Path | None
) -> RoutingPlan | None:
    """The plan after checks; None if it is empty.

    Args:
      resumed: folder of the run to resume, which must have the same plan.

    Raises:
      BimedixError: the plan does not fit the model or the rows, or the run has another plan.
    """
    try:
        checked = checked_plan(plan, model.config, experiment.batch.size, experiment.data.sequence_length)
    except ValueError as error:
        raise BimedixError(f"The plan does not fit this run: {error}") from error
    plan = None if checked.is_free else checked
    if plan is not None and experiment.eval_every and any(x.shape[1] > 1 for x in jax.tree.leaves(plan)):
        raise BimedixError(
            "This plan has values for each row of a step, which do not apply to held-out rows; set eval_every to 0, or "
            "pass a plan whose B is 1."
        )
    if resumed is not None:
        check_plan(resumed, plan)
    return plan


def replicated_plan(plan: RoutingPlan | None, layout: Layout | None) -> RoutingPlan | None:
    """The plan replicated over the mesh of the model."""
    if plan is None or layout is None:
        return plan
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    return RoutingPlan.from_numpy({name: shard(value, everywhere) for name, value in plan.to_numpy().items()})


def check_router_rate(experiment: Experiment, params: Params) -> None:
    if experiment.optimiser.router_learning_rate is not None and not any(".router." in name for name in params):
        raise BimedixError(
            "optimiser.router_learning_rate is set, but the routers are frozen; add router to lora.targets, set "
            "lora.train_router, or do not set the rate."
        )
