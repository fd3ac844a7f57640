"""Declared properties of every router variant, and its obedience to every field of a plan."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bimedix_jax.models.config import RouterConfig
from bimedix_jax.models.plans import checked_plan, token_keys
from bimedix_jax.models.routers import NO_EXPERT, ROUTERS, Routing, RoutingPlan, route, router_of

B, T, E = 3, 6, 4
SCALES = {name: 1.7 if "scale" in router.reads else 1.0 for name, router in ROUTERS.items()}
"""Configuration with a scale other than 1, if the variant reads one."""

every_variant = pytest.mark.parametrize("variant", ROUTERS)


def logits(experts: int = E, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((B, T, experts)), jnp.float32)


def config(variant: str, top_k: int = 2, experts: int = E) -> RouterConfig:
    return RouterConfig(num_experts=experts, top_k=top_k, variant=variant, scale=SCALES[variant])


def state(variant: str, experts: int = E) -> jax.Array | None:
    """Logits that are far enough apart for clear choices."""
    return None if ROUTERS[variant].update is None else jnp.linspace(-0.5, 0.5, E)[:experts]


def routed(variant: str, plan: RoutingPlan | None = None, top_k: int = 2, experts: int = E, **given) -> Routing:
    return route(
        logits(experts), config(variant, top_k, experts), plan or RoutingPlan(), state=state(variant, experts), **given
    )


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


FORMULAS = {
    "topk": lambda x, chosen, scale: np.exp(x)[chosen] / np.exp(x)[chosen].sum(),
    "softmax_topk": lambda x, chosen, scale: scale * np.exp(x)[chosen] / np.exp(x).sum(),
    "sigmoid_bias": lambda x, chosen, scale: scale * sigmoid(x)[chosen] / sigmoid(x)[chosen].sum(),
}
"""Weights of the chosen experts [K] of one token with logits x [E], from the papers. Add a row for a new variant."""


def oracle(x: np.ndarray, chosen: np.ndarray, router: RouterConfig) -> np.ndarray:
    """The formula of a variant in float64."""
    return FORMULAS[router.variant](np.asarray(x, np.float64), chosen, router.scale)


@every_variant
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_declared_properties(variant: str, top_k: int) -> None:
    routing = routed(variant, top_k=top_k)
    experts, weights = np.asarray(routing.experts_LBTK), np.asarray(routing.weights_LBTK)
    assert experts.shape == weights.shape == (B, T, top_k)
    assert experts.dtype == np.int32
    assert weights.dtype == np.float32
    assert ((experts >= 0) & (experts < E)).all()
    assert all(len(set(chosen)) == top_k for chosen in experts.reshape(-1, top_k))
    assert (weights > 0).all()
    total = weights.sum(-1)
    if ROUTERS[variant].normalised:
        np.testing.assert_allclose(total, SCALES[variant], rtol=1e-6)
    else:
        assert (total <= SCALES[variant] * (1 + 1e-6)).all()
        assert top_k == E or (total < SCALES[variant]).all(), "the refused experts keep their share"
    np.testing.assert_array_equal(routing.logits_LBTE, logits())


@every_variant
def test_weights_and_gradients_equal_the_float64_formula(variant: str) -> None:
    experts = np.asarray(routed(variant).experts_LBTK)
    mix = np.random.default_rng(1).standard_normal(experts.shape)

    def loss(x: jax.Array) -> jax.Array:
        routing = route(x, config(variant), RoutingPlan(), state=state(variant))
        return jnp.sum(routing.weights_LBTK * mix)

    def expected(x: np.ndarray) -> float:
        pairs = [(b, t) for b in range(B) for t in range(T)]
        return sum(float(oracle(x[p], experts[p], config(variant)) @ mix[p]) for p in pairs)

    x = np.asarray(logits(), np.float64)
    value, gradient = jax.value_and_grad(loss)(logits())
    np.testing.assert_allclose(value, expected(x), rtol=1e-6)
    for index in np.ndindex(B, 2, E):
        step = np.zeros_like(x)
        step[index] = 1e-5
        slope = (expected(x + step) - expected(x - step)) / 2e-5
        np.testing.assert_allclose(gradient[index], slope, rtol=1e-4, atol=1e-6)


@every_variant
def test_tokens_are_routed_independently(variant: str) -> None:
    before = routed(variant)
    changed = logits().at[1, 2].set(-logits()[1, 2])
    after = route(changed, config(variant), RoutingPlan(), state=state(variant))
    differs = np.asarray(before.weights_LBTK != after.weights_LBTK).any(-1)
    np.testing.assert_array_equal(np.argwhere(differs), [[1, 2]])


@every_variant
def test_shift_invariance_is_as_declared(variant: str) -> None:
    shifted = route(logits() + 3.0, config(variant), RoutingPlan(), state=state(variant))
    same = np.allclose(shifted.weights_LBTK, routed(variant).weights_LBTK, rtol=1e-5)
    assert same == ROUTERS[variant].shift_invariant


@every_variant
def test_banned_experts_are_not_chosen(variant: str) -> None:
    bias = jnp.zeros((1, 1, E)).at[..., 3].set(-1e9)
    routing = routed(variant, RoutingPlan(bias_LBTE=bias))
    experts = np.asarray(routing.experts_LBTK)
    assert (experts != 3).all()
    assert (routed(variant).experts_LBTK == 3).any(), "without the ban it is chosen"
    # the same as without the expert: the weights of the others are renormalised
    three = route(logits()[..., :3], config(variant, experts=3), RoutingPlan(), state=state(variant, 3))
    np.testing.assert_array_equal(experts, three.experts_LBTK)
    np.testing.assert_allclose(routing.weights_LBTK, three.weights_LBTK, rtol=1e-5)


@every_variant
@pytest.mark.parametrize("temperature", [1e-9, 1e9])
def test_temperatures_do_not_change_bans(variant: str, temperature: float) -> None:
    plan = RoutingPlan(
        bias_LBTE=jnp.zeros((1, 1, E)).at[..., 1].set(-1e9), temperature_LBT=jnp.full((1, 1), temperature)
    )
    experts = np.asarray(routed(variant, plan).experts_LBTK)
    assert (experts != 1).all()
    assert (experts != NO_EXPERT).all()


@every_variant
def test_slots_are_empty_if_too_few_experts_are_left(variant: str) -> None:
    bias = jnp.full((1, 1, E), -1e9).at[..., 2].set(0.0)
    routing = routed(variant, RoutingPlan(bias_LBTE=bias))
    assert (np.asarray(routing.experts_LBTK) == [2, NO_EXPERT]).all()
    assert (routing.weights_LBTK[..., 1] == 0).all()
    assert (routing.weights_LBTK[..., 0] > 0).all()
    nothing = routed(variant, RoutingPlan(bias_LBTE=jnp.full((1, 1, E), -1e9)))
    assert (nothing.experts_LBTK == NO_EXPERT).all()
    assert (nothing.weights_LBTK == 0).all()
    gradient = jax.grad(
        lambda x: jnp.sum(route(x, config(variant), RoutingPlan(bias_LBTE=bias), state=state(variant)).weights_LBTK)
    )(logits())
    assert np.isfinite(gradient).all()


@every_variant
def test_forced_experts_keep_their_order(variant: str) -> None:
    forced = jnp.asarray(
        np.random.default_rng(0).permuted(np.tile(np.arange(E), (B, T, 1)), axis=-1)[..., :2], jnp.int32
    )
    routing = routed(variant, RoutingPlan(experts_LBTK=forced))
    np.testing.assert_array_equal(routing.experts_LBTK, forced)
    for place in np.ndindex(B, T):
        expected = oracle(np.asarray(logits(), np.float64)[place], np.asarray(forced)[place], config(variant))
        np.testing.assert_allclose(routing.weights_LBTK[place], expected, rtol=1e-5)
    half = routed(variant, RoutingPlan(experts_LBTK=jnp.asarray([[[2, -1]]], jnp.int32)))
    best = np.where(
        np.asarray(routed(variant, top_k=1).experts_LBTK[..., 0]) == 2,
        -2,
        routed(variant, top_k=1).experts_LBTK[..., 0],
    )
    assert (half.experts_LBTK[..., 0] == 2).all()
    assert ((best == -2) | (half.experts_LBTK[..., 1] == best)).all(), "the other slot is the router's best"


@every_variant
def test_forced_weights_are_used(variant: str) -> None:
    routing = routed(variant, RoutingPlan(weights_LBTK=jnp.asarray([[[0.25, -1.0]]])))
    assert (routing.weights_LBTK[..., 0] == 0.25).all()
    np.testing.assert_array_equal(routing.weights_LBTK[..., 1], routed(variant).weights_LBTK[..., 1])


@every_variant
def test_bias_applies_before_temperature(variant: str) -> None:
    bias, temperature = jnp.asarray([[[0.5, -0.25, 0.0, 1.0]]]), jnp.asarray([[0.5]])
    steered = (logits() + bias) / temperature[..., None]
    direct = route(steered, config(variant), RoutingPlan(), state=state(variant))
    planned = routed(variant, RoutingPlan(bias_LBTE=bias, temperature_LBT=temperature))
    np.testing.assert_array_equal(planned.experts_LBTK, direct.experts_LBTK)
    np.testing.assert_allclose(planned.weights_LBTK, direct.weights_LBTK, rtol=1e-5)
    np.testing.assert_array_equal(planned.logits_LBTE, logits(), "the record has the router's own")


@every_variant
def test_noise_depends_on_key_row_and_position_only(variant: str) -> None:
    keys = token_keys(jax.random.key(5).reshape(1, 1), jnp.arange(B)[:, None], jnp.arange(T)[None])
    plan = RoutingPlan(noise_LBT=jnp.full((1, 1), 2.0))
    noisy = routed(variant, plan, key=keys)
    assert not np.array_equal(noisy.weights_LBTK, routed(variant).weights_LBTK)
    np.testing.assert_array_equal(noisy.weights_LBTK, routed(variant, plan, key=keys).weights_LBTK)
    rows = route(logits()[1:, 2:], config(variant), plan, state=state(variant), key=keys[1:, 2:])
    np.testing.assert_array_equal(rows.weights_LBTK, noisy.weights_LBTK[1:, 2:])
    with pytest.raises(ValueError, match="needs a key for each token"):
        routed(variant, plan)


def test_noise_has_the_requested_standard_deviation() -> None:
    rows, columns = jnp.arange(50)[:, None], jnp.arange(40)[None]
    keys = token_keys(jax.random.key(0).reshape(1, 1), rows, columns)
    plan = RoutingPlan(noise_LBT=jnp.full((1, 1), 3.0), bias_LBTE=jnp.asarray([[[0.0, 0, -1e9, -1e9]]]))
    routing = route(jnp.zeros((50, 40, E)), RouterConfig(num_experts=E, top_k=2), plan, key=keys)
    difference = jnp.log(routing.weights_LBTK[..., 0] / routing.weights_LBTK[..., 1])  # |N(0, 2 * 9)|
    np.testing.assert_allclose(jnp.mean(difference), 3 * 2 / np.sqrt(np.pi), rtol=0.05)


@every_variant
def test_padding_gets_no_expert(variant: str) -> None:
    valid = jnp.ones((B, T), bool).at[0, :3].set(False)
    forced = RoutingPlan(experts_LBTK=jnp.asarray([[[1, -1]]], jnp.int32), weights_LBTK=jnp.asarray([[[0.5, 0.5]]]))
    for plan in (RoutingPlan(), forced):
        routing = routed(variant, plan, valid_BT=valid)
        assert (routing.experts_LBTK[0, :3] == NO_EXPERT).all()
        assert (routing.weights_LBTK[0, :3] == 0).all()
        assert (routing.experts_LBTK[valid] != NO_EXPERT).all()


@every_variant
def test_fewer_active_slots_equal_a_smaller_k(variant: str) -> None:
    active = jnp.asarray(np.random.default_rng(0).integers(1, 4, (B, T)), jnp.int32)
    routing = routed(variant, RoutingPlan(active_LBT=active), top_k=3)
    for k in (1, 2, 3):
        smaller, own = routed(variant, top_k=k), np.asarray(active == k)
        np.testing.assert_array_equal(routing.experts_LBTK[own][:, :k], smaller.experts_LBTK[own])
        np.testing.assert_allclose(routing.weights_LBTK[own][:, :k], smaller.weights_LBTK[own], rtol=1e-6)
        assert (routing.experts_LBTK[own][:, k:] == NO_EXPERT).all()
        assert (routing.weights_LBTK[own][:, k:] == 0).all()


@every_variant
def test_deviations_are_those_of_the_token(variant: str) -> None:
    units = jnp.asarray([[[0.5, -1.0, 0.0, 2.0]]])
    bias = units * jnp.std(logits(), axis=-1, keepdims=True)
    found, expected = (routed(variant, plan) for plan in (RoutingPlan(deviations_LBTE=units), RoutingPlan(bias)))
    np.testing.assert_array_equal(found.experts_LBTK, expected.experts_LBTK)
    np.testing.assert_allclose(found.weights_LBTK, expected.weights_LBTK, rtol=1e-5)
    flat = jax.grad(
        lambda x: jnp.sum(route(x, config(variant), RoutingPlan(deviations_LBTE=units)).weights_LBTK[..., 0])
    )(jnp.zeros((B, T, E)))
    assert np.isfinite(flat).all(), "equal logits have no deviation"


@every_variant
def test_permutation_and_gain_follow_the_weights(variant: str) -> None:
    """In this order: the gain belongs to the expert that computes. A silenced expert keeps its slot."""
    before, order = routed(variant), np.array([2, 0, 3, 1])
    gain = jnp.asarray([[[1.0, 0.0, 0.5, 3.0]]])
    plan = RoutingPlan(map_LBTE=jnp.asarray(order, jnp.int32)[None, None], gain_LBTE=gain)
    routing = routed(variant, plan)
    experts = order[np.asarray(before.experts_LBTK)]
    np.testing.assert_array_equal(routing.experts_LBTK, experts)
    expected = np.asarray(before.weights_LBTK) * np.asarray(gain)[0, 0][experts]
    np.testing.assert_allclose(routing.weights_LBTK, expected, rtol=1e-6)
    assert (routing.experts_LBTK == 1).any()
    forced = routed(variant, dataclasses.replace(plan, weights_LBTK=jnp.full((1, 1, 2), 0.5)))
    np.testing.assert_allclose(forced.weights_LBTK, 0.5 * np.asarray(gain)[0, 0][experts], rtol=1e-6)


@every_variant
def test_gradients_of_gains_and_logits_under_a_plan_equal_the_float64_formula(variant: str) -> None:
    rng = np.random.default_rng(0)
    bias, temperature = rng.normal(0, 0.3, (1, 1, E)), rng.uniform(0.5, 2, (B, T))
    units, active = rng.normal(0, 0.5, (B, T, E)), rng.integers(1, 3, (B, T))
    order = rng.permuted(np.tile(np.arange(E), (B, T, 1)), axis=-1)
    mix, gain = rng.standard_normal(E), rng.uniform(0.5, 2, E)
    gain[1] = 0
    plan = RoutingPlan(
        bias_LBTE=jnp.asarray(bias, jnp.float32),
        temperature_LBT=jnp.asarray(temperature, jnp.float32),
        deviations_LBTE=jnp.asarray(units, jnp.float32),
        active_LBT=jnp.asarray(active, jnp.int32),
        map_LBTE=jnp.asarray(order, jnp.int32),
    )

    def loss(x: jax.Array, gain_E: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = dataclasses.replace(plan, gain_LBTE=gain_E[None, None])
        routing = route(x, config(variant), own, state=state(variant))
        return jnp.sum(routing.weights_LBTK * jnp.asarray(mix, jnp.float32)[routing.experts_LBTK]), routing.experts_LBTK

    arguments = logits(), jnp.asarray(gain, jnp.float32)
    (value, ran), (by_logit, by_gain) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*arguments)

    def expected(x: np.ndarray, gain: np.ndarray) -> float:
        total = 0.0
        for p in np.ndindex(B, T):
            steered = (x[p] + bias[0, 0] + units[p] * x[p].std()) / temperature[p]
            experts = np.asarray(ran)[p][: active[p]]
            chosen = np.argsort(order[p])[experts]
            total += float(oracle(steered, chosen, config(variant)) * gain[experts] @ mix[experts])
        return total

    x = np.asarray(logits(), np.float64)
    np.testing.assert_allclose(value, expected(x, gain), rtol=1e-5)
    for of, found in ((x, by_logit), (gain, by_gain)):
        for index in np.ndindex(of[:1].shape):
            before = of[index]
            ends = []
            for step in (1e-5, -1e-5):
                of[index] = before + step
                ends.append(expected(x, gain))
            of[index] = before
            np.testing.assert_allclose(found[index], (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-5)


def test_nan_stays_visible() -> None:
    routing = route(logits().at[0, 0, 0].set(jnp.nan), RouterConfig(num_experts=E, top_k=2), RoutingPlan())
    assert np.isnan(routing.weights_LBTK[0, 0]).any()


def test_the_balancing_bias_changes_choices_but_not_weights() -> None:
    router = config("sigmoid_bias")
    plain = route(logits(), router, RoutingPlan(), state=jnp.zeros(E))
    pushed = route(logits(), router, RoutingPlan(), state=jnp.asarray([2.0, 0, 0, 0]))
    assert (pushed.experts_LBTK == 0).any(-1).all(), "an expert whose bias exceeds every score is always chosen"
    assert not (plain.experts_LBTK == 0).any(-1).all()
    for place in np.ndindex(B, T):
        chosen = np.asarray(pushed.experts_LBTK)[place]
        expected = oracle(np.asarray(logits(), np.float64)[place], chosen, router)
        np.testing.assert_allclose(pushed.weights_LBTK[place], expected, rtol=1e-5)


def test_the_balancing_bias_moves_against_the_load() -> None:
    update = ROUTERS["sigmoid_bias"].update
    assert update is not None
    moved = update(
        jnp.zeros((2, 4)),
        jnp.asarray([[10.0, 2, 4, 8], [5, 5, 5, 5]]),
        RouterConfig(num_experts=4, top_k=2, variant="sigmoid_bias"),
    )
    np.testing.assert_allclose(moved, [[-1e-3, 1e-3, 1e-3, -1e-3], [0, 0, 0, 0]])


def test_unknown_variant() -> None:
    with pytest.raises(ValueError, match="Unknown router variant 'best'"):
        route(logits(), RouterConfig(num_experts=4, top_k=2, variant="best"), RoutingPlan())


def test_parameters_that_the_variant_does_not_read_raise() -> None:
    with pytest.raises(ValueError, match="'topk' does not read scale"):
        router_of(RouterConfig(num_experts=4, top_k=2, scale=2.0))
    with pytest.raises(ValueError, match="'softmax_topk' does not read bias_rate"):
        router_of(RouterConfig(num_experts=4, top_k=2, variant="softmax_topk", bias_rate=0.1))


def test_invalid_plans_raise(base_config) -> None:
    with pytest.raises(ValueError, match=r"outside of -1 .. 3"):
        RoutingPlan(experts_LBTK=jnp.full((2, 1, 1, 2), 4)).check(base_config, 1, 1)
    with pytest.raises(ValueError, match="same expert twice"):
        RoutingPlan(experts_LBTK=jnp.full((2, 1, 1, 2), 1)).check(base_config, 1, 1)
    with pytest.raises(ValueError, match="above 0"):
        RoutingPlan(temperature_LBT=jnp.zeros((2, 1, 1))).check(base_config, 1, 1)
    with pytest.raises(ValueError, match="bias_LBTE has the value nan"):
        RoutingPlan(bias_LBTE=jnp.full((2, 1, 1, 4), jnp.nan)).check(base_config, 1, 1)
    with pytest.raises(ValueError, match=r"map_LBTE is not a permutation of the experts; list each of 0 .. 3 once"):
        RoutingPlan(map_LBTE=jnp.ones((2, 1, 1, 4), jnp.int32)).check(base_config, 1, 1)
    with pytest.raises(ValueError, match="needs noise_LBT and keys_LBT together"):
        RoutingPlan(noise_LBT=jnp.ones((2, 1, 1))).check(base_config, 1, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias_LBTE", np.inf),
        ("weights_LBTK", -0.5),
        ("weights_LBTK", np.inf),
        ("temperature_LBT", np.inf),
        ("noise_LBT", -1.0),
        ("deviations_LBTE", np.inf),
        ("gain_LBTE", -1.0),
        ("active_LBT", 0),
        ("active_LBT", 3),
    ],
)
def test_invalid_plan_values_raise(base_config, field: str, value: float) -> None:
    plan = RoutingPlan.neutral(base_config)
    fields = {"noise_LBT": np.zeros((2, 1, 1)), "keys_LBT": RoutingPlan.noisy(base_config, 1.0).keys_LBT}
    plan = dataclasses.replace(plan, **fields)
    before = getattr(plan, field)
    changed = np.full(before.shape, value, before.dtype)
    with pytest.raises(ValueError, match=f"RoutingPlan.{field} has the value {value}; give"):
        checked_plan(dataclasses.replace(plan, **{field: changed}), base_config, 1, 1)


@pytest.mark.parametrize("wrong", [{"experts_LBTK": [0.5, 1]}, {"bias_LBTE": ["a"] * 4}, {"keys_LBT": [1]}, False, {}])
def test_objects_other_than_plans_raise(base_config, wrong: Any) -> None:
    plan = RoutingPlan(**wrong) if wrong else wrong
    with pytest.raises(ValueError, match="RoutingPlan"):
        checked_plan(plan, base_config, 1, 1)


def test_a_plan_may_be_lists_or_float64(base_config) -> None:
    lists: Any = [[[[0.0, 1.0, -1e300, 0.0]]]] * 2
    plan = checked_plan(RoutingPlan(bias_LBTE=lists), base_config, 1, 1)
    wide: Any = np.asarray(lists)
    assert plan.digest() == RoutingPlan(bias_LBTE=wide).digest() == RoutingPlan.from_numpy(plan.to_numpy()).digest()


@pytest.mark.parametrize("experts", [-1, 4, 1.5, True, [True, False, False, True], "1", [[1]], None])
def test_bans_of_missing_experts_raise(base_config, experts: Any) -> None:
    with pytest.raises(ValueError, match="is not among the experts of this model; give numbers from 0 to 3"):
        RoutingPlan.ban(base_config, experts)


def test_a_plan_for_other_tokens_reads_their_rows_and_positions(base_config) -> None:
    rng = np.random.default_rng(0)
    noisy = RoutingPlan.noisy(base_config, 1.0)
    fields: dict[str, Any] = {
        "bias_LBTE": jnp.asarray(rng.standard_normal((2, 3, 5, 4)), jnp.float32),
        "temperature_LBT": jnp.asarray(rng.random((2, 1, 5)) + 0.5, jnp.float32),
        "experts_LBTK": jnp.asarray(rng.integers(-1, 0, (2, 3, 1, 2)), jnp.int32),
        "weights_LBTK": jnp.full((2, 1, 1, 2), -1.0),
        "noise_LBT": noisy.noise_LBT,
        "keys_LBT": noisy.keys_LBT,
    }
    plan = RoutingPlan(**fields)
    rows, positions = np.array([[2], [0]]), np.array([[-3, 0, 1, 4], [3, 4, 9, 0]])
    own: Any = plan.at(rows, positions)
    within = np.clip(positions, 0, 4)
    np.testing.assert_array_equal(own.bias_LBTE, np.asarray(plan.bias_LBTE)[:, rows, within])
    np.testing.assert_array_equal(own.temperature_LBT, np.asarray(plan.temperature_LBT)[:, 0, within])
    assert own.experts_LBTK.shape == (2, 2, 1, 2)
    assert own.weights_LBTK.shape == (2, 1, 1, 2)
    whole = token_keys(fields["keys_LBT"], np.arange(3)[:, None], np.arange(5)[None])
    assert (own.keys_LBT[:, 0, 1:] == whole[:, 2, np.array([0, 1, 4])]).all()
    again = RoutingPlan.from_numpy(plan.to_numpy())
    assert again.digest() == plan.digest() != own.digest()
    assert dataclasses.replace(plan, noise_LBT=2 * fields["noise_LBT"]).digest() != plan.digest()
