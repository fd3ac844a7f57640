"""Rematerialisation changes memory, not gradients."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import GROUPED, quick_kernels, tiny

from bimedix_jax.models.config import Remat
from bimedix_jax.models.init import init_random

WIDE = tiny(GROUPED, intermediate_size=256, num_layers=6, tie_embeddings=True)


def gradient_of(remat: Remat) -> tuple[dict, int]:
    """(gradients, bytes of temporaries) of a loss of the hidden states."""
    graph, state = nnx.split(init_random(WIDE, seed=1))
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 64, (1, 256)))

    def loss(state: nnx.State) -> jax.Array:
        return jnp.mean(jnp.sin(nnx.merge(graph, state).hidden(tokens, remat=remat).hidden_BTD))

    compiled = jax.jit(jax.grad(loss)).lower(state).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return nnx.to_pure_dict(compiled(state)), memory.temp_size_in_bytes


def test_policies_give_the_same_gradients_with_less_memory() -> None:
    (everything, most), (products, some), (layers, least) = (
        gradient_of(remat) for remat in ("none", "experts", "layer")
    )
    for other in (products, layers):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), everything, other)
    kept = WIDE.num_layers * 2 * 256 * (2 * WIDE.intermediate_size + WIDE.hidden_size) * 4
    assert most > some > least
    assert some - least > 0.6 * kept, "both wide products of every layer, and the narrow one"


@pytest.fixture(scope="module")
def routes() -> Any:
    """scripts/measure_remat_routes.py"""
    path = Path(__file__).resolve().parents[2] / "scripts/measure_remat_routes.py"
    spec = importlib.util.spec_from_file_location("measure_remat_routes", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("mode", "devices"), [("none", 1), ("experts", 1), ("layer", 1), ("layer", 2)])
def test_gradients_do_not_depend_on_recomputed_routes(routes, mode: str, devices: int) -> None:
    with quick_kernels():
        found = routes.compare(mode, devices)
    assert found["gradient_change"] <= 1e-6
    if mode == "none":
        assert found["recomputations"] == 0
    else:
        assert found["recomputations"] > 0
        assert found["flips_injected"] >= 100


def test_without_kept_routes_gradients_change(routes) -> None:
    """So the test above can fail."""
    with quick_kernels():
        assert routes.unprotected("layer") > 0.01
