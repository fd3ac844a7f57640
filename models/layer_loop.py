"""The loop over layers. One stacked block runs once for each layer, so that compile time does not grow with depth."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from bimedix_jax.kernels.layer_scan import layer_scan
from bimedix_jax.models import shards
from bimedix_jax.models.call import Call, recorded
from bimedix_jax.models.linear import fill_slots, read_in_place
from bimedix_jax.models.remat import checkpointed
from bimedix_jax.models.router_sums import RouterSums, sums_of
from bimedix_jax.models.routers import Recorded


def run_layers(
    blocks: Any, x_BTD: jax.Array, rotations_BTH: jax.Array, key_ids_BS: jax.Array, call: Call
) -> tuple[jax.Array, Recorded, RouterSums | None, Any, Any]:
    """(states after the last layer, the routers' records, their sums, (keys, values) of all layers or None, observed).

    Args:
      blocks: a `Block` whose parameters are stacked over layers. On a shard, those of a layer are gathered
        just before it runs.
    """
    fill_slots(blocks, "layers")
    read_in_place(blocks, "layers")
    graph, state = nnx.split(blocks)
    group_BT = None if call.group_BT is None else jnp.where(call.segment_ids_BT != 0, call.group_BT, -1)

    def body(constants: tuple, x: jax.Array, layer: tuple, kv: Any) -> tuple[jax.Array, tuple, Any]:
        rotations_BTH, segment_ids_BT, key_ids_BS, ancestor_ids_BTA, group_BT, offset, _ = constants
        state, plan, operand, _ = layer
        block = nnx.merge(graph, shards.gather_state("layers", state))
        before = x
        x, read_BTD, decision, kv = block(
            x, rotations_BTH, segment_ids_BT, key_ids_BS, ancestor_ids_BTA, plan, kv, offset
        )
        sums = sums_of(decision, group_BT, call.groups) if call.groups else None
        seen = None if call.observe is None else call.observe(block.moe, read_BTD, decision, group_BT, operand, before)
        return x, (recorded(decision.routing, call.record), sums, seen), kv

    def later(constants: tuple, x: jax.Array, layer: tuple, kv: Any) -> tuple[jax.Array, tuple, Any]:
        runs = layer[-1] >= constants[-1]
        x = lax.cond(runs, lambda x: body(constants, x, layer, kv)[0], lambda x: x, x)
        return x, (None, None, None), kv

    cache = call.cache
    kv, offset = (None, None) if cache is None else ((cache.k_LBSGH, cache.v_LBSGH), cache.length)
    start = call.start
    ids = (call.segment_ids_BT, key_ids_BS, call.ancestor_ids_BTA)
    constants = (rotations_BTH, *ids, group_BT, offset, start and start.layer)
    numbers = None if start is None else jnp.arange(len(jax.tree.leaves(state)[0]), dtype=jnp.int32)
    x_BTD, (routing, sums, observed), kv = layer_scan(
        checkpointed(body if start is None else later, call.remat),
        constants,
        x_BTD,
        (state, call.plan, call.operands, numbers),
        kv,
        backend="scan" if shards.active() else None,  # the other backends do not support collectives
    )
    return x_BTD, routing, sums, kv, observed
