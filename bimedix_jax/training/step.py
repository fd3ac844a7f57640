"""One optimiser step: gradients of the trained parameters over micro-batches, exact under accumulation and padding.

The objective of a step, over all its rows:

    (sum of NLL) / (number of targets)  +  aux_loss_coef * load balance, by scope  +  z_loss_coef * router z-loss

Each micro-batch contributes its part with the denominators of the whole step, so the sum of the gradients of all
micro-batches is the gradient of the objective. Only the load balance of scope "micro_batch" depends, by definition, on
how the rows are divided.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from bimedix_jax.experiment import Experiment, RouterTraining
from bimedix_jax.models import shards
from bimedix_jax.models.attention import positions_in_segments
from bimedix_jax.models.axes import BATCH, LENGTH
from bimedix_jax.models.base import inlined
from bimedix_jax.models.config import Remat
from bimedix_jax.models.embedding import gather_head
from bimedix_jax.models.linear import with_dropout
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.router_sums import Load, RouterSums, load_balancing_loss, load_of, router_z_loss
from bimedix_jax.models.routers import RoutingPlan
from bimedix_jax.sharding.layout import Layout, plan_specs
from bimedix_jax.sharding.rules import AXES, BATCH_AXES
from bimedix_jax.training.losses import next_token_loss, target_losses, targets_of
from bimedix_jax.training.norms import gradient_norms
from bimedix_jax.training.optimiser import clip, schedule
from bimedix_jax.training.routing import Batch, Grouping, SplitPlan, share, split_plan
from bimedix_jax.training.state import Params, Structure, TrainState

RETURNED = ("loss", "nll", "aux_loss", "z_loss", "tokens", "router", "group_losses")
"""What a step's metrics take unchanged from the sums over its rows."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
    """Denominators of a whole optimiser step.

    Attributes:
      targets: supervised targets.
      tokens: positions that are not padding.
      rows, parts: rows and micro-batches with at least one token.
      keys: keys that all tokens attend to together, in rows of several segments.
      load: load of all routers over the step, for scope "global" with several micro-batches.
    """

    targets: jax.Array
    tokens: jax.Array
    rows: jax.Array
    parts: jax.Array
    keys: jax.Array
    load: Load | None


def totals_of(batch_A: Batch, load: Load | None) -> Totals:
    """The denominators, over the rows of all shards."""
    _, learned = jax.vmap(targets_of)(batch_A["tokens_BT"], batch_A["segment_ids_BT"], batch_A["loss_mask_BT"])
    valid = batch_A["segment_ids_BT"] != 0

    def count(x: jax.Array) -> jax.Array:
        return shards.sum_over(BATCH, jnp.sum(x, dtype=jnp.float32))

    # a micro-batch counts if any shard has a token of it
    parts = shards.sum_over(BATCH, valid.any((-1, -2)).astype(jnp.int32)) > 0
    keys = count(jnp.where(valid, jax.vmap(positions_in_segments)(batch_A["segment_ids_BT"]) + 1, 0))
    return Totals(count(learned), count(valid), count(valid.any(-1)), jnp.sum(parts, dtype=jnp.float32), keys, load)


def balance_part(sums: RouterSums, scope: str, totals: Totals) -> jax.Array:
    """The share of this micro-batch and shard in the step's load-balancing loss. All shares add up to the loss.

    `sums` are by row for scope "sequence".
    """
    if scope == "sequence":
        rows = jnp.sum(sums.tokens_LX[0] > 0).astype(jnp.float32)
        return load_balancing_loss(sums, "sequence") * share(rows, totals.rows)
    # choices and numbers of tokens are of all shards, probabilities of this one
    load = jax.lax.stop_gradient(shards.sum_over(BATCH, load_of(sums)))
    if scope == "global":
        return load_balancing_loss(sums, "global", totals.load or load)
    return load_balancing_loss(sums, "global", load) * share((load.tokens > 0).astype(jnp.float32), totals.parts)


