"""Fused backend in plain XLA operations: for each expert, blocks of its rows run through gate, up, SwiGLU and down.

Intermediate results exist for one block of rows only. An expert is dequantised once in the forward pass and once in
the backward pass. The backward pass recomputes gate and up (storing them for all rows was slower). It does not need the
outputs: the gradient of a pair's weight is <w2^T dout, h>, and both are computed anyway.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bimedix_jax.kernels.expert_mlp.layout import (
    Deltas,
    Expert,
    Weights,
    evens_first,
    interleaved,
    is_packed,
    join,
    load,
    refusal,
    sources,
)
from bimedix_jax.kernels.grouped_matmul.xla import for_each_block, overrun, pick_blocks
from bimedix_jax.kernels.permute import Permutation
from bimedix_jax.kernels.products import dot, dot_rows, from_bits, to_bits

__all__ = ["backward", "forward", "refusal"]


def gather(rows: jax.Array, ids: jax.Array) -> jax.Array:
    return rows.at[ids].get(mode="promise_in_bounds")


def cut(rows: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(rows, start, size)


def put(rows: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(rows, to_bits(block), start, 0)


def tokens_of(permutation: Permutation, k: int, spare: int) -> jax.Array:
    """Token of each sorted row, followed by zeros for `spare` unused rows."""
    return jnp.pad(permutation.order_M // k, (0, spare))


@jax.named_scope("experts/w1_w3")
def gate_and_up(x_BD: jax.Array, expert: Expert, inward: int) -> jax.Array:
    """float32 [B, 2 F]."""
    if expert.a.shape[1]:
        x_BD = join([x_BD, dot(x_BD, expert.a).astype(x_BD.dtype)], 1)
    return dot(x_BD, expert.up, inward)


def swiglu(x_BD: jax.Array, expert: Expert, inward: int) -> jax.Array:
    """float32 [B, F]."""
    if isinstance(expert.up, tuple):
        with jax.named_scope("experts/w1_w3"):
            gate, up = (dot(x_BD, w) for w in expert.up)
    else:
        gate, up = jnp.split(gate_and_up(x_BD, expert, inward), 2, axis=1)
    with jax.named_scope("experts/w1_w3"):
        return jax.nn.silu(gate) * up


@jax.named_scope("combine")
def sum_pairs(rows_MD: jax.Array, permutation: Permutation, weights_NK: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32: each token's weighted sum of the rows (bits) of its pairs; pairs without an expert count as zero."""
    inverse_NK = permutation.inverse_M.reshape(weights_NK.shape)
    owned_NK = inverse_NK < jnp.sum(permutation.group_sizes_E)

    def pair(k: int) -> jax.Array:
        rows = from_bits(gather(rows_MD, inverse_NK[:, k]), dtype).astype(jnp.float32)
        return jnp.where(owned_NK[:, k, None], rows * weights_NK[:, k, None], 0)

    return functools.reduce(jnp.add, [pair(k) for k in range(weights_NK.shape[1])])


def forward(
    x_ND: jax.Array,
    weights_NK: jax.Array,
    permutation: Permutation,
    weights: Weights,
    deltas: Deltas,
    keep: bool = False,
) -> tuple[jax.Array, tuple[()]]:
    """(y_ND, nothing for `backward`, also with `keep`)."""
    del keep
    dtype, inward = x_ND.dtype, int(is_packed(weights))
    width = x_ND.shape[1]
    rows = permutation.order_M.shape[0]
    blocks = pick_blocks(rows, permutation.group_sizes_E.shape[0])
    spare = overrun(blocks)
    token_M = tokens_of(permutation, weights_NK.shape[1], spare)
    x_bits = to_bits(evens_first(x_ND) if inward else x_ND)

    def step(y: jax.Array, e: jax.Array, start: jax.Array, stop: jax.Array, size: int, expert: Expert) -> jax.Array:
        del e, stop
        with jax.named_scope("dispatch"):
            x_BD = from_bits(gather(x_bits, cut(token_M, start, size)), dtype)
        hidden = swiglu(x_BD, expert, inward)
        with jax.named_scope("experts/w2"):
            out = dot(hidden.astype(dtype), expert.down, inward)
            out_BD = out[:, :width]
            if expert.b.shape[0]:
                out_BD = out_BD + dot(out[:, width:].astype(dtype), expert.b)
        return put(y, out_BD.astype(dtype), start)

    y = for_each_block(
        permutation.group_sizes_E,
        blocks,
        sources(weights, deltas, dtype),
        functools.partial(load, weights, dtype, True),
        step,
        jnp.zeros((rows + spare, width), x_bits.dtype),
    )
    return sum_pairs(y, permutation, weights_NK, dtype).astype(dtype), ()


