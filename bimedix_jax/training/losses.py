"""Next-token cross entropy over learned targets, in chunks, as a sum and a count.

Sum and count stay apart because the loss of an optimiser step is (NLL of all its targets) / (number of its targets): a
mean of per-micro-batch means would weigh a target by how many others happen to share its micro-batch.
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
"""Tokens whose float32 logits exist at once: 192 MiB at a vocabulary of 49,152; 2 x 2,048 tokens would take 768."""


def targets_of(
    tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"], loss_mask_BT: Bool[Array, "B T"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """(token that each position predicts, whether its loss counts).

    It counts where that next token is a learned target of the same segment; never at padding or a segment's end.
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
    chunks of the sequence and again in the backward pass, so that float32 logits exist for about `chunk_tokens` tokens
    at a time.
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
        # a comparison with iota fuses into the reduction and differentiates without a scatter
        vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2)
        target_BC = jnp.sum(jnp.where(vocabulary == targets_BC[..., None], logits_BCV, 0.0), axis=-1)
        return jax.nn.logsumexp(logits_BCV, axis=-1) - target_BC

    if chunks == 1:
        return losses(hidden_BTD, targets_BT)
    _, nll = jax.lax.scan(lambda _, chunk: (None, losses(*chunk)), None, (chunked(hidden_BTD), chunked(targets_BT)))
    return jnp.moveaxis(nll, 0, 1).reshape(batch, -1)[:, :length]


@jax.named_scope("loss")
def next_token_loss(
    head: Head,
    hidden_BTD: Float[Array, "B T D"],
    tokens_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    loss_mask_BT: Bool[Array, "B T"],
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(summed NLL in nats, number of targets), float32; on a shard, its own part of both.

    Args:
      hidden_BTD: `model.hidden(...).hidden_BTD`.
      segment_ids_BT: 0 is padding.
      loss_mask_BT: True where the token is a learned target (not where one is predicted).
    """
    targets_BT, learned_BT = targets_of(tokens_BT, segment_ids_BT, loss_mask_BT)
    # shards that hold the same rows take a part of each
    hidden_BTD, targets_BT, learned_BT = (shards.own_part(LENGTH, x, 1) for x in (hidden_BTD, targets_BT, learned_BT))
    nll_BT = token_losses(head, hidden_BTD, targets_BT, chunk_tokens)
    return jnp.sum(jnp.where(learned_BT, nll_BT, 0.0)), jnp.sum(learned_BT, dtype=jnp.float32)
