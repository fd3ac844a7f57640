"""Block and model. Layers are one stacked block that `lax.scan` runs, so compile time does not grow with depth."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Integer

from bimedix_jax.kernels.attention import Cached
from bimedix_jax.kernels.expert_mlp.composed import PRODUCTS
from bimedix_jax.kernels.layer_scan import layer_scan
from bimedix_jax.kernels.nf4_matmul import matmul
from bimedix_jax.models import shards
from bimedix_jax.models.attention import Attention, KVCache, RMSNorm, positions_in_segments, rotations
from bimedix_jax.models.axes import EMBED, LAYERS, VOCAB
from bimedix_jax.models.call import Call, Output, recorded
from bimedix_jax.models.config import LoraConfig, MixtralConfig, Remat, RouterConfig
from bimedix_jax.models.linear import Linear, fill_slots, placeholder
from bimedix_jax.models.moe import ROUTES, MoE
from bimedix_jax.models.router_sums import RouterSums, sums_of
from bimedix_jax.models.routers import Decision, Record, Recorded, RoutingPlan, checked_plan, router_of


class Block(nnx.Module):
    """Pre-norm attention and mixture of experts; every parameter is stacked on a leading layer axis."""

    def __init__(self, config: MixtralConfig, dtype: jnp.dtype | str):
        norm_shape, norm_axes = (config.num_layers, config.hidden_size), (LAYERS, EMBED)
        self.attention_norm = RMSNorm(norm_shape, norm_axes, config.rms_norm_eps, dtype)
        self.attention = Attention(config, dtype)
        self.moe_norm = RMSNorm(norm_shape, norm_axes, config.rms_norm_eps, dtype)
        self.moe = MoE(config, dtype)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rotations_BTH: Float[Array, "B T H"],
        segment_ids_BT: Int[Array, "B T"],
        key_ids_BS: Int[Array, "B S"],
        plan: RoutingPlan,
        cache: tuple[Cached, Cached] | None,
        offset: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], Decision, tuple[Cached, Cached] | None]:
        mixed_BTD, cache = self.attention(
            self.attention_norm(x_BTD), rotations_BTH, segment_ids_BT, key_ids_BS, cache, offset
        )
        x_BTD = x_BTD + mixed_BTD
        experts_BTD, decision = self.moe(self.moe_norm(x_BTD), segment_ids_BT != 0, plan)
        return x_BTD + experts_BTD, decision, cache


class Embedding(nnx.Module):
    """Token embeddings, table [V, D]."""

    def __init__(self, config: MixtralConfig, dtype: jnp.dtype | str):
        self.table = placeholder((config.vocab_size, config.hidden_size), (VOCAB, EMBED), dtype)


@dataclasses.dataclass(frozen=True)
class Head:
    """The output head: a layer of its own, or the table of the embeddings."""

    embed: Embedding
    layer: Linear | None

    def __call__(self, hidden_BTD: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """float32 logits of final hidden states."""
        if self.layer is not None:
            return self.layer(hidden_BTD, jnp.float32)
        return matmul(hidden_BTD, self.embed.table[...].T, jnp.float32)

    @property
    def weight_DV(self) -> jax.Array | None:
        """The matrix of a head that is nothing else; None where it carries an adapter."""
        if self.layer is None:
            return self.embed.table[...].T
        return self.layer.w[...] if self.layer.lora is None else None


class Placement(Protocol):
    """How a model's parameters lie on several devices (bimedix_jax/sharding/layout.py); hashable, equal if alike."""

    def run(self, graph: Any, state: Any, call: Call) -> Output:
        """`Mixtral.run` of the model (graph, state) on every shard."""
        ...


class Origin:
    """Where a model came from. All origins are equal, so that models of one shape share their compiled programs."""

    def __init__(self, folder: str | None):
        self.folder = folder

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return 0


