"""Does training the routers help, and which adapters matter most: those of attention, of the experts, of the routers?

    bimedix sweep experiments/router_training.py --size smoke --out runs/router_training      # minutes
    bimedix sweep experiments/router_training.py --size lab --out runs/router_training        # resumable

The paper (arXiv 2402.13253, section 3.2) adapts attention, experts and routers, and reports no run without one of
them. The arms differ from the preset `quickstart` only in the adapters' targets. All have rank 16, so they train
different numbers of parameters, which the report counts. The primary contrast is between all targets and the same with
frozen routers. The sweep makes the mixture first:

    bimedix upcycle --out runs/mixture --noise 0.1

The experts must differ at the start: if they are equal, the language-model loss has no gradient with respect to the
router, and the arms differ by rounding. They must also still work: with this noise the held-out English questions have
3.28 nats a token (docs/tutorials/router.md), with exact copies in NF4 3.43 (docs/results/quickstart.md).
"""

from bimedix_jax.experiment import override
from bimedix_jax.presets import bimedix_mixtral_8x7b, quickstart
from bimedix_jax.sweeps.inputs import TINY, Inputs
from bimedix_jax.sweeps.study import Contrast, Size, delta

TARGETS = {
    "attention": ["q", "k", "v"],
    "experts": ["w1", "w2", "w3"],
    "router": ["router"],
    "all": ["q", "k", "v", "w1", "w2", "w3", "router"],
    "frozen-router": ["q", "k", "v", "w1", "w2", "w3"],
}
ARMS = {
    name: override(quickstart(), {"lora.targets": targets, "router.languages": ["en", "ar"]})
    for name, targets in TARGETS.items()
}
SEEDS = 6
PRIMARY = Contrast("nats_per_token", "all", "frozen-router", -1)
SIZES = {
    "smoke": Size(
        changes={
            "data.sequence_length": 512,
            "batch.rows": 2,
            "steps": 12,
            "optimiser.learning_rate": 1e-2,
            "optimiser.warmup_steps": 2,
            "lora.rank": 8,
            "lora.alpha": 16.0,
            "tracking.mode": "disabled",
            "kernels.expert_mlp": "composed",  # compiles fast
            "kernels.grouped_matmul": "ragged_dot",
        },
        seeds=2,
        minutes=0.5,
        inputs=Inputs(dense=TINY),
        heldout="sample",
        limit=6,
    ),
    "lab": Size(changes={"steps": 16}, minutes=6, inputs=Inputs(dense="smollm2-135m"), heldout="sample"),
    "full": Size(changes=delta(quickstart(), bimedix_mixtral_8x7b()), heldout="sample"),
}
