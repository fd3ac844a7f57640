"""Next-token cross entropy over supervised targets, in chunks, as a sum and a count.

The loss of an optimiser step is (NLL of all its targets) / (number of its targets). A mean over the means of
micro-batches would weight a target by the number of targets in its micro-batch, so sum and count are separate.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.cross_entropy import cross_entropy
from bimedix_jax.models import embedding, shards
from bimedix_jax.models.axes import LENGTH

Head = Callable[[jax.Array], jax.Array]
"""`model.head`: final hidden states [..., D] -> float32 logits [..., V]."""

CHUNK_TOKENS = 1024
"""Tokens in a chunk of float32 logits: 192 MiB with a vocabulary of 49,152, where 2 x 2,048 tokens take 768 MiB."""


def targets_of(
    tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"], loss_mask_BT: Bool[Array, "B T"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """(token that each position predicts, whether its loss counts).

    The loss counts if the next token is a supervised target of the same segment. At padding and at the end of a segment
    it does not count.
    """
    ahead_BT = jnp.roll(tokens_BT, -1, axis=1)
    same_BT = (segment_ids_BT == jnp.roll(segment_ids_BT, -1, axis=1)) & (segment_ids_BT != 0)
    learned_BT = (same_BT & jnp.roll(loss_mask_BT, -1, axis=1)).at[:, -1].set(False)
    return ahead_BT, learned_BT


def token_losses(
    head: Head, hidden_BTD: Float[Array, "B T D"], targets_BT: Int[Array, "B T"], chunk_tokens: int = CHUNK_TOKENS
) -> Float[Array, "B T"]:
    """float32 -log p(target) in nats of every position.

    On a CPU a model's own head runs over tiles of the vocabulary (kernels/cross_entropy). Otherwise `head` runs over
    chunks of the sequence, and the backward pass recomputes it. Float32 logits exist for about `chunk_tokens` tokens at
    a time.
    """
    batch, length, _ = hidden_BTD.shape
    weight_DV = head.weight_DV if isinstance(head, embedding.Head) else None
    if weight_DV is not None and backends.platform() == "cpu" and not shards.active():
        states_ND = hidden_BTD.reshape(batch * length, -1)
        return cross_entropy(states_ND, weight_DV, targets_BT.reshape(-1)).reshape(batch, length)
    width = min(length, max(1, chunk_tokens // batch))
    chunks = -(-length // width)

    def chunked(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, chunks * width - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, chunks, width, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def losses(hidden_BCD: jax.Array, targets_BC: jax.Array) -> jax.Array:
        logits_BCV = head(hidden_BCD)
        # comparing with an iota fuses into the reduction, and its gradient needs no scatter
        vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2)
        target_BC = jnp.sum(jnp.where(vocabulary == targets_BC[..., None], logits_BCV, 0.0), axis=-1)
        return jax.nn.logsumexp(logits_BCV, axis=-1) - target_BC

    if chunks == 1:
        return losses(hidden_BTD, targets_BT)
    _, nll = jax.lax.scan(lambda _, chunk: (None, losses(*chunk)), None, (chunked(hidden_BTD), chunked(targets_BT)))
    return jnp.moveaxis(nll, 0, 1).reshape(batch, -1)[:, :length]


@jax.named_scope("loss")
def target_losses(
    head: Head,
    hidden_BTD: Float[Array, "B T D"],
    tokens_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    loss_mask_BT: Bool[Array, "B T"],
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """(NLL in nats of each target, float32, 0 elsewhere; where the targets are). On a shard, its part of the length.

    Args:
      hidden_BTD: `model.hidden(...).hidden_BTD`.
      segment_ids_BT: 0 is padding.
      loss_mask_BT: True where the token itself is a supervised target, not where it is predicted.
    """
    targets_BT, learned_BT = targets_of(tokens_BT, segment_ids_BT, loss_mask_BT)
    # shards with the same rows each compute a part of them
    hidden_BTD, targets_BT, learned_BT = (shards.own_part(LENGTH, x, 1) for x in (hidden_BTD, targets_BT, learned_BT))
    nll_BT = token_losses(head, hidden_BTD, targets_BT, chunk_tokens)
    return jnp.where(learned_BT, nll_BT, 0.0), learned_BT


def next_token_loss(
    head: Head,
    hidden_BTD: Float[Array, "B T D"],
    tokens_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    loss_mask_BT: Bool[Array, "B T"],
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(summed NLL in nats, number of targets) of `target_losses`, float32. On a shard, its own part of both."""
    nll_BT, learned_BT = target_losses(head, hidden_BTD, tokens_BT, segment_ids_BT, loss_mask_BT, chunk_tokens)
    return jnp.sum(nll_BT), jnp.sum(learned_BT, dtype=jnp.float32)
