"""Compares the peak memory that `bimedix plan` estimates with the memory that a training step uses on this CPU.

    python scripts/measure_plan.py             # a table; a minute on 2 cores
    python scripts/measure_plan.py --json      # one JSON document: rows, largest_error

Three models are estimated for one CPU, as `bimedix plan` does for accelerators, and then trained for three steps, each
in a new process. `planned_bytes`: arguments, results and temporaries of the compiled step. `measured_bytes`: the peak
resident memory of the process while it trains, minus its memory after compilation and before any array was allocated.
Linux only.
"""

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bimedix_jax import startup
from bimedix_jax.errors import BimedixError, run_script
from bimedix_jax.experiment import Experiment, override
from bimedix_jax.models.config import MixtralConfig, RouterConfig
from bimedix_jax.presets import smoke

STEPS = 3
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def model(hidden: int, ffn: int, layers: int, vocabulary: int) -> MixtralConfig:
    """A Mixtral with eight experts, two for each token."""
    return MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=hidden // 64,
        num_kv_heads=hidden // 256,
        head_dim=64,
        router=RouterConfig(num_experts=8, top_k=2),
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_embeddings=False,
        max_position_embeddings=4096,
    )


CASES: dict[str, tuple[MixtralConfig, dict[str, Any]]] = {
    "NF4 base, adapters of rank 32": (
        model(1024, 2048, 8, 16_384),
        {"lora.rank": 32, "data.sequence_length": 1024, "batch.rows": 2, "model.dtype": "bfloat16"},
    ),
    "bfloat16 base, adapters of rank 16, nothing recomputed": (
        model(768, 1536, 4, 16_384),
        {"lora.rank": 16, "data.sequence_length": 512, "model.base": "bfloat16", "remat": "none", "model.dtype": None},
    ),
    "float32, every parameter": (
        model(512, 1024, 4, 8_192),
        {"lora": None, "data.sequence_length": 512, "model.base": "float32", "model.dtype": None},
    ),
}


def experiment_of(changes: dict[str, Any]) -> Experiment:
    return override(smoke(), changes)


def resident(field: str) -> int:
    """Bytes of `VmRSS` (current) or `VmHWM` (peak)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def train_and_measure(name: str) -> dict[str, int]:
    """Estimates the case, then runs its step on real arrays, in this process."""
    startup.prepare()
    import jax
    import jax.numpy as jnp

    from bimedix_jax.plan import step

    config, changes = CASES[name]
    experiment = experiment_of(changes)
    arguments, function = step.training_arguments(config, experiment, jax.devices("cpu")[:1])
    compiled = function.lower(*arguments).compile()
    planned = step.peak(compiled.memory_analysis())
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    state, frozen, batch = jax.tree.map(lambda x: jnp.full(x.shape, 1, x.dtype), arguments)
    jax.block_until_ready((state, frozen, batch))
    CLEAR.write_text("5")  # resets the peak
    for _ in range(STEPS):
        state, _ = jax.block_until_ready(compiled(state, frozen, batch))
    return {"planned_bytes": planned, "measured_bytes": resident("VmHWM") - before}


def measure() -> list[dict[str, Any]]:
    """A row for each case. Each case runs in a new process."""
    rows = []
    for name in CASES:
        command = [sys.executable, __file__, "--case", name]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            raise BimedixError(f"{name} failed: {finished.stderr.strip().splitlines()[-1]}")
        row = json.loads(finished.stdout.splitlines()[-1])
        error = row["planned_bytes"] / row["measured_bytes"] - 1
        rows.append({"model": name, **row, "error": error})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--case", choices=CASES, help="measure only this case, in this process")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(train_and_measure(options.case)))
        return
    rows = measure()
    if options.json:
        print(json.dumps({"rows": rows, "largest_error": max(abs(row["error"]) for row in rows)}, indent=2))
        return
    print(f"{'model':58}{'planned MiB':>12}{'measured MiB':>14}{'error':>8}")
    for row in rows:
        planned, measured = row["planned_bytes"] / 2**20, row["measured_bytes"] / 2**20
        print(f"{row['model']:58}{planned:12.1f}{measured:14.1f}{row['error']:8.1%}")


if __name__ == "__main__":
    run_script(main)
