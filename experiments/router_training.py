"""Which adapters matter most: those of attention, of the experts, of the routers, or all of them?

    bimedix upcycle --out runs/mixture --noise 0.1
    bimedix data pack --records sample --split train --tokenizer runs/mixture --sequence-length 1024 --out runs/rows
    python experiments/router_training.py --arm attention --data runs/rows --model runs/mixture --out runs/attention
    bimedix eval run --model runs/mixture --base nf4 --adapter runs/attention/adapter --heldout sample

The paper (arXiv 2402.13253, section 3.2) adapts attention, experts and routers, and reports no run without one of
them. The arms differ from the preset `quickstart` only in their name and the adapters' targets. All have rank 16, so
they train different numbers of parameters; `bimedix coverage` counts them. The experts must differ at the start
(--noise 0.1): if they are equal, the language-model loss has no gradient with respect to the router, and the arms
differ by rounding. They must also still work: with this noise the held-out English questions have 3.28 nats a token
(docs/tutorials/router.md), with exact copies in NF4 3.43 (docs/results/quickstart.md). `--drop-rate 0.5` would redraw
half of every layer, and such a model has to be trained again first. `--steps 8` is enough for a trial.
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
    """The preset with other targets of the adapters."""
    return override(quickstart(), {"name": f"router-training/{name}", "lora.targets": TARGETS[name]})


ARMS = {name: arm(name) for name in TARGETS}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--data", required=True, help="packed folder with the sequence length of the preset")
    parser.add_argument("--model", required=True, help="folder of the upcycled model")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps (default: those of the preset)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the adapters and of the order of the rows")
    parser.add_argument("--resume", action="store_true", help="resume an interrupted run")
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