def model_of(structure: Structure, params: Params, frozen: dict[str, Any], key: jax.Array | None) -> Mixtral:
    """The model with these values. A key turns on the adapters' dropout."""
    model = structure.merge(params, frozen)
    if key is not None:
        with_dropout(model, jax.random.fold_in(key, shards.index(BATCH)) if shards.active() else key)
    return model


def make_objective(
    structure: Structure, router: RouterTraining, remat: Remat, named: int = 0
) -> Callable[..., tuple[jax.Array, dict]]:
    """Returns objective(params, frozen, micro_batch, totals, key, plan) -> (part of the step's objective, sums).

    `key` turns on the adapters' dropout. The routers follow `plan`. With `named` groups of language and kind, the sums
    have the routers' and the losses of each.
    """
    grouping = Grouping.of(router, named)

    def objective(
        params: Params,
        frozen: dict[str, Any],
        micro: Batch,
        totals: Totals,
        key: jax.Array | None = None,
        plan: RoutingPlan | None = None,
    ) -> tuple[jax.Array, dict]:
        model = model_of(structure, params, frozen, key)
        tokens_BT, segment_ids_BT = micro["tokens_BT"], micro["segment_ids_BT"]
        with inlined():
            out = model.hidden(tokens_BT, segment_ids_BT, plan, remat=remat, **grouping.arguments(micro))
        assert out.sums is not None  # there is at least one group
        gather_head(model.head)
        nll_BT, learned_BT = target_losses(model.head, out.hidden_BTD, tokens_BT, segment_ids_BT, micro["loss_mask_BT"])
        nll = share(jnp.sum(nll_BT), totals.targets)
        with jax.named_scope("router_losses"):
            copies = shards.count(LENGTH)  # this many shards have the same rows, and each adds the same aux and z-loss
            rows = grouping.each_row(out.sums, micro)
            aux = balance_part(rows, router.aux_scope, totals) / copies
            z = router_z_loss(rows) * share(jnp.sum(segment_ids_BT != 0), totals.tokens) / copies
        loss = nll + router.aux_loss_coef * aux + router.z_loss_coef * z
        sums = shards.sum_over(BATCH, grouping.each_group(out.sums, micro))
        found = {"loss": loss, "nll": nll, "aux_loss": aux, "z_loss": z, "router": sums}
        found |= {"group_losses": grouping.losses(nll_BT, learned_BT, micro)} if named else {}
        return loss, jax.lax.stop_gradient(found)

    return objective


def load_of_part(model: Mixtral, micro: Batch, plan: RoutingPlan) -> Load:
    """The load of a micro-batch over all shards, from a separate forward pass."""
    out = model.hidden(micro["tokens_BT"], micro["segment_ids_BT"], plan, groups=1)
    assert out.sums is not None  # there is a group
    return shards.sum_over(BATCH, load_of(out.sums))


