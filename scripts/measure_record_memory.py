"""Memory cost of recording routes: the compiled forward pass with each kind of record, and without any.

    python scripts/measure_record_memory.py --json

The model has 48 layers of 128 experts, top-8, and 4,096 tokens. It is narrow, so that the record is large compared with
the activations. Nothing is run: sizes are XLA's `memory_analysis` of results and temporaries. `without` is a loop over
the same blocks, in this script, that drops the routing.
"""

import argparse
import json
from typing import Any

from bimedix_jax.errors import run_script

LAYERS, EXPERTS, TOP_K, TOKENS, WIDTH = 48, 128, 8, 4096, 512


def architecture(layers: int, experts: int, top_k: int, tokens: int) -> Any:
    """A narrow Mixtral of these sizes."""
    from bimedix_jax.models.config import MixtralConfig, RouterConfig

    return MixtralConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_layers=layers,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        router=RouterConfig(num_experts=experts, top_k=top_k),
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_embeddings=True,
        max_position_embeddings=tokens,
    )


def measure(layers: int = LAYERS, experts: int = EXPERTS, top_k: int = TOP_K, tokens: int = TOKENS) -> dict[str, Any]:
    """Bytes of each program, and their ratio to the program without a record."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from bimedix_jax.kernels.layer_scan import layer_scan
    from bimedix_jax.models.attention import rotations
    from bimedix_jax.models.linear import read_in_place
    from bimedix_jax.models.mixtral import Mixtral
    from bimedix_jax.models.routers import RoutingPlan

    config = architecture(layers, experts, top_k, tokens)
    graph, state = nnx.split(Mixtral(config, "bfloat16"))
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def size(function: Any) -> int:
        memory = jax.jit(function).lower(state, ids).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    def without(state: nnx.State, ids: jax.Array) -> jax.Array:
        model = nnx.merge(graph, state)
        read_in_place(model.layers, "layers")
        block, layer_state = nnx.split(model.layers)
        segments = jnp.ones_like(ids)
        turned = rotations(jnp.arange(tokens)[None], config.head_dim, config.rope_theta)

        def body(constants: Any, x: jax.Array, layer: Any, slot: None) -> tuple[jax.Array, None, None]:
            turned, segments = constants
            return (
                nnx.merge(block, layer)(x, turned, segments, segments, None, RoutingPlan(), slot, None)[0],
                None,
                None,
            )

        x = model.embed.table[...][ids]
        return model.norm(layer_scan(body, (turned, segments), x, layer_state)[0])

    def recorded(record: Any, groups: int) -> Any:
        def hidden(state: nnx.State, ids: jax.Array) -> Any:
            out = nnx.merge(graph, state).hidden(ids, record=record, groups=groups)
            return out.hidden_BTD, out.routing, out.sums

        return hidden

    found = {"without": size(without)}
    found |= {record: size(recorded(record, 0)) for record in ("none", "choices", "full")}
    found["none, with sums"] = size(recorded("none", 1))
    shapes = {"layers": layers, "experts": experts, "top_k": top_k, "tokens": tokens, "width": WIDTH}
    return shapes | {"bytes": found, "ratio": {name: value / found["without"] for name, value in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print exactly one JSON document")
    options = parser.parse_args()
    found = measure()
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found["bytes"].items():
        print(f"{name:16} {value / 2**20:8.1f} MiB  {found['ratio'][name]:.3f}")


if __name__ == "__main__":
    from bimedix_jax import startup

    startup.prepare()
    run_script(main)
