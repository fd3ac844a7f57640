"""Time to lower and compile a deep Mixtral and a shallow one. Layers are scanned, so depth should not matter.

    python scripts/measure_compile.py                    # a table; two to five minutes on 2 cores
    python scripts/measure_compile.py --json             # one JSON document: layers, seconds, ratio, ...

The program is the real one at a small width: an NF4 base with double quantisation, adapters on q, k, v, experts and
router, rematerialised layers, 512 tokens a row. Each measurement is a new process without a compilation cache. From
shapes only, it lowers and compiles two programs: the forward pass to logits, and the adapters' gradient of an optimiser
step. The depths alternate, so that a busy machine affects both alike. The figures are medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from bimedix_jax import startup
from bimedix_jax.errors import positive, run_script
from bimedix_jax.models.config import LoraConfig, MixtralConfig, RouterConfig

LAYERS = (2, 32)
PROGRAMS = ("forward", "gradient")
BAR = 1.5
"""Largest accepted ratio of the deep model to the shallow one."""


def architecture(layers: int, width: int) -> MixtralConfig:
    """Mixtral-8x7B (arXiv 2401.04088, table 1) with hidden size `width`, a multiple of 256, and everything in
    proportion."""
    return MixtralConfig(
        vocab_size=32_000 * width // 4096,
        hidden_size=width,
        intermediate_size=14_336 * width // 4096,
        num_layers=layers,
        num_heads=8,
        num_kv_heads=2,
        head_dim=width // 8,
        router=RouterConfig(num_experts=8, top_k=2),
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_embeddings=False,
        max_position_embeddings=4096,
    )


def child(layers: int, width: int, length: int) -> dict[str, float]:
    """Seconds to lower and compile each program, in this process."""
    startup.prepare()
    import jax
    import jax.numpy as jnp

    from bimedix_jax.adapters import add_lora
    from bimedix_jax.experiment import RouterTraining
    from bimedix_jax.models.mixtral import Mixtral
    from bimedix_jax.quantise import quantise_base
    from bimedix_jax.training.state import split_params
    from bimedix_jax.training.step import make_gradient

    model = add_lora(quantise_base(Mixtral(architecture(layers, width))), LoraConfig(rank=16, alpha=32.0))
    structure, params, frozen = split_params(model)
    tokens_BT = jax.ShapeDtypeStruct((1, length), jnp.int32)
    ids_ABT, mask_ABT = (jax.ShapeDtypeStruct((2, 1, length), kind) for kind in (jnp.int32, jnp.bool_))
    batch_A = {"tokens_BT": ids_ABT, "segment_ids_BT": ids_ABT, "loss_mask_BT": mask_ABT}

    def forward(params: dict, frozen: dict, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> Any:
        return structure.merge(params, frozen)(tokens_BT, segment_ids_BT)

    programs = {
        "forward": (forward, (params, frozen, tokens_BT, tokens_BT)),
        "gradient": (make_gradient(structure, RouterTraining(), "layer"), (params, frozen, batch_A)),
    }
    seconds = {}
    for name, (function, arguments) in programs.items():
        start = time.perf_counter()
        jax.jit(function).lower(*arguments).compile()
        seconds[name] = time.perf_counter() - start
    return seconds


def run_child(layers: int, width: int, length: int) -> dict[str, float]:
    """Runs `child` in a new process."""
    command = [sys.executable, __file__, "--child", str(layers), "--width", str(width), "--length", str(length)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(repeats: int, width: int, length: int) -> dict[str, Any]:
    """Medians over `repeats` processes for each depth. `seconds` adds up both programs, in the order of `layers`."""
    runs: dict[int, list[dict[str, float]]] = {layers: [] for layers in LAYERS}
    for repeat in range(repeats):
        for layers in LAYERS if repeat % 2 == 0 else LAYERS[::-1]:
            seconds = run_child(layers, width, length)
            runs[layers].append(seconds)
            shown = ", ".join(f"{name} {seconds[name]:.2f} s" for name in PROGRAMS)
            print(f"repeat {repeat + 1} of {repeats}, {layers} layers: {shown}", file=sys.stderr)
    parts = {name: [statistics.median(run[name] for run in runs[layers]) for layers in LAYERS] for name in PROGRAMS}
    totals = {layers: [sum(run.values()) for run in runs[layers]] for layers in LAYERS}
    seconds = [statistics.median(totals[layers]) for layers in LAYERS]
    ratio = seconds[1] / seconds[0]
    return {
        "layers": list(LAYERS),
        "seconds": [round(value, 3) for value in seconds],
        "ratio": round(ratio, 3),
        "bar": BAR,
        "within_bar": ratio <= BAR,
        "programs": {
            name: {"seconds": [round(value, 3) for value in both], "ratio": round(both[1] / both[0], 3)}
            for name, both in parts.items()
        },
        "all_seconds": [[round(value, 3) for value in totals[layers]] for layers in LAYERS],
        "repeats": repeats,
        "hidden_size": width,
        "sequence_length": length,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--repeats", type=positive, default=3, help="processes a depth")
    parser.add_argument("--width", type=positive, default=256, help="hidden size, a multiple of 256")
    parser.add_argument("--length", type=positive, default=512, help="tokens a row")
    parser.add_argument("--child", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.width % 256 or arguments.length < 2:
        parser.error("--width must be a multiple of 256, --length at least 2")
    if arguments.child is not None:
        print(json.dumps(child(arguments.child, arguments.width, arguments.length)))
        return
    result = measure(arguments.repeats, arguments.width, arguments.length)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{'':<10}" + "".join(f"{layers:>9} layers" for layers in LAYERS) + f"{'ratio':>8}")
    rows = {**result["programs"], "together": {"seconds": result["seconds"], "ratio": result["ratio"]}}
    for name, row in rows.items():
        print(f"{name:<10}" + "".join(f"{value:>14.2f} s" for value in row["seconds"]) + f"{row['ratio']:>8.2f}")
    print(f"limit {BAR}: {'met' if result['within_bar'] else 'exceeded'}")


if __name__ == "__main__":
    run_script(main)
