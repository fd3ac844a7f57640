"""Compares our 4-bit codec with bitsandbytes' bit by bit, and counts the bits per weight.

    python scripts/measure_quantisation.py --json       # a minute or two, below 3 GiB
    python scripts/measure_quantisation.py --small      # seconds

Both sides quantise matrices of Mixtral-8x7B (an expert's and an attention projection in bfloat16, and the attention
projection also in float16 and float32), and edge cases. Then both dequantise the states that bitsandbytes makes, with
and without double quantisation; our side does so eagerly and under jit. Every number except `bits_per_weight` counts
elements that differ in any bit. The expected number is 0.

bitsandbytes 0.50.2 dequantises wrongly on CPU if the last axis is a multiple of 16 but not of 64. There, its formula in
NumPy is used instead, as rows state under `dequantised_by`. New 8-bit codes of scales are not compared, because the CPU
path of bitsandbytes sometimes takes a neighbouring code; `scale_codes_that_differ` counts these. Stored codes are read
exactly. If scales near the largest number overflow in bitsandbytes' mean, its values are NaN (`not_finite`), and so are
ours of the same state. Our own quantisation of such weights stays finite.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import torch

from bimedix_jax.errors import run_script
from bimedix_jax.kernels.nf4 import NF4Tensor, dequantize, quantize, reference

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def normal(shape: tuple[int, ...], dtype: str, scale: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(shape, generator=generator)).to(TORCH[dtype])


def beside_thresholds(dtype: str) -> torch.Tensor:
    """Blocks whose elements are within two units in the last place of the codes' thresholds."""
    from bimedix_jax.kernels.nf4.tables import NF4_THRESHOLDS

    draws = np.random.default_rng(0)
    w = draws.standard_normal((2048, 63)).astype(np.float32)
    w[:, 1:16] = NF4_THRESHOLDS * np.abs(w[:, :1]) * (1 + draws.integers(-2, 3, (2048, 15)) * 2.0**-24)
    return torch.tensor(w).to(TORCH[dtype])


def edge_cases(dtype: str) -> dict[str, torch.Tensor]:
    kind = TORCH[dtype]
    largest = torch.finfo(kind).max
    smallest = 6e-8 if dtype == "float16" else 1e-35
    return {
        "odd size": normal((7, 13), dtype),
        "unfinished block": normal((1000,), dtype),
        "single element": normal((1,), dtype),
        "last axis 48": normal((96, 48), dtype),
        "zeros": torch.zeros((3, 50), dtype=kind),
        "constant": torch.full((4, 64), -0.037, dtype=kind),
        "largest": torch.full((4, 64), largest, dtype=kind) * torch.tensor([1, -1] * 32, dtype=kind),
        "up to largest": (normal((64, 64), "float32", 0.2).clamp(-1, 1) * largest).to(kind),
        "small": (normal((64, 64), "float32", 1.0) * smallest).to(kind),
        "beside thresholds": beside_thresholds(dtype),
    }


def bits(x: Any) -> np.ndarray:
    """Bit patterns of a torch tensor or an array, flat; all NaN are one, and so are the two zeros."""
    if isinstance(x, torch.Tensor):
        x = torch.where(torch.isnan(x), torch.nan, x + 0).contiguous()
        return x.view(torch.uint16 if x.element_size() == 2 else torch.uint32).numpy().reshape(-1)
    x = np.asarray(jnp.where(jnp.isnan(x), jnp.nan, x + jnp.zeros((), x.dtype)))
    return x.view(np.uint16 if x.dtype.itemsize == 2 else np.uint32).reshape(-1)


def formula(t: NF4Tensor) -> torch.Tensor:
    """bitsandbytes' dequantisation in NumPy."""
    nested, offset = (None if leaf is None else np.asarray(leaf) for leaf in (t.nested_absmax, t.nested_offset))
    unit = reference.PackedUnit(np.asarray(t.packed), np.asarray(t.absmax), nested, offset)
    return torch.tensor(reference.dequantize(unit, t.unit_shape)).to(TORCH[t.dtype])