def make_gradient(
    structure: Structure, router: RouterTraining, remat: Remat, named: int = 0
) -> Callable[..., tuple[Params, dict]]:
    """Returns gradient(params, frozen, batch_A, key, plan) -> (float32 gradients by name, sums) of a whole step.

    `key` turns on the adapters' dropout; each micro-batch has its own mask. A plan's B is 1 or the rows of the step. On
    a mesh, parameters and gradients are sharded by the model's layout, and the rows of a micro-batch over the devices.
    Gradients and sums are those of all devices.
    """
    differentiate = jax.grad(make_objective(structure, router, remat, named), has_aux=True)

    def gradient(
        params: Params,
        frozen: dict[str, Any],
        batch_A: Batch,
        key: jax.Array | None = None,
        plan: SplitPlan | None = None,
    ) -> tuple[Params, dict]:
        plan, count = plan or SplitPlan(RoutingPlan(), RoutingPlan()), batch_A["tokens_BT"].shape[0]
        keys_A = None if key is None else jax.random.split(key, count)
        parts_A = (batch_A, keys_A, plan.own_A, jnp.arange(count))
        load = None
        if router.aux_scope == "global" and count > 1:

            def load_part(part: tuple) -> Load:
                micro, key, own, number = part
                return load_of_part(model_of(structure, params, frozen, key), micro, plan.of(own, number))

            loads_A = jax.lax.map(load_part, parts_A)
            load = jax.tree.map(lambda x: jax.lax.stop_gradient(jnp.sum(x, axis=0)), loads_A)
        totals = totals_of(batch_A, load)

        def part(micro: Batch, key: jax.Array | None, own: RoutingPlan, number: jax.Array) -> tuple[Params, dict]:
            gradients, sums = differentiate(params, frozen, micro, totals, key, plan.of(own, number))
            return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), sums

        first = jax.tree.map(lambda x: x[0], parts_A)
        if count == 1:
            gradients, sums = part(*first)
        else:
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(part, *first))
            (gradients, sums), _ = jax.lax.scan(
                lambda total, micro: (jax.tree.map(jnp.add, total, part(*micro)), None), zeros, parts_A
            )
        return gradients, {**sums, "targets": totals.targets, "tokens": totals.tokens, "keys": totals.keys}

    layout = structure.layout
    compute = gradient if layout is None else on_mesh(gradient, layout)

    def with_split_plan(
        params: Params,
        frozen: dict[str, Any],
        batch_A: Batch,
        key: jax.Array | None = None,
        plan: RoutingPlan | None = None,
    ) -> tuple[Params, dict]:
        parts = None if plan is None else split_plan(plan, *batch_A["tokens_BT"].shape[:2])
        return compute(params, frozen, batch_A, key, parts)

    return with_split_plan


def on_mesh(gradient: Callable[..., tuple[Params, dict]], layout: Layout) -> Callable[..., tuple[Params, dict]]:
    """`gradient` over the shards of a model, summed over the devices."""
    every = tuple(name for name in AXES if layout.mesh.shape[name] > 1)

    def on_shard(
        params: Params, frozen: dict[str, Any], batch_A: Batch, key: jax.Array | None, plan: SplitPlan | None
    ) -> tuple[Params, dict]:
        gradients, sums = gradient(params, frozen, batch_A, key, plan)
        for name, spec in layout.specs(params).items():
            divided = {axis for part in spec for axis in (part if isinstance(part, tuple) else (part,))}
            alike = tuple(axis for axis in every if axis not in divided)  # devices with the same part of the parameter
            gradients[name] = jax.lax.psum(gradients[name], alike) if alike else gradients[name]
        local = ("loss", "nll", "aux_loss", "z_loss", "group_losses")
        summed = jax.lax.psum({name: sums[name] for name in local if name in sums}, every)
        return gradients, sums | summed

    def sharded(
        params: Params, frozen: dict[str, Any], batch_A: Batch, key: jax.Array | None, plan: SplitPlan | None
    ) -> tuple[Params, dict]:
        specs = layout.specs(params)
        rows = jax.tree.map(lambda _: P(None, BATCH_AXES), batch_A)
        plans = plan and SplitPlan(plan_specs(plan.own_A, BATCH_AXES, (None,)), plan_specs(plan.shared, BATCH_AXES))
        compute = layout.over_shards(
            on_shard, (specs, layout.specs(frozen), rows, None if key is None else P(), plans), (specs, P())
        )
        return compute(params, frozen, batch_A, key, plan)

    return sharded