class Mixtral(nnx.Module):
    """Mixtral (arXiv 2401.04088). Built without storage: `bimedix_jax.load` or `init_random` fills the parameters."""

    def __init__(self, config: MixtralConfig, dtype: jnp.dtype | str = "bfloat16"):
        """`dtype` is that of the parameters and of the computation."""
        self.config = config
        self.dtype = str(jnp.dtype(dtype))
        self.lora: LoraConfig | None = None  # of the adapters, if `add_lora` has put any on
        self.placement: Placement | None = None  # of the parameters on several devices, if `sharding.place` did so
        self._origin = Origin(None)
        self.embed = Embedding(config, dtype)
        self.layers = Block(config, dtype)
        self.norm = RMSNorm((config.hidden_size,), (EMBED,), config.rms_norm_eps, dtype)
        self.lm_head: Linear | None = nnx.data(
            None if config.tie_embeddings else Linear((config.hidden_size, config.vocab_size), (EMBED, VOCAB), dtype)
        )

    @property
    def origin(self) -> str | None:
        """Folder that the parameters came from; exports take the tokenizer from there."""
        return self._origin.folder

    @origin.setter
    def origin(self, folder: str | None) -> None:
        self._origin = Origin(folder)

    def hidden(
        self,
        tokens_BT: Integer[Array | np.ndarray, "B T"],
        segment_ids_BT: Integer[Array | np.ndarray, "B T"] | None = None,
        plan: RoutingPlan | None = None,
        cache: KVCache | None = None,
        remat: Remat = "none",
        record: Record = "none",
        groups: int = 0,
        group_BT: Int[Array | np.ndarray, "B T"] | None = None,
    ) -> Output:
        """Everything but the output head, and no record unless asked; see `__call__`."""
        tokens_BT = checked_tokens(tokens_BT, self.config.vocab_size)
        batch, length = tokens_BT.shape
        slots = length if cache is None else cache.segment_ids_BS.shape[1]
        if slots > self.config.max_position_embeddings:
            raise ValueError(
                f"{slots} positions are more than this model's max_position_embeddings "
                f"{self.config.max_position_embeddings}; use shorter sequences."
            )
        if record not in get_args(Record):
            raise ValueError(f"Unknown record {record!r}; choose one of {', '.join(get_args(Record))}.")
        plan = checked_plan(plan, self.config, batch, length)
        segment_ids_BT = jnp.ones((batch, length), jnp.int32) if segment_ids_BT is None else segment_ids_BT
        tokens_BT, segment_ids_BT = jnp.asarray(tokens_BT, jnp.int32), jnp.asarray(segment_ids_BT, jnp.int32)
        group_of = None
        if groups:
            group_of = jnp.zeros_like(tokens_BT) if group_BT is None else jnp.asarray(group_BT, jnp.int32)
        call = Call(tokens_BT, segment_ids_BT, plan, cache, group_of, remat, record, groups)
        return forward(*nnx.split(self), call)

    def run(self, call: Call) -> Output:
        """`hidden` with every operand checked and present; on a shard, the sums are those of its own tokens."""
        positions_BT, key_ids_BS = self.locate(call.segment_ids_BT, call.cache)
        x_BTD = shards.whole("embed.table", self.embed.table[...])[call.tokens_BT].astype(self.dtype)
        x_BTD, routing, sums, kv = self.run_layers(x_BTD, positions_BT, key_ids_BS, call)
        cache = call.cache
        if cache is not None:
            k, v = kv
            cache = KVCache(k, v, key_ids_BS, cache.length + call.tokens_BT.shape[1])
        none: Any = None  # the logits, see Output
        return Output(self.norm(x_BTD), none, routing, sums, cache)

    def locate(self, segment_ids_BT: jax.Array, cache: KVCache | None) -> tuple[jax.Array, jax.Array]:
        """(positions_BT within segments, key_ids_BS with these tokens' ids written in)."""
        positions_BT = positions_in_segments(segment_ids_BT)
        if cache is None:
            return positions_BT, segment_ids_BT
        # a segment goes on where the cache left it: count its earlier tokens
        earlier_BT = jnp.sum(segment_ids_BT[:, :, None] == cache.segment_ids_BS[:, None, :], axis=-1, dtype=jnp.int32)
        key_ids_BS = lax.dynamic_update_slice_in_dim(cache.segment_ids_BS, segment_ids_BT, cache.length, 1)
        return positions_BT + earlier_BT, key_ids_BS

    def run_layers(
        self, x_BTD: jax.Array, positions_BT: jax.Array, key_ids_BS: jax.Array, call: Call
    ) -> tuple[jax.Array, Recorded, RouterSums | None, Any]:
        fill_slots(self.layers)
        self.layers.moe.read_in_place()
        graph, state = nnx.split(self.layers)
        group_BT = None if call.group_BT is None else jnp.where(call.segment_ids_BT != 0, call.group_BT, -1)

        def body(constants: tuple, x: jax.Array, layer: tuple, kv: Any) -> tuple[jax.Array, tuple, Any]:
            rotations_BTH, segment_ids_BT, key_ids_BS, group_BT, offset = constants
            state, plan = layer
            block = nnx.merge(graph, shards.whole_state("layers", state))
            x, decision, kv = block(x, rotations_BTH, segment_ids_BT, key_ids_BS, plan, kv, offset)
            sums = sums_of(decision, group_BT, call.groups) if call.groups else None
            return x, (recorded(decision.routing, call.record), sums), kv

        cache = call.cache
        kv, offset = (None, None) if cache is None else ((cache.k_LBSGH, cache.v_LBSGH), cache.length)
        turned_BTH = rotations(positions_BT, self.config.head_dim, self.config.rope_theta)
        constants = (turned_BTH, call.segment_ids_BT, key_ids_BS, group_BT, offset)
        x_BTD, (routing, sums), kv = layer_scan(
            checkpointed(body, call.remat),
            constants,
            x_BTD,
            (state, call.plan),
            kv,
            backend="scan" if shards.active() else None,  # the other forms know no collectives
        )
        return x_BTD, routing, sums, kv

    def with_router(self, router: RouterConfig) -> "Mixtral":
        """This model with another router variant or other parameters of it; the parameters are shared.

        Raises:
          ValueError: an unknown variant or another number of experts, or the model is sharded already.
        """
        router_of(router)
        if self.placement is not None:
            raise ValueError("The model is sharded already; choose its router first.")
        if router.num_experts != self.config.router.num_experts:
            raise ValueError(f"This model has {self.config.router.num_experts} experts, not {router.num_experts}.")
        other = nnx.merge(*nnx.split(self), copy=True)
        other.config = dataclasses.replace(self.config, router=router)
        other.layers.attention.config = other.config
        if router != self.config.router:
            other.layers.moe.set_router(other.config)
            other.reset_router_state()
        return other

    def reset_router_state(self) -> None:
        """Sets what a router variant learns outside of the gradient to its start, zero."""
        if (state := self.layers.moe.state) is not None:
            state.set_value(jnp.zeros(state.get_value().shape, jnp.float32))

    def gather_head(self) -> None:
        """On a shard: puts the output head together, in place, before `head` is called again and again."""
        if self.lm_head is not None:
            nnx.update(self.lm_head, shards.whole_state("lm_head", nnx.state(self.lm_head)))
        else:
            self.embed.table.set_value(shards.whole("embed.table", self.embed.table[...]))

    @property
    def head(self) -> "Head":
        """What turns final hidden states [..., D] into float32 logits [..., V]."""
        return Head(self.embed, self.lm_head)

    def __call__(
        self,
        tokens_BT: Integer[Array | np.ndarray, "B T"],
        segment_ids_BT: Integer[Array | np.ndarray, "B T"] | None = None,
        plan: RoutingPlan | None = None,
        cache: KVCache | None = None,
        remat: Remat = "none",
        record: Record = "full",
        groups: int = 0,
        group_BT: Int[Array | np.ndarray, "B T"] | None = None,
    ) -> Output:
        """Runs the model.

        Args:
          tokens_BT: token ids, any integer dtype.
          segment_ids_BT: documents packed in a row have different ids and do not see each other; 0 is padding, on
            either side. None: one document a row, no padding.
          plan: what the routers are told to do.
          cache: keys and values of earlier tokens; these tokens continue them.
          remat: what the backward pass recomputes; never what the routers decided.
          record: how much of that `routing` holds: "none", "choices" (experts and weights) or "full" (logits too).
          groups: how many groups of tokens `sums` tells apart; 0 for no sums, from which the router losses follow.
          group_BT: int32 group of each token, from 0; None puts all tokens into group 0.

        Raises:
          ValueError: more positions than the model has, or a plan that does not fit.
        """
        out = self.hidden(tokens_BT, segment_ids_BT, plan, cache, remat, record, groups, group_BT)
        return dataclasses.replace(out, logits_BTV=self.head(out.hidden_BTD))


