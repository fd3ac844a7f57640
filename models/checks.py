"""Checks of what callers pass to a model, where values are known: outside of functions that are being compiled."""

from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bimedix_jax.models.attention import KVCache
from bimedix_jax.models.call import Call, Observe, Start
from bimedix_jax.models.config import MixtralConfig, Remat
from bimedix_jax.models.plans import RoutingPlan, checked_plan
from bimedix_jax.models.routers import Record


def checked_call(
    config: MixtralConfig,
    tokens_BT: Any,
    segment_ids_BT: Any,
    plan: RoutingPlan | None,
    cache: KVCache | None,
    remat: Remat,
    record: Record,
    groups: int,
    group_BT: Any,
    observe: Observe | None = None,
    operands: Any = None,
    start: Start | None = None,
    ancestor_ids_BTA: Any = None,
) -> Call:
    """The operands of `Mixtral.__call__`, checked, with defaults filled in.

    Raises:
      ValueError: tokens, a plan or a record that this model cannot take, or more positions than it has.
    """
    tokens_BT = checked_tokens(tokens_BT, config.vocab_size)
    batch, length = tokens_BT.shape
    slots = length if cache is None else cache.segment_ids_BS.shape[1]
    if slots > config.max_position_embeddings:
        raise ValueError(
            f"{slots} positions are more than this model's max_position_embeddings "
            f"{config.max_position_embeddings}; use shorter sequences."
        )
    if record not in get_args(Record):
        raise ValueError(f"Unknown record {record!r}; choose one of {', '.join(get_args(Record))}.")
    plan = checked_plan(plan, config, batch, length)
    segment_ids_BT = jnp.ones((batch, length), jnp.int32) if segment_ids_BT is None else segment_ids_BT
    tokens_BT, segment_ids_BT = jnp.asarray(tokens_BT, jnp.int32), jnp.asarray(segment_ids_BT, jnp.int32)
    group_of = None
    if groups or observe is not None:
        group_of = jnp.zeros_like(tokens_BT) if group_BT is None else jnp.asarray(group_BT, jnp.int32)
    if start is not None and (cache is not None or record != "none" or groups or observe is not None):
        raise ValueError("A call that starts at a later layer has no cache and keeps no record, sums or observations.")
    ancestors = None if ancestor_ids_BTA is None else jnp.asarray(ancestor_ids_BTA, jnp.int32)
    kept = (remat, record, groups, operands, observe, start, ancestors)
    return Call(tokens_BT, segment_ids_BT, plan, cache, group_of, *kept)


def checked_tokens(tokens_BT: Any, vocab_size: int) -> Any:
    """Token ids. Where their values are known, an id outside of the vocabulary is an error; JAX would clamp it.

    Raises:
      ValueError: not integers [B, T], or an id outside of the vocabulary.
    """
    if isinstance(tokens_BT, Tracer):
        return tokens_BT
    ids = np.asarray(tokens_BT)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"tokens have shape {ids.shape} and type {ids.dtype}; give integers [batch, length].")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"token id {wrong} is outside of the vocabulary of {vocab_size}; use the model's tokenizer.")
    return tokens_BT if hasattr(tokens_BT, "shape") else ids
