"""Memory cost of adapters under the layer scan; shows that neither base nor adapters are copied.

    python scripts/measure_adapter_memory.py             # a table; minutes on 2 cores
    python scripts/measure_adapter_memory.py --json      # one JSON document: rows, per_layer
    python scripts/measure_adapter_memory.py --width 512 --targets cpu

A model of Mixtral's width with an NF4 base is compiled from shapes only, for this CPU and for an A100 that need not be
present (bimedix_jax[aot]). The programs are the forward pass, and the gradient of an optimiser step with rematerialised
layers. The adapters are none, rank 8 on q, and the paper's (rank 128 on q, k, v, experts and router).

Outputs are the gradients. `copied_bytes` is the size of the arguments beyond base, adapters and batch. `per_layer`
compares two depths: if stacked weights were copied, the temporaries would grow by the size of the weights of each
layer. Working space does not grow.
"""

import argparse
import dataclasses
import itertools
import json
import time
from typing import Any

from tqdm import tqdm

from bimedix_jax import startup
from bimedix_jax.errors import BimedixError, positive, run_script
from bimedix_jax.models.config import MIXTRAL_8X7B, LoraConfig, MixtralConfig

ADAPTERS = {
    "none": None,
    "rank 8 on q": LoraConfig(rank=8, alpha=8.0, targets=("q",)),
    "the paper's": LoraConfig(rank=128, alpha=64.0),
}


PROGRAMS = ("forward", "gradient")
PARTS = ("base_bytes", "adapter_bytes", "copied_bytes", "output_bytes", "temporary_bytes")


def architecture(width: int, layers: int) -> MixtralConfig:
    """Mixtral-8x7B (arXiv 2401.04088, table 1) at hidden size `width`, a multiple of 512, and this depth."""
    return dataclasses.replace(
        MIXTRAL_8X7B,
        vocab_size=32_000 * width // 4096,
        hidden_size=width,
        intermediate_size=14_336 * width // 4096,
        head_dim=128 * width // 4096,
        num_layers=layers,
    )


def compiled_memory(
    config: MixtralConfig, lora: LoraConfig | None, program: str, length: int, target: str
) -> dict[str, int]:
    """Bytes of one compiled program, and of the parts of its arguments."""
    import jax
    import jax.numpy as jnp

    from bimedix_jax.adapters import add_lora
    from bimedix_jax.experiment import RouterTraining
    from bimedix_jax.models.mixtral import Mixtral
    from bimedix_jax.plan.hardware import devices
    from bimedix_jax.quantise import quantise_base
    from bimedix_jax.training.state import split_params
    from bimedix_jax.training.step import make_gradient

    base = quantise_base(Mixtral(config))
    structure, params, frozen = split_params(base if lora is None else add_lora(base, lora))
    if lora is None:  # nothing trains, but `split_params` returns the base as trained
        params, frozen = {}, {**params, **frozen}
    shape = (1, 1, length) if program == "gradient" else (1, length)
    ids, mask = (jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, jnp.bool_))
    batch: dict[str, Any] = {"tokens_BT": ids, "segment_ids_BT": ids}

    def forward(params: dict, frozen: dict, batch: dict) -> Any:
        return structure.merge(params, frozen).hidden(**batch).hidden_BTD

    function: Any = forward
    if program == "gradient":
        function, batch = make_gradient(structure, RouterTraining(), "layer"), {**batch, "loss_mask_BT": mask}

    device = jax.devices("cpu")[0] if target == "cpu" else devices(target)[0]
    placed = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), (params, frozen, batch))
    memory = jax.jit(function, keep_unused=True).lower(*arguments).compile().memory_analysis()
    if memory is None:
        raise BimedixError(f"XLA reports no memory analysis for {target}; leave it out of --targets.")

    def size(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    return {
        "base_bytes": size(frozen),
        "adapter_bytes": size(params),
        "argument_bytes": memory.argument_size_in_bytes,
        "copied_bytes": memory.argument_size_in_bytes - size(arguments),
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def measure(width: int, depths: list[int], length: int, targets: list[str]) -> list[dict[str, Any]]:
    """One row for each target, program, set of adapters and depth. The gradient needs adapters."""
    cases = itertools.product(targets, PROGRAMS, ADAPTERS, depths)
    rows = []
    for target, program, name, layers in tqdm([case for case in cases if case[1:3] != ("gradient", "none")]):
        began = time.perf_counter()
        memory = compiled_memory(architecture(width, layers), ADAPTERS[name], program, length, target)
        case = {"target": target, "program": program, "adapters": name, "layers": layers}
        rows.append({**case, **memory, "compile_seconds": time.perf_counter() - began})
    return rows


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bytes that each layer adds, from the shallowest to the deepest model."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["target"], row["program"], row["adapters"]), []).append(row)
    result = []
    for (target, program, name), group in groups.items():
        first, last = (pick(group, key=lambda row: row["layers"]) for pick in (min, max))
        depth = last["layers"] - first["layers"]
        if depth:
            parts = {part: (last[part] - first[part]) / depth for part in PARTS}
            result.append({"target": target, "program": program, "adapters": name, **parts})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=positive, default=4096, help="hidden size, a multiple of 512")
    parser.add_argument("--depths", type=positive, nargs="+", default=[2, 4], help="layers of the models")
    parser.add_argument("--length", type=positive, default=1024, help="tokens of the one row")
    parser.add_argument("--targets", nargs="+", default=["cpu", "a100-80gb"], help="what to compile for")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if options.width % 512:
        parser.error("--width must be a multiple of 512")
    startup.prepare()
    rows = measure(options.width, options.depths, options.length, options.targets)
    if options.json:
        settings = {name: getattr(options, name) for name in ("width", "depths", "length")}
        print(json.dumps({**settings, "rows": rows, "per_layer": growth(rows)}))
        return
    print(f"MiB; a row is {options.length} tokens\n{'':46}" + " ".join(f"{part[:-6]:>9}" for part in PARTS))
    for row in [*rows, *growth(rows)]:
        where = f"{row['layers']} layers" if "layers" in row else "per layer"
        name = f"{row['target']} {row['program']}, {row['adapters']}, {where}"
        print(f"{name:46}" + " ".join(f"{row[part] / 2**20:9.1f}" for part in PARTS))


if __name__ == "__main__":
    run_script(main)
