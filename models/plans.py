"""RoutingPlan: what routers are told to do. Data, not code: another plan of the same form compiles nothing anew."""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from bimedix_jax.kernels.pytree import Leaf
from bimedix_jax.models.config import MixtralConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingPlan:
    """What the routers are told to do. B and T may be 1 to mean every sequence, every token; None leaves them free.

    Setting a field that was None compiles once more; other values of it do not. The order of effects is that of the
    fields. What B and T count depends on the call: rows and columns of `tokens_BT` for a model; prompts and their
    tokens, counted from the first one after padding, for `generate`; records and their tokens for an evaluation.

    Attributes:
      noise_LBT: float32 standard deviation of Gaussian noise on the logits; needs `keys_LBT`.
      keys_LBT: PRNG keys of the noise; where B and T are 1, each token's key follows from its row and position.
      bias_LBTE: float32 added to the logits; below -1e8 it bans an expert.
      temperature_LBT: float32 that divides the logits; 1 is neutral.
      experts_LBTK: int32 experts to use, banned or not; -1 leaves a slot to the router's best expert that is not forced
        already.
      weights_LBTK: float32 weights to use; -1 leaves a slot its own. A replay needs experts and weights, since a slot
        that was empty has the weight 0.
    """

    bias_LBTE: Leaf | None = None
    temperature_LBT: Leaf | None = None
    experts_LBTK: Leaf | None = None
    weights_LBTK: Leaf | None = None
    noise_LBT: Leaf | None = None
    keys_LBT: Leaf | None = None

    @classmethod
    def neutral(cls, config: MixtralConfig, batch: int = 1, length: int = 1) -> "RoutingPlan":
        """A plan with every field but noise set that changes nothing: vary any of them without recompiling."""
        lead = (config.num_layers, batch, length)
        return cls(
            jnp.zeros((*lead, config.router.num_experts), jnp.float32),
            jnp.ones(lead, jnp.float32),
            jnp.full((*lead, config.router.top_k), -1, jnp.int32),
            jnp.full((*lead, config.router.top_k), -1.0, jnp.float32),
        )

    @classmethod
    def ban(cls, config: MixtralConfig, experts: Any, layers: Any = None) -> "RoutingPlan":
        """A plan that bans experts (one number, several or none) in some layers, by default in all.

        Raises:
          ValueError: a number that the model does not have, or no whole number.
        """
        banned = np.zeros((config.num_layers, 1, 1, config.router.num_experts), np.float32)
        experts_X = whole_numbers("expert", experts, config.router.num_experts)
        layers_L = np.arange(config.num_layers) if layers is None else whole_numbers("layer", layers, config.num_layers)
        banned[layers_L[:, None], 0, 0, experts_X[None]] = -1e9
        return cls(bias_LBTE=jnp.asarray(banned))

    @classmethod
    def noisy(cls, config: MixtralConfig, std: float, seed: int = 0) -> "RoutingPlan":
        """A plan that adds noise of this standard deviation to all logits; it depends on seed, layer, row, position."""
        lead = (config.num_layers, 1, 1)
        return cls(
            noise_LBT=jnp.full(lead, std, jnp.float32),
            keys_LBT=jax.random.split(jax.random.key(seed), config.num_layers).reshape(lead),
        )

    def check(self, config: MixtralConfig, batch: int, length: int) -> None:
        """Raises ValueError if a field does not fit the model or the batch, or holds what no router can do.

        Values are looked at where they are known, that is outside of a function that is being compiled.
        """
        last = {"bias_LBTE": config.router.num_experts, "experts_LBTK": config.router.top_k}
        last["weights_LBTK"] = config.router.top_k
        for name, value in self.present().items():
            tail = (last[name],) if name in last else ()
            fits = value.shape[:1] == (config.num_layers,) and value.shape[3:] == tail and value.ndim == 3 + len(tail)
            if not (fits and value.shape[1] in (1, batch) and value.shape[2] in (1, length)):
                raise ValueError(
                    f"RoutingPlan.{name} has shape {value.shape}; this model and batch need "
                    f"{(config.num_layers, batch, length, *tail)}, where batch and length may be 1."
                )
        if (self.noise_LBT is None) != (self.keys_LBT is None):
            raise ValueError("RoutingPlan.noise_LBT and keys_LBT go together; RoutingPlan.noisy makes both.")
        for name, value in self.present().items():
            if name != "keys_LBT" and not isinstance(value, Tracer):
                check_values(name, np.asarray(value), config.router.num_experts)

    def canonical(self) -> "RoutingPlan":
        """The same plan as arrays of JAX in float32 and int32, from any arrays or nested lists.

        Raises:
          ValueError: a field that holds no numbers, or fractions where whole numbers belong.
        """
        return dataclasses.replace(self, **{name: as_field(name, value) for name, value in self.present().items()})

    def at(self, rows: Int[Array | np.ndarray, "B #T"], positions_BT: Int[Array | np.ndarray, "B T"]) -> "RoutingPlan":
        """The plan for tokens that stand elsewhere: each one's row and position in this plan.

        Args:
          rows, positions_BT: int; rows [B, T], or [B, 1] where the tokens of a row share one. Those outside of the plan
            (padding has positions below 0) read the nearest entry.
        """

        def take(x: Any) -> Any:
            batch, length = x.shape[1:3]
            if batch == length == 1:
                return x
            row = 0 if batch == 1 else jnp.clip(rows, 0, batch - 1)
            position = 0 if length == 1 else jnp.clip(positions_BT, 0, length - 1)
            return jnp.asarray(x)[:, row, position]

        fields = {name: take(x) for name, x in self.present().items()}
        if self.keys_LBT is not None and self.keys_LBT.shape[1:] == (1, 1):
            fields["keys_LBT"] = token_keys(self.keys_LBT, rows, positions_BT)
        return RoutingPlan(**fields)

    def fold_in(self, number: Any) -> "RoutingPlan":
        """The plan with other noise, drawn for this number: an optimiser step, for instance."""
        if self.keys_LBT is None:
            return self
        folded = jax.vmap(lambda key: jax.random.fold_in(key, number))(self.keys_LBT.reshape(-1))
        return dataclasses.replace(self, keys_LBT=folded.reshape(self.keys_LBT.shape))

    @property
    def is_free(self) -> bool:
        """Whether it tells the routers nothing."""
        return not self.present()

    def digest(self) -> str:
        """SHA-256 of the fields that are set, their shapes and values."""
        parts = hashlib.sha256()
        for name, value in self.canonical().to_numpy().items():
            parts.update(f"{name} {value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        return parts.hexdigest()

    def to_numpy(self) -> dict[str, np.ndarray]:
        """The fields that are set, by name; keys as their uint32 data."""
        return {
            name: np.asarray(jax.random.key_data(value) if name == "keys_LBT" else value)
            for name, value in self.present().items()
        }

    @classmethod
    def from_numpy(cls, fields: dict[str, Any]) -> "RoutingPlan":
        """Inverse of `to_numpy`; arrays of JAX stay where they are.

        Raises:
          ValueError: a name that is no field.
        """
        unknown = set(fields) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"A routing plan has no field {', '.join(sorted(unknown))}.")
        return cls(
            **{
                name: jax.random.wrap_key_data(jnp.asarray(value)) if name == "keys_LBT" else jnp.asarray(value)
                for name, value in fields.items()
            }
        )

    def present(self) -> dict[str, Any]:
        """The fields that are set, by name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}


def checked_plan(plan: Any, config: MixtralConfig, batch: int, length: int) -> RoutingPlan:
    """`plan`, or a free one for None, with arrays of JAX in its fields.

    Raises:
      ValueError: it is no RoutingPlan, does not fit, or holds what no router can do.
    """
    if plan is None:
        return RoutingPlan()
    if not isinstance(plan, RoutingPlan):
        raise ValueError(f"plan is {plan!r}; give a RoutingPlan, such as RoutingPlan.ban(model.config, 3), or None.")
    plan = plan.canonical()
    plan.check(config, batch, length)
    return plan


def as_field(name: str, value: Any) -> Any:
    """A field's value as an array of JAX in its dtype."""
    if name == "keys_LBT":
        if not (isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)):
            raise ValueError("RoutingPlan.keys_LBT holds no PRNG keys; RoutingPlan.noisy makes them.")
        return value
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    kinds = "iu" if name == "experts_LBTK" else "iuf"
    if jnp.dtype(array.dtype).kind not in kinds and not (kinds == "iuf" and array.dtype == jnp.bfloat16):
        what = "whole numbers" if kinds == "iu" else "real numbers"
        raise ValueError(f"RoutingPlan.{name} holds values of type {array.dtype}; give {what}.")
    with np.errstate(over="ignore"):  # -1e300 bans as well as -inf
        return jnp.asarray(array, jnp.int32 if kinds == "iu" else jnp.float32)


