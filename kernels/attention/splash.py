"""Backend for TPUs: JAX's splash attention (jax.experimental.pallas.ops.tpu.splash_attention).

It computes causal attention of grouped heads over segments, with a window, forward and backward, and visits only the
blocks of keys that causality and the window allow. It does not skip blocks of other segments. On a CPU it is
interpreted.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.attention.api import SAVED
from bimedix_jax.kernels.attention.blocks import splash_block
from bimedix_jax.kernels.attention.cache import Cached, HeadMajor
from bimedix_jax.kernels.manual_axes import varying

LANES = 128
"""The width of heads must be a multiple of this."""
SIZES = (
    "block_q",
    "block_kv",
    "block_kv_compute",
    "block_q_dkv",
    "block_kv_dkv",
    "block_kv_dkv_compute",
    "block_q_dq",
    "block_kv_dq",
)
"""JAX's names of the sizes of blocks; all are the same here."""


def refusal(q_BTQH: jax.Array, k_BSGH: Cached, v_BSGH: Cached, cached: bool) -> str | None:
    """The reason why the kernel cannot take these operands, or None."""
    if backends.platform() == "gpu":
        return "it is a kernel for TPUs."
    if cached or isinstance(k_BSGH, HeadMajor):
        return "it has no key-value cache: its mask is fixed when it is compiled."
    length, width = q_BTQH.shape[1], q_BTQH.shape[3]
    if splash_block(length) is None or width % LANES:
        return f"{length} tokens and heads of width {width} are not both multiples of {LANES}."
    if varying(q_BTQH, k_BSGH, v_BSGH):
        return "JAX's kernel does not support shard_map with check_vma=True."
    return None


@functools.cache
def kernel(length: int, shared: int, window: int | None, interpret: bool) -> splash.SplashAttentionKernel:
    """The kernel for the query heads of one key head."""
    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    sizes = splash.BlockSizes(**dict.fromkeys(SIZES, splash_block(length) or length))
    with jax.ensure_compile_time_eval():  # the tables of its blocks are constants, also inside of jit
        return splash.make_splash_mqa_single_device(
            masks.MultiHeadMask([mask] * shared),
            block_sizes=sizes,
            residual_checkpoint_name=SAVED,
            interpret=interpret,
        )


def attention(
    q_BTQH: jax.Array,
    k_BSGH: jax.Array,
    v_BSGH: jax.Array,
    query_ids_BT: jax.Array,
    key_ids_BS: jax.Array,
    _offset: None,
    window: int | None,
) -> jax.Array:
    """As `api.attention`."""
    batch, length, heads, width = q_BTQH.shape
    groups = k_BSGH.shape[2]
    attend = kernel(length, heads // groups, window, backends.platform() == "cpu")
    q_BGRTH = (q_BTQH * width**-0.5).reshape(batch, length, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    k_BGSH, v_BGSH = (x.astype(q_BTQH.dtype).swapaxes(1, 2) for x in (k_BSGH, v_BSGH))

    def of_example(q: jax.Array, k: jax.Array, v: jax.Array, query_ids: jax.Array, key_ids: jax.Array) -> jax.Array:
        segments = splash.SegmentIds(query_ids, key_ids)
        return jax.vmap(lambda q, k, v: jnp.asarray(attend(q, k, v, segment_ids=segments)))(q, k, v)

    out = jax.vmap(of_example)(q_BGRTH, k_BGSH, v_BGSH, query_ids_BT, key_ids_BS)
    return out.reshape(batch, heads, length, width).swapaxes(1, 2)
