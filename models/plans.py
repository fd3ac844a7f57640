"""RoutingPlan: what routers are told to do. It is data, not code: other values of the same fields do not recompile."""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from bimedix_jax.kernels.pytree import Leaf
from bimedix_jax.models.config import MixtralConfig, RouterConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingPlan:
    """What the routers are told to do.

    A field of None has no effect. B = 1 applies a field to every sequence, T = 1 to every token. Setting a field that
    was None recompiles; changing its values does not. Fields take effect in this order: noise, bias and deviations,
    temperature, experts, active, weights, map, gain. The meaning of B and T depends on the call. For a model they are
    rows and columns of `tokens_BT`. For `generate` they are prompts and their tokens, counted from the first one after
    padding. For an evaluation they are records and their tokens.

    Attributes:
      noise_LBT: float32 standard deviation of Gaussian noise on the logits; needs `keys_LBT`.
      keys_LBT: PRNG keys of the noise. If B and T are 1, row and position of a token are folded into its key.
      bias_LBTE: float32 added to the logits; below -1e8 it bans an expert.
      temperature_LBT: float32 that divides the logits; 1 is neutral.
      experts_LBTK: int32 experts to use, even banned ones; for a slot of -1 the router chooses its best remaining
        expert.
      weights_LBTK: float32 weights to use; a slot of -1 keeps the router's weight. A replay needs experts and weights,
        because an empty slot is recorded with the weight 0.
      deviations_LBTE: float32 added to the logits in units of the standard deviation of the token's own logits.
      active_LBT: int32 number of slots that are used, the first ones; the weights are those of a router with this k.
      map_LBTE: int32 permutation of the experts: where the router chose e, expert map[e] computes.
      gain_LBTE: float32 that multiplies the output of an expert, by the expert that computes; 0 silences it.
    """

    bias_LBTE: Leaf | None = None
    temperature_LBT: Leaf | None = None
    experts_LBTK: Leaf | None = None
    weights_LBTK: Leaf | None = None
    noise_LBT: Leaf | None = None
    keys_LBT: Leaf | None = None
    deviations_LBTE: Leaf | None = None
    active_LBT: Leaf | None = None
    map_LBTE: Leaf | None = None
    gain_LBTE: Leaf | None = None

    @classmethod
    def neutral(cls, config: MixtralConfig, batch: int = 1, length: int = 1) -> "RoutingPlan":
        """A plan without effect in which all fields but noise are set: changing their values does not recompile."""
        lead, experts, top_k = (config.num_layers, batch, length), config.router.num_experts, config.router.top_k
        return cls(
            bias_LBTE=jnp.zeros((*lead, experts), jnp.float32),
            temperature_LBT=jnp.ones(lead, jnp.float32),
            experts_LBTK=jnp.full((*lead, top_k), -1, jnp.int32),
            weights_LBTK=jnp.full((*lead, top_k), -1.0, jnp.float32),
            deviations_LBTE=jnp.zeros((*lead, experts), jnp.float32),
            active_LBT=jnp.full(lead, top_k, jnp.int32),
            map_LBTE=jnp.broadcast_to(jnp.arange(experts, dtype=jnp.int32), (*lead, experts)),
            gain_LBTE=jnp.ones((*lead, experts), jnp.float32),
        )

    @classmethod
    def ban(cls, config: MixtralConfig, experts: Any, layers: Any = None) -> "RoutingPlan":
        """A plan that bans experts (a number or a list of numbers) in some layers, by default in all.

        Raises:
          ValueError: not an integer, or not an expert or layer of the model.
        """
        banned = np.zeros((config.num_layers, 1, 1, config.router.num_experts), np.float32)
        experts_X = whole_numbers("expert", experts, config.router.num_experts)
        layers_L = np.arange(config.num_layers) if layers is None else whole_numbers("layer", layers, config.num_layers)
        banned[layers_L[:, None], 0, 0, experts_X[None]] = -1e9
        return cls(bias_LBTE=jnp.asarray(banned))

    @classmethod
    def noisy(cls, config: MixtralConfig, std: float, seed: int = 0) -> "RoutingPlan":
        """A plan that adds noise of this standard deviation to all logits, by seed, layer, row and position."""
        lead = (config.num_layers, 1, 1)
        return cls(
            noise_LBT=jnp.full(lead, std, jnp.float32),
            keys_LBT=jax.random.split(jax.random.key(seed), config.num_layers).reshape(lead),
        )

    def check(self, config: MixtralConfig, batch: int, length: int) -> None:
        """Raises ValueError if a field does not fit the model or the batch, or has invalid values.

        Values are checked only outside of functions that are being compiled.
        """
        sizes = {"E": config.router.num_experts, "K": config.router.top_k}
        for name, value in self.present().items():
            tail = (sizes[name[-1]],) if name[-1] in sizes else ()
            fits = value.shape[:1] == (config.num_layers,) and value.shape[3:] == tail and value.ndim == 3 + len(tail)
            if not (fits and value.shape[1] in (1, batch) and value.shape[2] in (1, length)):
                raise ValueError(
                    f"RoutingPlan.{name} has shape {value.shape}; this model and batch need "
                    f"{(config.num_layers, batch, length, *tail)}, where batch and length may be 1."
                )
        if (self.noise_LBT is None) != (self.keys_LBT is None):
            raise ValueError("RoutingPlan needs noise_LBT and keys_LBT together; RoutingPlan.noisy makes both.")
        for name, value in self.present().items():
            if name != "keys_LBT" and not isinstance(value, Tracer):
                check_values(name, np.asarray(value), config.router)

    def canonical(self) -> "RoutingPlan":
        """The same plan as JAX arrays in float32 and int32, from any arrays or nested lists.

        Raises:
          ValueError: a field of another type than numbers, or of floats where integers are needed.
        """
        return dataclasses.replace(self, **{name: as_field(name, value) for name, value in self.present().items()})

    def at(self, rows: Int[Array | np.ndarray, "B #T"], positions_BT: Int[Array | np.ndarray, "B T"]) -> "RoutingPlan":
        """The plan for other tokens, given the row and position in this plan of each of them.

        Args:
          rows, positions_BT: int; rows are [B, T], or [B, 1] if all tokens of a row share one. Tokens outside of the
            plan (padding has negative positions) use the nearest entry.
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
        """Whether no field is set."""
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
        """Inverse of `to_numpy`; JAX arrays are not copied.

        Raises:
          ValueError: a name that is not a field.
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
    """`plan` with JAX arrays as fields; an empty plan for None.

    Raises:
      ValueError: it is not a RoutingPlan, does not fit, or has invalid values.
    """
    if plan is None:
        return RoutingPlan()
    if not isinstance(plan, RoutingPlan):
        raise ValueError(f"plan is {plan!r}; give a RoutingPlan, such as RoutingPlan.ban(model.config, 3), or None.")
    plan = plan.canonical()
    plan.check(config, batch, length)
    return plan


