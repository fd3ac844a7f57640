"""Counts the bytes that a compiled decoding step of Mixtral-8x7B in NF4 reads, for devices that need not be present.

    python scripts/measure_decode_bytes.py                            # a table; two minutes on 2 cores
    python scripts/measure_decode_bytes.py --json --out programs      # one JSON document; keeps the compiled programs
    python scripts/measure_decode_bytes.py --count programs/decode_a100-80gb_batch1.txt     # counts a program again

`bytes_needed`: the experts that the step uses, all other weights once, and the keys and values of the tokens so far, in
the precision in which they are stored. `bytes_read`: the sum over the instructions of the compiled program. `--json`
prints the rule of this count and the largest readings. A v5e has memory for half of the layers (`layers`). Needs
bimedix_jax[aot].
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bimedix_jax import startup
from bimedix_jax.errors import positive, run_script

LAYERS = {"a100-80gb": 32, "h100-80gb": 32, "v5e": 16}
"""Layers of the model that fit one device; the others are left out."""
LARGEST = 12
"""Readings that a row lists."""


def count(text: str) -> dict[str, Any]:
    """`bytes_read` of a program on one device, and its largest readings."""
    from bimedix_jax.plan import hlo, reads

    found = sorted(reads.readings(hlo.parse(text)), key=lambda reading: -reading.total)
    largest = [
        {
            "instruction": reading.instruction,
            "operation": reading.operation,
            "bytes": reading.bytes,
            "times": reading.times,
        }
        for reading in found[:LARGEST]
    ]
    return {"bytes_read": reads.total(found), "largest": largest}


def measure(device: str, batch: int, tokens: int, folder: Path, layers: int | None = None) -> dict[str, Any]:
    """The row of one device and batch; the text of the program is written to `folder`.

    Raises:
      BimedixError: the extra `aot` is not installed.
    """
    import dataclasses

    from bimedix_jax.models.config import MIXTRAL_8X7B
    from bimedix_jax.models.mixtral import Mixtral
    from bimedix_jax.plan import hardware, reads
    from bimedix_jax.plan.step import decoding_step, for_inference, on_one_device
    from bimedix_jax.quantise import quantise_base

    config = dataclasses.replace(MIXTRAL_8X7B, num_layers=layers or LAYERS[device])
    devices = hardware.devices(device)
    placed = on_one_device(quantise_base(Mixtral(config, "bfloat16")), devices[0])
    step = decoding_step(for_inference(placed, devices), devices, batch, tokens)
    path = folder / f"decode_{device}_batch{batch}.txt"
    path.write_text(step.text or "", encoding="utf-8")
    needed = reads.needed(placed.model, batch, tokens + 1)
    counted = count(step.text or "")
    return {
        "device": device,
        "batch": batch,
        "layers": config.num_layers,
        "tokens": tokens,
        "bytes_needed": sum(needed.values()),
        "needed": needed,
        "ratio": counted["bytes_read"] / sum(needed.values()),
        "program": str(path),
        "compile_seconds": step.seconds,
        **counted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--devices", nargs="+", choices=LAYERS, default=["a100-80gb", "v5e"], help="what to compile for"
    )
    parser.add_argument("--batch", nargs="+", type=positive, default=[1, 8], help="sequences of a step")
    parser.add_argument("--tokens", type=positive, default=512, help="tokens of each sequence so far")
    parser.add_argument("--out", type=Path, default=Path("runs/decode_programs"), help="folder for compiled programs")
    parser.add_argument("--count", type=Path, metavar="FILE", help="count the program in this file instead")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    startup.prepare()
    from bimedix_jax.files import read_text
    from bimedix_jax.plan import traffic

    rule = (traffic.__doc__ or "").partition("\n\n")[2].strip()
    if options.count is not None:
        print(json.dumps(count(read_text(options.count)), indent=1))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [
        measure(device, batch, options.tokens, options.out) for device in options.devices for batch in options.batch
    ]
    if options.json:
        print(json.dumps({"rule": rule, "rows": rows}))
        return
    print(rule, end="\n\n")
    print(f"{'device':10} {'batch':>5} {'layers':>6} {'needed, MB':>11} {'read, MB':>11} {'ratio':>6}  program")
    for row in rows:
        sizes = f"{row['bytes_needed'] / 1e6:11,.1f} {row['bytes_read'] / 1e6:11,.1f} {row['ratio']:6.3f}"
        print(f"{row['device']:10} {row['batch']:5} {row['layers']:6} {sizes}  {row['program']}")


if __name__ == "__main__":
    run_script(main)
