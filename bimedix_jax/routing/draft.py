"""The fields of a plan while rules are applied to it, as NumPy arrays: what each op writes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.models.routers import BANNED, RoutingPlan
from bimedix_jax.routing.chance import chosen, draws

BAN = -1e9
"""Bias of a banned expert."""
FIELDS: dict[str, tuple[str, ...]] = {
    "ban": ("bias_LBTE",),
    "by_language": ("bias_LBTE",),
    "bias": ("bias_LBTE", "deviations_LBTE"),
    "noise": ("noise_LBT", "keys_LBT"),
    "temperature": ("temperature_LBT",),
    "top_k": ("active_LBT",),
    "force": ("experts_LBTK", "weights_LBTK"),
    "include": ("experts_LBTK",),
    "hash": ("experts_LBTK", "weights_LBTK"),
    "random": ("experts_LBTK", "weights_LBTK"),
    "shuffle": ("experts_LBTK", "weights_LBTK"),
    "freeze": ("experts_LBTK", "weights_LBTK"),
    "uniform": ("weights_LBTK",),
    "swap": ("map_LBTE",),
    "permute": ("map_LBTE",),
    "gain": ("gain_LBTE",),
}
"""op -> the fields of a plan that it sets."""


class NoSlotLeft(Exception):
    """`include` finds that all slots of a token are forced."""


class Draft:
    """A plan without effect, and methods that write into it where a bool mask [L, B, T] is set.

    Rules are applied in order. Bias, gain and temperature accumulate, permutations follow each other, and for the other
    fields the last rule wins.
    """

    def __init__(self, config: MixtralConfig, batch: int, length: int):
        self.router = config.router
        lead = (config.num_layers, batch, length)
        experts, top_k = config.router.num_experts, config.router.top_k
        words = jax.random.key_data(jax.random.key(0)).shape[-1]
        self.bias_LBTE = np.zeros((*lead, experts), np.float32)
        self.deviations_LBTE = np.zeros((*lead, experts), np.float32)
        self.temperature_LBT = np.ones(lead, np.float32)
        self.noise_LBT = np.zeros(lead, np.float32)
        self.keys_LBTW = np.zeros((*lead, words), np.uint32)
        self.experts_LBTK = np.full((*lead, top_k), -1, np.int32)
        self.weights_LBTK = np.full((*lead, top_k), -1, np.float32)
        self.uniform_LBT = np.zeros(lead, bool)
        self.active_LBT = np.full(lead, top_k, np.int32)
        self.map_LBTE = np.tile(np.arange(experts, dtype=np.int32), (*lead, 1))
        self.gain_LBTE = np.ones((*lead, experts), np.float32)

    def cells(self, mask_LBT: np.ndarray, experts: Any) -> np.ndarray:
        """bool [L, B, T, E]: these experts of the tokens of the mask."""
        member_E = np.zeros(self.router.num_experts, bool)
        member_E[list(experts)] = True
        return mask_LBT[..., None] & member_E

    def ban(self, mask_LBT: np.ndarray, experts: Any) -> None:
        self.bias_LBTE[self.cells(mask_LBT, experts)] += BAN

    def keep_only(self, mask_LBT: np.ndarray, experts: Any) -> None:
        self.ban(mask_LBT, set(range(self.router.num_experts)) - set(experts))

    def add_bias(self, mask_LBT: np.ndarray, experts: Any, value: float, unit: str) -> None:
        field = self.bias_LBTE if unit == "logits" else self.deviations_LBTE
        field[self.cells(mask_LBT, experts)] += np.float32(value)

    def multiply_gain(self, mask_LBT: np.ndarray, experts: Any, value: float) -> None:
        self.gain_LBTE[self.cells(mask_LBT, experts)] *= np.float32(value)

    def permute(self, mask_LBT: np.ndarray, to: Any) -> None:
        self.map_LBTE[mask_LBT] = np.asarray(to, np.int32)[self.map_LBTE[mask_LBT]]

    def swap(self, mask_LBT: np.ndarray, first: int, second: int) -> None:
        to = np.arange(self.router.num_experts)
        to[[first, second]] = second, first
        self.permute(mask_LBT, to)

    def force(self, mask_LBT: np.ndarray, experts_LBTK: np.ndarray, weights_LBTK: np.ndarray | None = None) -> None:
        """Sets all slots; without weights, those of the router for these experts."""
        self.experts_LBTK[mask_LBT] = np.broadcast_to(experts_LBTK, self.experts_LBTK.shape)[mask_LBT]
        if weights_LBTK is None:
            self.weights_LBTK[mask_LBT] = -1
        else:
            self.weights_LBTK[mask_LBT] = np.broadcast_to(weights_LBTK, self.weights_LBTK.shape)[mask_LBT]
            self.uniform_LBT[mask_LBT] = False

    def include(self, mask_LBT: np.ndarray, experts: Any) -> None:
        """Forces experts into slots that are free.

        Raises:
          NoSlotLeft: a token has none.
        """
        own_NK = self.experts_LBTK[mask_LBT]
        for expert in experts:
            missing_N, free_NK = (own_NK != expert).all(-1), own_NK == -1
            if (missing_N & ~free_NK.any(-1)).any():
                raise NoSlotLeft
            rows_M = np.flatnonzero(missing_N)
            own_NK[rows_M, free_NK.argmax(-1)[rows_M]] = expert
        self.experts_LBTK[mask_LBT] = own_NK

    def force_drawn(self, mask_LBT: np.ndarray, op: str, seed: int, *parts_BT: np.ndarray) -> None:
        """Forces k experts that are drawn for each layer from the seed and the parts."""
        layers_L, experts_E = np.arange(mask_LBT.shape[0]), np.arange(self.router.num_experts)
        parts = [part_BT[None, :, :, None] for part_BT in parts_BT]
        scores_LBTE = draws(op, seed, layers_L[:, None, None, None], *parts, experts_E)
        self.force(mask_LBT, chosen(scores_LBTE, self.router.top_k))

    def add_noise(self, mask_LBT: np.ndarray, std: float, seed: int, *parts_BT: np.ndarray) -> None:
        """Noise with a key for each token, from the seed, the layer and the parts."""
        layers_L, words_W = np.arange(mask_LBT.shape[0]), np.arange(self.keys_LBTW.shape[-1])
        parts = [part_BT[None, :, :, None] for part_BT in parts_BT]
        keys_LBTW = draws("noise", seed, layers_L[:, None, None, None], *parts, words_W).astype(np.uint32)
        self.noise_LBT[mask_LBT] = std
        self.keys_LBTW[mask_LBT] = keys_LBTW[mask_LBT]

    def bans_too_many(self) -> tuple[int, int, int] | None:
        """(layer, experts left, experts needed) of a token that has too few; None if there is none."""
        left_LBT = (self.bias_LBTE >= BANNED).sum(-1)
        short = np.argwhere(left_LBT < self.active_LBT)
        if not len(short):
            return None
        place = tuple(short[0])
        return int(place[0]), int(left_LBT[place]), int(self.active_LBT[place])

    def plan(self, fields: frozenset[str] | None = None) -> RoutingPlan:
        """The plan, with all fields or with these."""
        equal_LBT1 = np.float32(self.router.scale) / self.active_LBT[..., None]
        self.weights_LBTK = np.where(self.uniform_LBT[..., None], equal_LBT1, self.weights_LBTK).astype(np.float32)
        names = [field.name for field in dataclasses.fields(RoutingPlan) if fields is None or field.name in fields]
        found = {name: jnp.asarray(getattr(self, name)) for name in names if name != "keys_LBT"}
        if "keys_LBT" in names:
            found["keys_LBT"] = jax.random.wrap_key_data(jnp.asarray(self.keys_LBTW))
        return RoutingPlan(**found)
