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
from bimedix_jax.models.linear import with_dropout
from bimedix_jax.models.mixtral import Output
from bimedix_jax.models.routers import Load, Routing, load_balancing_loss, load_of, router_z_loss
from bimedix_jax.sharding import AXES, BATCH_AXES, Layout
from bimedix_jax.training.losses import next_token_loss, targets_of
from bimedix_jax.training.optimiser import clip, schedule
from bimedix_jax.training.state import Params, Structure, TrainState

Batch = dict[str, jax.Array]
"""tokens_BT, segment_ids_BT int32 and loss_mask_BT bool; those of a step have a leading axis A of micro-batches."""


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


def share(part: jax.Array, whole: jax.Array) -> jax.Array:
    """part / whole, and 0 for 0 / 0: a step may hold no target, as the last one of an epoch."""
    return part / jnp.maximum(whole, 1.0)


def expert_counts(routing: Routing, valid_BT: jax.Array) -> jax.Array:
    """float32 [L, E]: times each expert was chosen in each layer on all shards, padding excluded."""
    experts = routing.logits_LBTE.shape[-1]
    chosen_LBTE = jnp.sum(jax.nn.one_hot(routing.experts_LBTK, experts, dtype=jnp.float32), axis=-2)
    counts_LE = jnp.sum(chosen_LBTE * valid_BT.astype(jnp.float32)[None, :, :, None], axis=(1, 2))
    return shards.sum_over(BATCH, counts_LE)


def balance_part(out: Output, valid_BT: jax.Array, scope: str, totals: Totals) -> jax.Array:
    """A micro-batch's share, on this shard, of the step's load-balancing loss: the shares add up to it."""
    if scope == "sequence":
        return load_balancing_loss(out.routing, valid_BT, "sequence") * share(jnp.sum(valid_BT.any(-1)), totals.rows)
    # choices and number of tokens are those of all shards, the probabilities those of this one
    load = jax.lax.stop_gradient(shards.sum_over(BATCH, load_of(out.routing, valid_BT)))
    if scope == "global":
        return load_balancing_loss(out.routing, valid_BT, "global", totals.load or load)
    part = load_balancing_loss(out.routing, valid_BT, "global", load)
    return part * share((load.tokens > 0).astype(jnp.float32), totals.parts)


def make_objective(structure: Structure, router: RouterTraining, remat: Remat) -> Callable[..., tuple[jax.Array, dict]]:
    """objective(params, frozen, micro_batch, totals, key) -> (its part of the step's objective, sums for the metrics).

    `key` turns on the adapters' dropout.
    """

    def objective(
        params: Params, frozen: dict[str, Any], micro: Batch, totals: Totals, key: jax.Array | None = None
    ) -> tuple[jax.Array, dict]:
        model = structure.merge(params, frozen)
        if key is not None:
            with_dropout(model, jax.random.fold_in(key, shards.index(BATCH)) if shards.active() else key)
        tokens_BT, segment_ids_BT = micro["tokens_BT"], micro["segment_ids_BT"]
        out = model.hidden(tokens_BT, segment_ids_BT, remat=remat)
        valid_BT = segment_ids_BT != 0
        model.gather_head()
        nll_sum, _ = next_token_loss(model.head, out.hidden_BTD, tokens_BT, segment_ids_BT, micro["loss_mask_BT"])
        nll = share(nll_sum, totals.targets)
        copies = shards.count(LENGTH)  # shards of the same rows: each takes its tokens' NLL, all compute these
        aux = balance_part(out, valid_BT, router.aux_scope, totals) / copies
        z = router_z_loss(out.routing.logits_LBTE, valid_BT) * share(jnp.sum(valid_BT), totals.tokens) / copies
        loss = nll + router.aux_loss_coef * aux + router.z_loss_coef * z
        counts_LE = expert_counts(out.routing, valid_BT)
        return loss, {"loss": loss, "nll": nll, "aux_loss": aux, "z_loss": z, "counts_LE": counts_LE}

    return objective


def make_gradient(structure: Structure, router: RouterTraining, remat: Remat) -> Callable[..., tuple[Params, dict]]:
    """gradient(params, frozen, batch_A, key) -> (float32 gradients by name, sums for the metrics) of a whole step.

    `key` turns on the adapters' dropout, which every micro-batch draws anew. On a mesh, parameters and gradients
    lie as the model's layout says, the rows of a micro-batch are divided, and what comes out is that of all devices.
    """
    differentiate = jax.grad(make_objective(structure, router, remat), has_aux=True)

    def load_of_part(params: Params, frozen: dict[str, Any], micro: Batch, key: jax.Array | None) -> Load:
        model = structure.merge(params, frozen)
        if key is not None:
            with_dropout(model, jax.random.fold_in(key, shards.index(BATCH)) if shards.active() else key)
        out = model.hidden(micro["tokens_BT"], micro["segment_ids_BT"])
        return shards.sum_over(BATCH, load_of(out.routing, micro["segment_ids_BT"] != 0))

    def gradient(
        params: Params, frozen: dict[str, Any], batch_A: Batch, key: jax.Array | None = None
    ) -> tuple[Params, dict]:
        load, keys_A = None, None if key is None else jax.random.split(key, batch_A["tokens_BT"].shape[0])
        if router.aux_scope == "global" and batch_A["tokens_BT"].shape[0] > 1:
            loads_A = jax.lax.map(lambda part: load_of_part(params, frozen, *part), (batch_A, keys_A))
            load = jax.tree.map(lambda x: jax.lax.stop_gradient(jnp.sum(x, axis=0)), loads_A)
        totals = totals_of(batch_A, load)

        def part(micro: Batch, key: jax.Array | None) -> tuple[Params, dict]:
            gradients, sums = differentiate(params, frozen, micro, totals, key)
            return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), sums

        if batch_A["tokens_BT"].shape[0] == 1:
            gradients, sums = part(*jax.tree.map(lambda x: x[0], (batch_A, keys_A)))
        else:
            first = jax.tree.map(lambda x: x[0], (batch_A, keys_A))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(part, *first))
            (gradients, sums), _ = jax.lax.scan(
                lambda total, micro: (jax.tree.map(jnp.add, total, part(*micro)), None), zeros, (batch_A, keys_A)
            )
        return gradients, {**sums, "targets": totals.targets, "tokens": totals.tokens}

    layout = structure.layout
    return gradient if layout is None else on_mesh(gradient, layout)


