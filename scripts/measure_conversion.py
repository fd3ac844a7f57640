"""Measures the memory and time of conversion, on a checkpoint of Mixtral-8x7B's full width with fewer layers.

    python scripts/measure_conversion.py --json                      # 6.3 GB, needs 13 GB of disk, 7 GB of memory
    python scripts/measure_conversion.py --json --small              # seconds

The script writes a random sharded bfloat16 checkpoint. One new process loads it with base nf4, and another loads it
with base bfloat16 and exports it. Peak memory is the highest resident memory of the process (VmHWM), including the
interpreter and JAX. The bound is the size of the loaded model, plus the two largest tensors of the source, plus 0.5
GiB. Everything written is removed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bimedix_jax import startup
from bimedix_jax.checkpoint import table
from bimedix_jax.checkpoint.hf_config import write_config
from bimedix_jax.checkpoint.safetensors_io import ShardedWriter, TensorSpec, pieces, read_folder
from bimedix_jax.errors import positive, run_script
from bimedix_jax.models.config import MixtralConfig, RouterConfig

SLACK = 1 << 29
BF16 = np.dtype(ml_dtypes.bfloat16)


def architecture(layers: int, small: bool) -> MixtralConfig:
    """Mixtral-8x7B (arXiv 2401.04088, table 1) with `layers` layers; `small` divides every width by 16."""
    part = 16 if small else 1
    return MixtralConfig(
        vocab_size=32000 // part,
        hidden_size=4096 // part,
        intermediate_size=14336 // part,
        num_layers=layers,
        num_heads=32 // part,
        num_kv_heads=max(1, 8 // part),
        head_dim=128,
        router=RouterConfig(num_experts=8, top_k=2),
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_embeddings=False,
        max_position_embeddings=32768,
    )


def generate(folder: Path, config: MixtralConfig) -> int:
    """Writes the checkpoint in shards of at most 2 GB; returns its bytes. Weights are random pieces of one normal
    pool."""
    draws = np.random.default_rng(0)
    pool = (0.02 * draws.standard_normal(1 << 24, np.float32)).astype(BF16)
    entries = table.named_entries(config)
    specs = [TensorSpec(name, BF16, table.unit_shape(row, config)) for name, (row, _) in entries.items()]
    folder.mkdir()
    with ShardedWriter(folder, specs, 2_000_000_000) as writer:
        for spec in specs:
            for first, count in pieces(spec):
                size = count * spec.row_bytes // BF16.itemsize
                start = int(draws.integers(0, pool.size - size))
                writer.write(spec.name, pool[start : start + size].reshape(count, *spec.shape[1:]), first)
    write_config(folder, config, "bfloat16", {})
    return writer.total_bytes


def high_water() -> int:
    """Peak resident bytes of this process. (ru_maxrss would carry over the parent's from before exec.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def child(source: Path, base: Any, output: Path | None) -> dict[str, Any]:
    """Loads, and exports if `output` is given; runs in its own process."""
    startup.prepare()
    import jax

    from bimedix_jax.checkpoint.hf import export_hf, parameters
    from bimedix_jax.checkpoint.load import load

    start = time.monotonic()
    model = load(source, base)
    leaves = jax.tree.leaves([variable.get_value() for variable in parameters(model).values()])
    jax.block_until_ready(leaves)
    result = {
        "target_bytes": sum(leaf.nbytes for leaf in leaves),
        "peak_rss_bytes": high_water(),
        "seconds": round(time.monotonic() - start, 2),
    }
    if output is not None:
        start = time.monotonic()
        export_hf(model, output, max_shard_bytes=2_000_000_000)
        result["export_seconds"] = round(time.monotonic() - start, 2)
        result["peak_rss_bytes_with_export"] = high_water()
    return result


def run_child(source: Path, base: str, output: Path | None, allowed: int) -> dict[str, Any]:
    """`child` in a new interpreter, with the memory bound."""
    command = [sys.executable, __file__, "--child", base, "--folder", str(source)]
    command += [] if output is None else ["--output", str(output)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    result["allowed_peak_bytes"] = result["target_bytes"] + allowed
    result["within_bound"] = result["peak_rss_bytes"] <= result["allowed_peak_bytes"]
    return result


def identical(one: Path, other: Path) -> bool:
    """Whether two folders have the same tensors: names, dtypes, shapes and bytes."""
    ours, theirs = read_folder(one), read_folder(other)
    if ours.keys() != theirs.keys():
        return False
    for name, tensor in ours.items():
        if (tensor.dtype, tensor.shape) != (theirs[name].dtype, theirs[name].shape):
            return False
        for first, count in pieces(tensor):
            if tensor.read(first, count).tobytes() != theirs[name].read(first, count).tobytes():
                return False
    return True


def measure(folder: Path | None, layers: int, small: bool) -> dict[str, Any]:
    """The whole measurement in a temporary folder under `folder`."""
    with tempfile.TemporaryDirectory(prefix="measure-conversion-", dir=folder) as scratch:
        source, output = Path(scratch) / "source", Path(scratch) / "exported"
        print("writing the checkpoint", file=sys.stderr)
        source_bytes = generate(source, architecture(layers, small))
        largest = sorted(tensor.nbytes for tensor in read_folder(source).values())[-2:]
        allowed = sum(largest) + SLACK
        print(f"{source_bytes / 1e9:.2f} GB written; loading with base nf4", file=sys.stderr)
        packed = run_child(source, "nf4", None, allowed)
        print("loading with base bfloat16, exporting, comparing", file=sys.stderr)
        dense = run_child(source, "bfloat16", output, allowed)
        same = identical(source, output)
    return {"source_bytes": source_bytes, **packed, "roundtrip_identical": same, "bfloat16": dense}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write (default: the system's temporary folder)"
    )
    parser.add_argument("--layers", type=positive, default=2, help="layers of 2.9 GB each")
    parser.add_argument("--small", action="store_true", help="one sixteenth of the width")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.folder, arguments.child, arguments.output)))
        return
    result = measure(arguments.folder, arguments.layers, arguments.small)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for name, part in (("nf4", result), ("bfloat16", result["bfloat16"])):
        peak, bound = part["peak_rss_bytes"] / 1e9, part["allowed_peak_bytes"] / 1e9
        print(f"{name}: peak {peak:.2f} GB (bound {bound:.2f} GB), {part['seconds']} s")
    print(f"round trip identical: {result['roundtrip_identical']}")


if __name__ == "__main__":
    run_script(main)
