"""One optimiser step: gradients of trained parameters over micro-batches, exact under accumulation and padding.

The objective of a step, over all its rows:

    (sum of NLL) / (number of targets)  +  aux_loss_coef * load balance, by scope  +  z_loss_coef * router z-loss

Each micro-batch contributes its part with denominators of the whole step, so the sum of their gradients is the gradient
of the objective; only the load balance of scope "micro_batch" depends on how the rows were divided, by definition.
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
from bimedix_jax.models.axes import BATCH, LENGTH
from bimedix_jax.models.config import Remat
from bimedix_jax.models.embedding import gather_head
from bimedix_jax.models.linear import with_dropout
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.router_sums import Load, RouterSums, load_balancing_loss, load_of, router_z_loss
from bimedix_jax.models.routers import RoutingPlan
from bimedix_jax.sharding.layout import Layout, plan_specs
from bimedix_jax.sharding.rules import AXES, BATCH_AXES
from bimedix_jax.training.losses import next_token_loss, targets_of
from bimedix_jax.training.optimiser import clip, schedule
from bimedix_jax.training.routing import Batch, Grouping, PartedPlan, parted, router_metrics, share
from bimedix_jax.training.state import Params, Structure, TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
    """Denominators of a whole optimiser step.

    Attributes:
      targets: learned targets.
      tokens: positions that are not padding.
      rows, parts: rows and micro-batches with any token.
      load: of all routers over the step, for scope "global" with several micro-batches.
    """

    targets: jax.Array
    tokens: jax.Array
    rows: jax.Array
    parts: jax.Array
    load: Load | None


def totals_of(batch_A: Batch, load: Load | None) -> Totals:
    """Of the rows on all shards."""
    _, learned = jax.vmap(targets_of)(batch_A["tokens_BT"], batch_A["segment_ids_BT"], batch_A["loss_mask_BT"])
    valid = batch_A["segment_ids_BT"] != 0

    def count(x: jax.Array) -> jax.Array:
        return shards.sum_over(BATCH, jnp.sum(x, dtype=jnp.float32))

    # a micro-batch with a token on any shard is one part
    parts = shards.sum_over(BATCH, valid.any((-1, -2)).astype(jnp.int32)) > 0
    return Totals(count(learned), count(valid), count(valid.any(-1)), jnp.sum(parts, dtype=jnp.float32), load)


def balance_part(sums: RouterSums, scope: str, totals: Totals) -> jax.Array:
    """A micro-batch's share, on this shard, of the step's load-balancing loss: the shares add up to it.

    `sums` are by row for scope "sequence".
    """
    if scope == "sequence":
        rows = jnp.sum(sums.tokens_LX[0] > 0).astype(jnp.float32)
        return load_balancing_loss(sums, "sequence") * share(rows, totals.rows)
    # choices and number of tokens are those of all shards, the probabilities those of this one
    load = jax.lax.stop_gradient(shards.sum_over(BATCH, load_of(sums)))
    if scope == "global":
        return load_balancing_loss(sums, "global", totals.load or load)
    return load_balancing_loss(sums, "global", load) * share((load.tokens > 0).astype(jnp.float32), totals.parts)


def model_of(structure: Structure, params: Params, frozen: dict[str, Any], key: jax.Array | None) -> Mixtral:
    """The model with these values; `key` turns on the adapters' dropout."""
    model = structure.merge(params, frozen)
    if key is not None:
        with_dropout(model, jax.random.fold_in(key, shards.index(BATCH)) if shards.active() else key)
    return model


def make_objective(structure: Structure, router: RouterTraining, remat: Remat) -> Callable[..., tuple[jax.Array, dict]]:
    """objective(params, frozen, micro_batch, totals, key, plan) -> (its part of the step's objective, sums).

    `key` turns on the adapters' dropout; the routers follow `plan`.
    """
    grouping = Grouping.of(router)

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
        out = model.hidden(tokens_BT, segment_ids_BT, plan, remat=remat, **grouping.ask(micro))
        assert out.sums is not None  # there is at least one group
        gather_head(model.head)
        nll_sum, _ = next_token_loss(model.head, out.hidden_BTD, tokens_BT, segment_ids_BT, micro["loss_mask_BT"])
        nll = share(nll_sum, totals.targets)
        copies = shards.count(LENGTH)  # shards of the same rows: each takes its tokens' NLL, all compute these
        rows = grouping.each_row(out.sums, micro)
        aux = balance_part(rows, router.aux_scope, totals) / copies
        z = router_z_loss(rows) * share(jnp.sum(segment_ids_BT != 0), totals.tokens) / copies
        loss = nll + router.aux_loss_coef * aux + router.z_loss_coef * z
        sums = jax.lax.stop_gradient(shards.sum_over(BATCH, grouping.each_language(out.sums, micro)))
        return loss, {"loss": loss, "nll": nll, "aux_loss": aux, "z_loss": z, "router": sums}

    return objective


def load_of_part(model: Mixtral, micro: Batch, plan: RoutingPlan) -> Load:
    """The load of a micro-batch on all shards, from a forward pass of its own."""
    out = model.hidden(micro["tokens_BT"], micro["segment_ids_BT"], plan, groups=1)
    assert out.sums is not None  # there is a group
    return shards.sum_over(BATCH, load_of(out.sums))