def as_field(name: str, value: Any) -> Any:
    """A field's value as a JAX array in the dtype of the field."""
    if name == "keys_LBT":
        if not (isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)):
            raise ValueError("RoutingPlan.keys_LBT must be PRNG keys; RoutingPlan.noisy makes them.")
        return value
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    kinds = "iu" if name in ("experts_LBTK", "active_LBT", "map_LBTE") else "iuf"
    if jnp.dtype(array.dtype).kind not in kinds and not (kinds == "iuf" and array.dtype == jnp.bfloat16):
        what = "integers" if kinds == "iu" else "real numbers"
        raise ValueError(f"RoutingPlan.{name} has type {array.dtype}; give {what}.")
    with np.errstate(over="ignore"):  # -1e300 becomes -inf, which bans too
        return jnp.asarray(array, jnp.int32 if kinds == "iu" else jnp.float32)


def check_values(name: str, value: np.ndarray, router: RouterConfig) -> None:
    """Raises ValueError for invalid values of a field."""
    if name == "experts_LBTK":
        if ((value < -1) | (value >= router.num_experts)).any():
            raise ValueError(f"RoutingPlan.{name} has numbers outside of -1 .. {router.num_experts - 1}.")
        ordered = np.sort(value, axis=-1)
        if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
            raise ValueError(f"RoutingPlan.{name} forces the same expert twice on one token; list it once.")
        return
    if name == "map_LBTE":
        if (np.sort(value, axis=-1) != np.arange(router.num_experts)).any():
            raise ValueError(
                f"RoutingPlan.{name} is not a permutation of the experts; list each of 0 .. {router.num_experts - 1} "
                "once for every token."
            )
        return
    finite_from_0 = (value >= 0) & (value < np.inf)
    allowed = {
        "bias_LBTE": (value < np.inf, "numbers, or -inf for a ban"),
        "temperature_LBT": ((value > 0) & (value < np.inf), "finite numbers above 0; 1 has no effect"),
        "weights_LBTK": (finite_from_0 | (value == -1), "finite numbers from 0, or -1 for the router's weight"),
        "noise_LBT": (finite_from_0, "finite standard deviations from 0"),
        "deviations_LBTE": (np.isfinite(value), "finite numbers"),
        "active_LBT": ((value >= 1) & (value <= router.top_k), f"numbers from 1 to the router's k, {router.top_k}"),
        "gain_LBTE": (finite_from_0, "finite numbers from 0; 1 has no effect"),
    }
    good, wanted = allowed[name]
    if not good.all():
        raise ValueError(f"RoutingPlan.{name} has the value {value[~good].flat[0]}; give {wanted}.")


def whole_numbers(what: str, values: Any, count: int) -> np.ndarray:
    """Indices of experts or layers, of which a model has `count`, as an int array; `values` may be a single number."""
    array = np.atleast_1d(np.asarray(sorted(values) if isinstance(values, set) else values))
    if array.size == 0:
        return np.zeros(0, int)
    if array.dtype.kind not in "iu" or array.ndim != 1 or not ((array >= 0) & (array < count)).all():
        raise ValueError(f"{values!r} is not among the {what}s of this model; give numbers from 0 to {count - 1}.")
    return array.astype(int)


def token_keys(keys: Array, rows: Any, positions: Any) -> Array:
    """[..., B, T] a key for each token: keys [..., 1, 1] with the row and position folded in."""
    rows, positions = jnp.broadcast_arrays(jnp.asarray(rows), jnp.asarray(positions))

    def of_token(key: Array, row: Array, position: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(key, row), position)

    by_token = jax.vmap(of_token, (None, 0, 0))
    flat = jax.vmap(lambda key: by_token(key, rows.reshape(-1), positions.reshape(-1)))(keys.reshape(-1))
    return flat.reshape(*keys.shape[:-2], *rows.shape)
