"""Which adapters carry the learning: attention, experts, routers, or all together?

    bimedix upcycle --output runs/mixture --drop-rate 0.5
    bimedix data pack --records sample --split train --tokenizer runs/mixture --sequence-length 1024 --output runs/rows
    python experiments/router_training.py --arm attention --data runs/rows --model runs/mixture --out runs/attention
    bimedix eval run --model runs/mixture --base nf4 --adapter runs/attention/adapter --heldout sample

The paper (arXiv 2402.13253, section 3.2) adapts experts and routers besides attention and reports no arm without them.
The arms differ from the preset `quickstart` in their name and in the adapters' targets only. All have rank 16, so they
do not train equally many parameters; `bimedix coverage` counts them. Start from experts that differ (--drop-rate):
between equal experts the language-model loss gives a router no gradient. `--steps 8` is a size for trying it out.
"""

import argparse
from pathlib import Path

from bimedix_jax import startup
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment, override
from bimedix_jax.presets import quickstart

TARGETS = {
    "everything": ("q", "k", "v", "w1", "w2", "w3", "router"),
    "attention": ("q", "k", "v"),
    "experts": ("w1", "w2", "w3"),
    "router": ("router",),
    "frozen-router": ("q", "k", "v", "w1", "w2", "w3"),
}


def arm(name: str) -> Experiment:
    """The preset with other adapters."""
    return override(quickstart(), {"name": f"router-training/{name}", "lora.targets": TARGETS[name]})


ARMS = {name: arm(name) for name in TARGETS}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--data", required=True, help="packed folder, with the preset's tokens a row")
    parser.add_argument("--model", required=True, help="folder of the mixture")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps (default: the preset's)")
    parser.add_argument("--seed", type=int, default=0, help="of the adapters and of the order of the rows")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    options = parser.parse_args(argv)
    changes = {"data.path": options.data, "model.path": options.model, "seed": options.seed}
    if options.steps is not None:
        changes["steps"] = options.steps
    startup.prepare()
    from bimedix_jax.training.loop import train

    try:
        result = train(override(ARMS[options.arm], changes), options.out, resume=options.resume)
    except BimedixError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{options.arm}: {result.steps} steps, last training loss {result.metrics['nll']:.4f}, {result.trained}")


if __name__ == "__main__":
    main()