def make_gradient(structure: Structure, router: RouterTraining, remat: Remat) -> Callable[..., tuple[Params, dict]]:
    """gradient(params, frozen, batch_A, key, plan) -> (float32 gradients by name, sums) of a whole step.

    `key` turns on the adapters' dropout, which every micro-batch draws anew. A plan's B is 1 or all rows of the step.
    On a mesh, parameters and gradients are sharded as the model's layout says, the rows of a micro-batch are divided,
    and the result is that of all devices.
    """
    differentiate = jax.grad(make_objective(structure, router, remat), has_aux=True)

    def gradient(
        params: Params,
        frozen: dict[str, Any],
        batch_A: Batch,
        key: jax.Array | None = None,
        plan: PartedPlan | None = None,
    ) -> tuple[Params, dict]:
        plan, count = plan or PartedPlan(RoutingPlan(), RoutingPlan()), batch_A["tokens_BT"].shape[0]
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
        return gradients, {**sums, "targets": totals.targets, "tokens": totals.tokens}

    layout = structure.layout
    run = gradient if layout is None else on_mesh(gradient, layout)

    def planned(
        params: Params,
        frozen: dict[str, Any],
        batch_A: Batch,
        key: jax.Array | None = None,
        plan: RoutingPlan | None = None,
    ) -> tuple[Params, dict]:
        parts = None if plan is None else parted(plan, *batch_A["tokens_BT"].shape[:2])
        return run(params, frozen, batch_A, key, parts)

    return planned


def on_mesh(gradient: Callable[..., tuple[Params, dict]], layout: Layout) -> Callable[..., tuple[Params, dict]]:
    """`gradient` over the shards of a placed model, summed over devices."""
    every = tuple(name for name in AXES if layout.mesh.shape[name] > 1)

    def on_shard(
        params: Params, frozen: dict[str, Any], batch_A: Batch, key: jax.Array | None, plan: PartedPlan | None
    ) -> tuple[Params, dict]:
        gradients, sums = gradient(params, frozen, batch_A, key, plan)
        for name, spec in layout.specs(params).items():
            divided = {axis for part in spec for axis in (part if isinstance(part, tuple) else (part,))}
            alike = tuple(axis for axis in every if axis not in divided)  # devices that hold the same parameter
            gradients[name] = jax.lax.psum(gradients[name], alike) if alike else gradients[name]
        local = ("loss", "nll", "aux_loss", "z_loss")
        summed = jax.lax.psum({name: sums[name] for name in local}, every)
        return gradients, sums | summed

    def sharded(
        params: Params, frozen: dict[str, Any], batch_A: Batch, key: jax.Array | None, plan: PartedPlan | None
    ) -> tuple[Params, dict]:
        specs = layout.specs(params)
        rows = jax.tree.map(lambda _: P(None, BATCH_AXES), batch_A)
        plans = plan and PartedPlan(plan_specs(plan.own_A, BATCH_AXES, (None,)), plan_specs(plan.shared, BATCH_AXES))
        run = layout.over_shards(
            on_shard, (specs, layout.specs(frozen), rows, None if key is None else P(), plans), (specs, P())
        )
        return run(params, frozen, batch_A, key, plan)

    return sharded


def make_train_step(
    structure: Structure, experiment: Experiment, steps: int, optimiser: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """The jitted step(state, frozen, batch_A, plan=None) -> (state, metrics).

    The state is donated, the frozen base an argument. A step whose loss or gradient is not finite still returns: the
    caller looks at the metrics and must drop the state.
    """
    gradient = make_gradient(structure, experiment.router, experiment.remat)
    rate = schedule(experiment.optimiser, steps)

    dropout = experiment.lora is not None and experiment.lora.dropout > 0

    def step(
        state: TrainState, frozen: dict[str, Any], batch_A: Batch, plan: RoutingPlan | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        if set(structure.router_state(frozen)) != set(state.router):
            raise ValueError("This router learns outside of the gradient; give init_state the router's state.")
        key = jax.random.fold_in(jax.random.key(experiment.seed), state.step) if dropout else None
        plan = None if plan is None else plan.fold_in(state.step)
        gradients, sums = gradient(state.params, {**frozen, **state.router}, batch_A, key, plan)
        gradients, norm = clip(gradients, experiment.optimiser.clip_norm)
        updates, optimiser_state = optimiser.update(gradients, state.optimiser, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        metrics = {name: sums[name] for name in ("loss", "nll", "aux_loss", "z_loss")}
        metrics |= {"grad_norm": norm, "learning_rate": rate(state.step)}
        metrics |= {"tokens": sums["tokens"], "supervised_tokens": sums["targets"]}
        metrics |= router_metrics(sums["router"], experiment.router.languages)
        chosen_LE = jnp.sum(sums["router"].chosen_LXE, axis=1)
        router = {name: structure.update_router_state(x, chosen_LE) for name, x in state.router.items()}
        return TrainState(params, optimiser_state, state.step + 1, router), metrics

    return jax.jit(step, donate_argnums=0)


def make_eval_step(structure: Structure) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The jitted evaluate(params, frozen, batch, plan=None) -> (summed NLL, number of targets).

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
        run = layout.over_shards(evaluate, (layout.specs(params), layout.specs(frozen), rows, plans), P())
        return run(params, frozen, batch, plan)

    return jax.jit(sharded)