def checked_tokens(tokens_BT: Any, vocab_size: int) -> Any:
    """Token ids, looked at where they are known: JAX would clamp one that the model does not have.

    Raises:
      ValueError: not [B, T], or an id outside of the vocabulary.
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


def checkpointed(body: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """The body of the loop over layers, which keeps for the backward pass what `remat` says.

    What routers decided is kept in each case. A recomputation rounds differently, and one token that changed its expert
    would give the gradient of another function than the one that gave the loss.
    """
    policies = jax.checkpoint_policies
    if remat == "layer":
        policy = policies.save_only_these_names(ROUTES)
    elif remat == "experts":
        policy = policies.save_only_these_names(ROUTES, PRODUCTS)
    elif shards.active():
        policy = shards.keep_all_but_parameters
    else:
        return body
    return jax.checkpoint(body, prevent_cse=False, policy=policy)


@functools.partial(jax.jit, static_argnames="graph")
def forward(graph: Any, state: Any, call: Call) -> Output:
    """`Mixtral.run` of the model (graph, state), compiled once for each shape and structure.

    A call outside of any jit is fast too.
    """
    model = nnx.merge(graph, state)
    if model.placement is None or shards.active():
        return model.run(call)
    return model.placement.run(graph, state, call)


def init_random(config: MixtralConfig, seed: int = 0, dtype: jnp.dtype | str = "float32", std: float = 0.02) -> Mixtral:
    """A Mixtral with normal weights of this std and unit norms; each parameter's draw depends on its name alone."""
    model = Mixtral(config, dtype)
    key = jax.random.key(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(map(str, path))
        shape = variable.get_value().shape
        if path[-1] == "scale":
            value = jnp.ones(shape, dtype)
        else:
            draw = jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), shape, jnp.float32)
            value = (std * draw).astype(dtype)
        variable.set_value(value)
    model.reset_router_state()
    return model