def make_train_step(
    structure: Structure,
    experiment: Experiment,
    steps: int,
    optimiser: optax.GradientTransformation,
    named: int = 0,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """Returns the jitted step(state, frozen, batch_A, plan=None) -> (state, metrics), which metrics.py describes.

    With `named` groups of language and kind, the batch has group_BT. The state is donated. If the loss or the norm of
    the gradient is not finite, only the step and the learning rate's position change: parameters, moments and the
    router's state keep their values (`keep_if`).
    """
    gradient = make_gradient(structure, experiment.router, experiment.remat, named)
    rate = schedule(experiment.optimiser, steps)

    dropout = experiment.lora is not None and experiment.lora.dropout > 0

    def step(
        state: TrainState, frozen: dict[str, Any], batch_A: Batch, plan: RoutingPlan | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        if set(structure.router_state(frozen)) != set(state.router):
            raise ValueError("This router learns without a gradient; pass the router's state to init_state.")
        key = jax.random.fold_in(jax.random.key(experiment.seed), state.step) if dropout else None
        plan = None if plan is None else plan.fold_in(state.step)
        frozen = {**frozen, **state.router}
        gradients, sums = gradient(state.params, frozen, batch_A, key, plan)
        with jax.named_scope("optimiser"):
            norms = gradient_norms(gradients, structure.merge(state.params, frozen), structure.layout)
            gradients, norm = clip(gradients, experiment.optimiser.clip_norm, norms["grad_norm"])
            updates, optimiser_state = optimiser.update(gradients, state.optimiser, state.params)
            params: Any = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(norm)
        metrics = {name: sums[name] for name in RETURNED if name in sums} | norms
        metrics |= {"learning_rate": rate(state.step), "supervised_tokens": sums["targets"]}
        if experiment.optimiser.router_learning_rate is not None:
            ratio = experiment.optimiser.router_learning_rate / experiment.optimiser.learning_rate
            metrics["router_learning_rate"] = ratio * metrics["learning_rate"]
        metrics["padding"] = 1 - sums["tokens"] / batch_A["tokens_BT"].size
        metrics["mean_context"] = share(sums["keys"], sums["tokens"])
        chosen_LE = jnp.sum(sums["router"].chosen_LXE, axis=1)
        router = {name: structure.update_router_state(x, chosen_LE) for name, x in state.router.items()}
        new, old = (params, optimiser_state, router), (state.params, state.optimiser, state.router)
        params, optimiser_state, router = keep_if(finite, new, old)
        return TrainState(params, optimiser_state, state.step + 1, router), metrics

    return jax.jit(step, donate_argnums=0)


def keep_if(condition: jax.Array, new: Any, old: Any) -> Any:
    """`new` where the condition holds, else `old`, except for the position in the schedule of the learning rate.

    That one counts steps of the run, so that a skipped step does not shift the schedule.
    """

    def is_schedule(x: Any) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    def select(new: Any, old: Any) -> Any:
        return new if is_schedule(new) else jnp.where(condition, new, old)

    return jax.tree.map(select, new, old, is_leaf=is_schedule)


def make_eval_step(structure: Structure) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns the jitted evaluate(params, frozen, batch, plan=None) -> (summed NLL, number of targets).

    The plan's B is 1.
    """

    def evaluate(
        params: Params, frozen: dict[str, Any], batch: Batch, plan: RoutingPlan | None = None
    ) -> tuple[jax.Array, jax.Array]:
        model = structure.merge(params, frozen)
        out = model.hidden(batch["tokens_BT"], batch["segment_ids_BT"], plan)
        gather_head(model.head)
        sums = next_token_loss(
            model.head, out.hidden_BTD, batch["tokens_BT"], batch["segment_ids_BT"], batch["loss_mask_BT"]
        )
        return shards.sum_over(LENGTH, shards.sum_over(BATCH, sums))

    layout = structure.layout
    if layout is None:
        return jax.jit(evaluate)

    def sharded(
        params: Params, frozen: dict[str, Any], batch: Batch, plan: RoutingPlan | None = None
    ) -> tuple[jax.Array, jax.Array]:
        rows = jax.tree.map(lambda _: P(BATCH_AXES), batch)
        plans = plan and plan_specs(plan, BATCH_AXES)
        compute = layout.over_shards(evaluate, (layout.specs(params), layout.specs(frozen), rows, plans), P())
        return compute(params, frozen, batch, plan)

    return jax.jit(sharded)