def imported(packed: torch.Tensor, state: Any, shape: tuple[int, ...], dtype: str) -> NF4Tensor:
    """bitsandbytes' packed tensor as an NF4Tensor with the same bytes."""
    nested = offset = None
    if state.state2 is not None:
        nested, offset = jnp.asarray(state.state2.absmax.numpy()), jnp.asarray(state.offset.numpy())
    nibbles, absmax = jnp.asarray(packed.numpy().reshape(-1)), jnp.asarray(state.absmax.numpy())
    return NF4Tensor(nibbles, absmax, nested, offset, shape, dtype=dtype)


def compare(name: str, w: torch.Tensor, dtype: str, double_quant: bool) -> dict[str, Any]:
    """One row: w quantised by both, and bitsandbytes' state dequantised by both."""
    shape = tuple(w.shape)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", blocksize=64, compress_statistics=double_quant)
    array = jnp.asarray(w.view(torch.uint16).numpy()).view(dtype) if dtype == "bfloat16" else jnp.asarray(w.numpy())
    ours = quantize(array, double_quant=double_quant)
    theirs = imported(packed, state, shape, dtype)
    row: dict[str, Any] = {"name": name, "dtype": dtype, "shape": list(shape), "double_quantised": double_quant}
    row["bits_per_weight"] = round(8 * ours.nbytes / ours.size, 4)
    row["nibble_mismatches"] = int(np.sum(np.asarray(ours.packed) != np.asarray(theirs.packed)))
    differing = int(np.sum(np.asarray(ours.absmax) != np.asarray(theirs.absmax)))
    row["scale_codes_that_differ" if double_quant else "scale_mismatches"] = differing
    faulty = shape[-1] % 16 == 0 and shape[-1] % 64 != 0
    row["dequantised_by"] = "formula" if faulty else "bitsandbytes"
    values = formula(theirs) if faulty else bnb.dequantize_4bit(packed, state)
    row["not_finite"] = int((~torch.isfinite(values)).sum())
    expected = bits(values)
    del ours, packed, state
    row["dequant_mismatches"] = int(np.sum(bits(dequantize(theirs)) != expected))
    row["dequant_mismatches_jit"] = int(np.sum(bits(jax.jit(dequantize)(theirs)) != expected))
    return row


def measure(small: bool) -> dict[str, Any]:
    part = 16 if small else 1
    expert, attention = (14336 // part, 4096 // part), (4096 // part, 4096 // part)
    matrices = [("expert", expert, "bfloat16")] + [("attention", attention, dtype) for dtype in TORCH]
    rows = []
    for name, shape, dtype in matrices:
        for double_quant in (True, False):
            rows.append(compare(name, normal(shape, dtype), dtype, double_quant))
            print(f"{name} {dtype} done, double quantisation {double_quant}", file=sys.stderr)
    edges = [
        compare(name, w, dtype, double_quant)
        for dtype in TORCH
        for name, w in edge_cases(dtype).items()
        for double_quant in (True, False)
    ]
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {
        **{key: sum(row.get(key, 0) for row in rows + edges) for key in ("nibble_mismatches", "scale_mismatches")},
        "dequant_mismatches": sum(row["dequant_mismatches"] + row["dequant_mismatches_jit"] for row in rows + edges),
        "bits_per_weight": max(row["bits_per_weight"] for row in rows if row["double_quantised"]),
        "peak_rss_bytes": int(line.split()[1]) * 1024,
        "rows": rows,
        "edge_cases": edges,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--small", action="store_true", help="one sixteenth of the width")
    arguments = parser.parse_args()
    result = measure(arguments.small)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for row in result["rows"] + result["edge_cases"]:
        kind = "double" if row["double_quantised"] else "single"
        wrong = row["nibble_mismatches"], row["dequant_mismatches"], row["dequant_mismatches_jit"]
        print(f"{row['name']:18} {row['dtype']:8} {kind}  {row['bits_per_weight']:.3f} bits  differing {wrong}")
    for key in ("nibble_mismatches", "scale_mismatches", "dequant_mismatches", "bits_per_weight", "peak_rss_bytes"):
        print(f"{key}: {result[key]}")


if __name__ == "__main__":
    run_script(main)