def backward_block(
    x_BD: jax.Array, dout_BD: jax.Array, scale_B: jax.Array, both_B2F: jax.Array, expert: Expert, inward: int
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """(dx_BD, gradient of each row's weight, gradients of (a^T, b of gate and up, a2^T, b2)), all float32."""
    dtype, width = x_BD.dtype, x_BD.shape[1]
    rank, has_a = expert.b.shape[0], expert.a.shape[1] > 0
    gate, up = jnp.split(both_B2F, 2, axis=1)
    sigmoid = jax.nn.sigmoid(gate)
    h = gate * sigmoid * up
    with jax.named_scope("experts/w2"):
        q_BR = dot(dout_BD, expert.b, 1).astype(dtype) if rank else None
        dh = dot(dout_BD if q_BR is None else join([dout_BD, q_BR], 1), expert.down, 1 - inward)
    dscale_B = jnp.sum(dh * h, axis=1)
    dh = dh * scale_B[:, None]
    dgate = dh * up * sigmoid * (1 + gate * (1 - sigmoid))
    dboth = join([dgate.astype(dtype), (dh * gate * sigmoid).astype(dtype)], 1)
    found: list[jax.Array] = []
    with jax.named_scope("experts/w1_w3"):
        dx = dot(dboth, expert.up, 1 - inward)
        dx_BD = dx[:, :width]
        if has_a:
            dp_BS = dx[:, width:].astype(dtype)
            dx_BD = dx_BD + dot(dp_BS, expert.a, 1)
            found += [dot_rows(dp_BS, x_BD), dot_rows(dot(x_BD, expert.a).astype(dtype), dboth)]
    if q_BR is not None:
        with jax.named_scope("experts/w2"):
            h = h.astype(dtype)
            a2 = expert.down[width:] if inward else expert.down[:, width:]
            p_BR = (dot(h, a2, inward) * scale_B[:, None]).astype(dtype)
            found += [dot_rows((q_BR * scale_B[:, None]).astype(dtype), h), dot_rows(p_BR, dout_BD)]
    return dx_BD, dscale_B, tuple(found)


def backward(
    x_ND: jax.Array,
    weights_NK: jax.Array,
    permutation: Permutation,
    weights: Weights,
    deltas: Deltas,
    saved: tuple[()],
    dout_ND: jax.Array,
) -> tuple[jax.Array, jax.Array, Deltas]:
    """Gradients of x, of the pairs' weights, and of the adapters' factors (in their dtype)."""
    del saved
    dtype, inward = x_ND.dtype, int(is_packed(weights))
    width, hidden = weights[0].shape[1:]
    rows, top_k = permutation.order_M.shape[0], weights_NK.shape[1]
    blocks = pick_blocks(rows, permutation.group_sizes_E.shape[0])
    spare = overrun(blocks)
    token_M = tokens_of(permutation, top_k, spare)
    scale_M = jnp.pad(gather(weights_NK.reshape(-1).astype(jnp.float32), permutation.order_M), (0, spare))
    x_bits, dout_bits = to_bits(evens_first(x_ND) if inward else x_ND), to_bits(dout_ND.astype(dtype))

    def step(carry: Any, e: jax.Array, start: jax.Array, stop: jax.Array, size: int, expert: Expert) -> Any:
        dx, dscale, sums = carry
        token_B = cut(token_M, start, size)
        with jax.named_scope("dispatch"):
            x_BD = from_bits(gather(x_bits, token_B), dtype)
        # without the mask, rows of the next group would add to the gradients of this expert's factors
        own_B = start + jnp.arange(size) < stop
        dout = jnp.where(own_B[:, None], gather(dout_bits, token_B), jnp.zeros((), dout_bits.dtype))
        both = gate_and_up(x_BD, expert, inward)
        dx_BD, dscale_B, found = backward_block(
            x_BD, from_bits(dout, dtype), cut(scale_M, start, size), both, expert, inward
        )
        sums = tuple(total.at[e].add(part, mode="promise_in_bounds") for total, part in zip(sums, found, strict=True))
        return put(dx, dx_BD.astype(dtype), start), put(dscale, dscale_B, start), sums

    source = sources(weights, deltas, dtype)
    experts, _, s = source[1].a.shape
    rank = source[1].b.shape[1]
    shapes = ([(s, width), (s, 2 * hidden)] if s else []) + ([(rank, hidden), (rank, width)] if rank else [])
    sums = tuple(jnp.zeros((experts, *shape), jnp.float32) for shape in shapes)
    start = (jnp.zeros((rows + spare, width), x_bits.dtype), jnp.zeros(rows + spare, jnp.float32), sums)
    dx, dscale, sums = for_each_block(
        permutation.group_sizes_E, blocks, source, functools.partial(load, weights, dtype, False), step, start
    )
    dx_ND = sum_pairs(dx, permutation, jnp.ones(weights_NK.shape, jnp.float32), dtype)
    owned_M = permutation.inverse_M < jnp.sum(permutation.group_sizes_E)
    dweights_NK = jnp.where(owned_M, gather(dscale, permutation.inverse_M), 0).reshape(weights_NK.shape)
    dx_ND = (interleaved(dx_ND) if inward else dx_ND).astype(dtype)
    return dx_ND, dweights_NK.astype(weights_NK.dtype), delta_gradients(sums, deltas, hidden, bool(inward))


def delta_gradients(sums: tuple[jax.Array, ...], deltas: Deltas, hidden: int, packed: bool) -> Deltas:
    """Sums over blocks, split into the factors' shapes and order."""
    order = interleaved if packed else lambda x, axis=-1: x
    found: list[tuple[jax.Array, jax.Array] | None] = [None, None, None]
    parts = list(sums)
    first = 0
    if deltas[0] is not None or deltas[1] is not None:
        da, db = parts.pop(0), parts.pop(0)
        for i in range(2):
            pair = deltas[i]
            if pair is not None:
                own = slice(first, first + pair[0].shape[2])
                first = own.stop
                db_ERF = order(db[:, own, i * hidden : (i + 1) * hidden])
                found[i] = (order(da[:, own]).mT.astype(pair[0].dtype), db_ERF.astype(pair[1].dtype))
    if (pair := deltas[2]) is not None:
        found[2] = (order(parts[0]).mT.astype(pair[0].dtype), parts[1].astype(pair[1].dtype))
    return tuple(found)