def check_values(name: str, value: np.ndarray, num_experts: int) -> None:
    """Raises ValueError for values of a field that mean nothing to a router."""
    if name == "experts_LBTK":
        if ((value < -1) | (value >= num_experts)).any():
            raise ValueError(f"RoutingPlan.{name} holds numbers outside of -1 .. {num_experts - 1}.")
        ordered = np.sort(value, axis=-1)
        if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
            raise ValueError(f"RoutingPlan.{name} forces the same expert twice on one token; name it once.")
        return
    allowed = {
        "bias_LBTE": (value < np.inf, "numbers, or -inf for a ban"),
        "temperature_LBT": ((value > 0) & (value < np.inf), "finite numbers above 0, and 1 to leave a token alone"),
        "weights_LBTK": (((value >= 0) & (value < np.inf)) | (value == -1), "finite numbers from 0, or -1 for its own"),
        "noise_LBT": ((value >= 0) & (value < np.inf), "finite standard deviations from 0"),
    }
    good, wanted = allowed[name]
    if not good.all():
        raise ValueError(f"RoutingPlan.{name} holds {value[~good].flat[0]}; give {wanted}.")


def whole_numbers(what: str, values: Any, count: int) -> np.ndarray:
    """One number, several or none of what a model has `count` of, as an int array."""
    array = np.atleast_1d(np.asarray(sorted(values) if isinstance(values, set) else values))
    if array.size == 0:
        return np.zeros(0, int)
    if array.dtype.kind not in "iu" or array.ndim != 1 or not ((array >= 0) & (array < count)).all():
        raise ValueError(f"{values!r} is no {what} of this model; give numbers from 0 to {count - 1}.")
    return array.astype(int)


def token_keys(keys: Array, rows: Any, positions: Any) -> Array:
    """A key for each token from keys [..., 1, 1], its row and its position: [..., B, T]."""
    rows, positions = jnp.broadcast_arrays(jnp.asarray(rows), jnp.asarray(positions))

    def of_token(key: Array, row: Array, position: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(key, row), position)

    by_token = jax.vmap(of_token, (None, 0, 0))
    flat = jax.vmap(lambda key: by_token(key, rows.reshape(-1), positions.reshape(-1)))(keys.reshape(-1))
    return flat.reshape(*keys.shape[:-2], *rows.shape)
