"""What the backward pass recomputes changes its memory and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bimedix_jax.models.config import MixtralConfig, Remat, RouterConfig
from bimedix_jax.models.mixtral import init_random

WIDE = MixtralConfig(64, 32, 256, 6, 4, 2, 8, RouterConfig(4, 2), 1e4, 1e-5, None, True, 256)


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


def test_three_policies_give_the_same_gradients_in_ever_less_memory() -> None:
    (everything, most), (products, some), (layers, least) = (
        gradient_of(remat) for remat in ("none", "experts", "layer")
    )
    for other in (products, layers):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), everything, other)
    kept = WIDE.num_layers * 2 * 256 * (2 * WIDE.intermediate_size + WIDE.hidden_size) * 4
    assert most > some > least
    assert some - least > 0.6 * kept, "both wide products of every layer, and the narrow one"