def on_mesh(gradient: Callable[..., tuple[Params, dict]], layout: Layout) -> Callable[..., tuple[Params, dict]]:
    """`gradient` over the shards of a placed model, summed over devices."""
    every = tuple(name for name in AXES if layout.mesh.shape[name] > 1)

    def on_shard(params: Params, frozen: dict[str, Any], batch_A: Batch, key: jax.Array | None) -> tuple[Params, dict]:
        gradients, sums = gradient(params, frozen, batch_A, key)
        for name, spec in layout.specs(params).items():
            divided = {axis for part in spec for axis in (part if isinstance(part, tuple) else (part,))}
            alike = tuple(axis for axis in every if axis not in divided)  # devices that hold the same parameter
            gradients[name] = jax.lax.psum(gradients[name], alike) if alike else gradients[name]
        local = ("loss", "nll", "aux_loss", "z_loss")
        summed = jax.lax.psum({name: sums[name] for name in local}, every)
        return gradients, sums | summed

    def sharded(
        params: Params, frozen: dict[str, Any], batch_A: Batch, key: jax.Array | None = None
    ) -> tuple[Params, dict]:
        specs = layout.specs(params)
        rows = jax.tree.map(lambda _: P(None, BATCH_AXES), batch_A)
        run = layout.over_shards(
            on_shard, (specs, layout.specs(frozen), rows, None if key is None else P()), (specs, P())
        )
        return run(params, frozen, batch_A, key)

    return sharded


def load_spread(counts_LE: jax.Array) -> dict[str, jax.Array]:
    """How evenly each layer's experts are used: entropy over its maximum (1 is even), and the largest share."""
    shares_LE = counts_LE / jnp.maximum(jnp.sum(counts_LE, axis=-1, keepdims=True), 1.0)
    entropy_L = -jnp.sum(jax.scipy.special.xlogy(shares_LE, shares_LE), axis=-1)
    most = jnp.log(float(max(counts_LE.shape[-1], 2)))
    return {"load_entropy": entropy_L / most, "load_max_share": jnp.max(shares_LE, axis=-1)}


def make_train_step(
    structure: Structure, experiment: Experiment, steps: int, optimiser: optax.GradientTransformation
) -> Callable[[TrainState, dict[str, Any], Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step(state, frozen, batch_A) -> (state, metrics). The state is donated, the frozen base an argument.

    A step whose loss or gradient is not finite still returns: the caller looks at the metrics and must drop the state.
    """
    gradient = make_gradient(structure, experiment.router, experiment.remat)
    rate = schedule(experiment.optimiser, steps)

    dropout = experiment.lora is not None and experiment.lora.dropout > 0

    def step(state: TrainState, frozen: dict[str, Any], batch_A: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(experiment.seed), state.step) if dropout else None
        gradients, sums = gradient(state.params, frozen, batch_A, key)
        gradients, norm = clip(gradients, experiment.optimiser.clip_norm)
        updates, optimiser_state = optimiser.update(gradients, state.optimiser, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        metrics = {name: sums[name] for name in ("loss", "nll", "aux_loss", "z_loss")}
        metrics |= {"grad_norm": norm, "learning_rate": rate(state.step)}
        metrics |= {"tokens": sums["tokens"], "supervised_tokens": sums["targets"]}
        return TrainState(params, optimiser_state, state.step + 1), metrics | load_spread(sums["counts_LE"])

    return jax.jit(step, donate_argnums=0)


def make_eval_step(structure: Structure) -> Callable[[Params, dict[str, Any], Batch], tuple[jax.Array, jax.Array]]:
    """The jitted evaluate(params, frozen, batch) -> (summed NLL, number of targets)."""

    def evaluate(params: Params, frozen: dict[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array]:
        model = structure.merge(params, frozen)
        out = model.hidden(batch["tokens_BT"], batch["segment_ids_BT"])
        model.gather_head()
        sums = next_token_loss(
            model.head, out.hidden_BTD, batch["tokens_BT"], batch["segment_ids_BT"], batch["loss_mask_BT"]
        )
        return shards.sum_over(LENGTH, shards.sum_over(BATCH, sums))

    layout = structure.layout
    if layout is None:
        return jax.jit(evaluate)

    def sharded(params: Params, frozen: dict[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array]:
        rows = jax.tree.map(lambda _: P(BATCH_AXES), batch)
        run = layout.over_shards(evaluate, (layout.specs(params), layout.specs(frozen), rows), P())
        return run(params, frozen, batch)

    return jax.jit(sharded)
