"""The record of a call is static: parts that are not requested are not in the compiled program."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import GROUPED, tiny

from bimedix_jax.models.call import Output
from bimedix_jax.models.init import init_random
from bimedix_jax.models.mixtral import Mixtral

L, B, T, K, E = 7, 2, 19, 3, 11
"""No size is a product of others, so that sizes identify axes."""
CONFIG = tiny(GROUPED, num_layers=L, experts=E, top_k=K, tie_embeddings=True)


@pytest.fixture(scope="module")
def model() -> Mixtral:
    return init_random(CONFIG, std=0.2)


def shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of all values of a jaxpr, including inner ones."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "shape"))
    for inner in inner_of(jaxpr):
        yield from shapes(inner)


def inner_of(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield inner


def program(model: Mixtral, **asked: Any) -> list[tuple[int, ...]]:
    """Shapes in the forward program."""
    graph, state = nnx.split(model)

    def apply(state: nnx.State, tokens: jax.Array) -> Output:
        return nnx.merge(graph, state).hidden(tokens, **asked)

    return list(shapes(jax.make_jaxpr(apply)(state, jnp.ones((B, T), jnp.int32)).jaxpr))


def over_layers_and_tokens(found: list[tuple[int, ...]]) -> set[tuple[int, ...]]:
    return {shape for shape in found if L in shape and any(size % T == 0 for size in shape)}


def test_without_a_record_no_value_has_layer_and_token_axes(model: Mixtral) -> None:
    assert not over_layers_and_tokens(program(model, record="none"))
    assert not over_layers_and_tokens(program(model, record="none", groups=2))


def test_a_record_has_the_requested_parts_only(model: Mixtral) -> None:
    assert over_layers_and_tokens(program(model, record="choices")) == {(L, B, T, K)}
    assert over_layers_and_tokens(program(model, record="full")) == {(L, B, T, K), (L, B, T, E)}


def test_choices_are_not_expanded_to_all_experts(model: Mixtral) -> None:
    for shape in program(model, record="full", groups=2):
        assert not (K in shape and E in shape and any(size % T == 0 for size in shape)), shape


def test_all_records_agree(model: Mixtral) -> None:
    tokens = np.random.default_rng(0).integers(0, 64, (B, T))
    full, choices, none = (model(tokens, record=record, groups=1) for record in ("full", "choices", "none"))
    assert none.routing is None
    assert choices.routing is not None
    assert full.routing is not None
    assert choices.routing.logits_LBTE is None
    np.testing.assert_array_equal(choices.routing.experts_LBTK, full.routing.experts_LBTK)
    np.testing.assert_array_equal(choices.routing.weights_LBTK, full.routing.weights_LBTK)
    for other in (choices, none):
        np.testing.assert_allclose(other.logits_BTV, full.logits_BTV, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(other.aux_loss, full.aux_loss, rtol=1e-6)


def test_losses_without_sums_raise(model: Mixtral) -> None:
    out = model(np.ones((1, 4), int))
    assert out.sums is None
    with pytest.raises(ValueError, match="pass groups=1"):
        _ = out.aux_loss
