"""RMSNorm, rotary embeddings, grouped-query attention over packed segments, and its KV cache."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from bimedix_jax.kernels.attention import Cached, attention, write
from bimedix_jax.kernels.pytree import Leaf
from bimedix_jax.models import shards
from bimedix_jax.models.axes import EMBED, HEADS, KV_HEADS, LAYERS
from bimedix_jax.models.config import MixtralConfig, RopeScaling
from bimedix_jax.models.linear import Linear, placeholder


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, with the mean in float32 (arXiv 1910.07467)."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str | None, ...], eps: float, dtype: jnp.dtype | str):
        self.scale = placeholder(shape, axes, dtype)
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        scale = self.scale.get_value().astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return normed.astype(x.dtype) * scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of earlier tokens, for decoding.

    Attributes:
      k_LBSGH, v_LBSGH: rotated keys, and values; slots from `length` on are empty. They are arrays, or for decoding on
        a CPU Unstacked layers of HeadMajor with the same shape.
      segment_ids_BS: segment of each slot, 0 if it is empty or padding.
      length: int32 scalar, number of slots in use, the same for all rows (shorter prompts are padded on the left).
    """

    k_LBSGH: Leaf
    v_LBSGH: Leaf
    segment_ids_BS: Leaf
    length: Leaf

    @classmethod
    def zeros(cls, config: MixtralConfig, batch: int, length: int, dtype: jnp.dtype | str) -> "KVCache":
        """An empty cache with `length` slots."""
        shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
        return cls(
            jnp.zeros(shape, dtype),
            jnp.zeros(shape, dtype),
            jnp.zeros((batch, length), jnp.int32),
            jnp.zeros((), jnp.int32),
        )


def positions_in_segments(segment_ids_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of each token in its segment; a segment is a run of equal ids."""
    index_BT = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1]), segment_ids_BT.shape)
    starts_BT = jnp.concatenate(
        [jnp.ones_like(segment_ids_BT[:, :1], bool), segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]], axis=1
    )
    return index_BT - lax.cummax(jnp.where(starts_BT, index_BT, 0), axis=1)


def locate(
    segment_ids_BT: Int[Array, "B T"], cache: KVCache | None, ancestor_ids_BTA: Int[Array, "B T A"] | None = None
) -> tuple[Int[Array, "B T"], Int[Array, "B S"]]:
    """(position of each token in its segment, segment of each key, where the cache's keys include these tokens).

    A segment continues where its cached tokens and its ancestors end.
    """
    positions_BT = positions_in_segments(segment_ids_BT)

    def count(of_BT: jax.Array, among_BS: jax.Array) -> jax.Array:
        return jnp.sum(of_BT[:, :, None] == among_BS[:, None, :], axis=-1, dtype=jnp.int32)

    key_ids_BS = segment_ids_BT
    if cache is not None:
        positions_BT += count(segment_ids_BT, cache.segment_ids_BS)
        key_ids_BS = lax.dynamic_update_slice_in_dim(cache.segment_ids_BS, segment_ids_BT, cache.length, 1)
    if ancestor_ids_BTA is not None:
        for ids_BT in jnp.unstack(ancestor_ids_BTA, axis=-1):
            positions_BT += jnp.where(ids_BT != segment_ids_BT, count(ids_BT, key_ids_BS), 0)
    return positions_BT, key_ids_BS


def scaled(frequencies_H: Float[Array, "H"], scaling: RopeScaling) -> Float[Array, "H"]:
    """Rotary frequencies after Llama 3.1's scaling."""
    turns_H = scaling.original_max_position_embeddings * frequencies_H / (2 * math.pi)  # within the original context
    kept_H = (turns_H - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept_H = jnp.clip(kept_H, 0, 1)
    return (1 - kept_H) * frequencies_H / scaling.factor + kept_H * frequencies_H


def rotations(
    positions_BT: Int[Array, "B T"], width: int, theta: float, scaling: RopeScaling | None = None
) -> Float[Array, "B T width"]:
    """Cosines, then sines, of each position's angle for each pair of a head of this width.

    They are computed once for all heads and layers. Without the barrier, XLA:CPU would recompute them at every use,
    which costs more than the use.
    """
    half = width // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        frequencies = scaled(frequencies, scaling)
    angles_BTH = positions_BT[..., None].astype(jnp.float32) * frequencies[None, None]
    return lax.optimization_barrier(jnp.concatenate([jnp.cos(angles_BTH), jnp.sin(angles_BTH)], axis=-1))


def rotate(x_BTQH: Float[Array, "B T Q H"], rotations_BTH: Float[Array, "B T H"]) -> Float[Array, "B T Q H"]:
    """Rotary embedding in Hugging Face's layout: element i pairs with i + H/2 (RoFormer, arXiv 2104.09864).

    Angles get no gradient: it would keep the queries and keys of every layer for the backward pass.
    """
    cos, sin = jnp.split(lax.stop_gradient(rotations_BTH)[:, :, None], 2, axis=-1)
    low, high = jnp.split(x_BTQH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x_BTQH.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: MixtralConfig, dtype: jnp.dtype | str):
        layers, width = config.num_layers, config.hidden_size
        q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.config = config
        self.q = Linear((layers, width, q_width), (LAYERS, EMBED, HEADS), dtype)
        self.k = Linear((layers, width, kv_width), (LAYERS, EMBED, KV_HEADS), dtype)
        self.v = Linear((layers, width, kv_width), (LAYERS, EMBED, KV_HEADS), dtype)
        self.o = Linear((layers, q_width, width), (LAYERS, HEADS, EMBED), dtype)

    @jax.named_scope("attention")
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rotations_BTH: Float[Array, "B T H"],
        segment_ids_BT: Int[Array, "B T"],
        key_ids_BS: Int[Array, "B S"],
        ancestor_ids_BTA: Int[Array, "B T A"] | None = None,
        cache: tuple[Cached, Cached] | None = None,
        offset: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Cached, Cached] | None]:
        """(attention output, the cache with these keys and values written from slot `offset` on)."""
        config = self.config
        batch, length, _ = x_BTD.shape
        with jax.named_scope("qkv"):
            q_BTQH, k_BTGH, v_BTGH = (  # this shard's heads
                layer(x_BTD).reshape(batch, length, -1, config.head_dim) for layer in (self.q, self.k, self.v)
            )
        with jax.named_scope("rope"):
            q_BTQH = rotate(q_BTQH, rotations_BTH)
            k_BTGH = rotate(k_BTGH, rotations_BTH)
        k_BSGH, v_BSGH = k_BTGH, v_BTGH
        if cache is not None and offset is not None:
            with jax.named_scope("cache"):
                cache = k_BSGH, v_BSGH = write(cache[0], k_BTGH, offset), write(cache[1], v_BTGH, offset)
        with jax.named_scope("scores"):
            mixed_BTQH = attention(
                q_BTQH,
                k_BSGH,
                v_BSGH,
                segment_ids_BT,
                key_ids_BS,
                offset=offset,
                window=config.sliding_window,
                ancestor_ids_BTA=ancestor_ids_BTA,
            )
        with jax.named_scope("output"):
            return shards.sum_over(HEADS, self.o(mixed_BTQH.reshape(batch, length, -1))), cache
