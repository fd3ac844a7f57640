"""Named experiments, each a function that returns an `Experiment`. Studies override fields of one."""

from collections.abc import Callable

from bimedix_jax.experiment import (
    BatchConfig,
    DataSource,
    Experiment,
    MeshConfig,
    ModelSource,
    OptimiserConfig,
    RouterTraining,
    Tracking,
)
from bimedix_jax.models.config import LoraConfig, MixtralConfig, RouterConfig

MIXTRAL = "mistralai/Mixtral-8x7B-v0.1"
MIXTRAL_INSTRUCT = "mistralai/Mixtral-8x7B-Instruct-v0.1"


def bimedix_mixtral_8x7b(base: str = MIXTRAL) -> Experiment:
    """BiMediX's recipe (arXiv 2402.13253): NF4 base, rank 128 on q, k, v, experts and router, AdamW, cosine, 2 epochs.

    The paper states the base v0.1, rank and alpha, learning rate, warm-up, 16 rows a step in two micro-batches, and the
    epochs. It does not state the tokens of a row, packing and the auxiliary weight. We chose 4,096, packing and 0.001,
    as in axolotl's Mixtral example of that time, whose other values match. In the paper each of 8 devices had one row
    of a micro-batch and balanced load over it alone, which is the scope "sequence". Here the 16 rows are one batch, two
    on each device: the same step with half of the gathers. The paper recomputed whole layers. Here the products of the
    experts and the results of attention are kept. Both need 50 GiB a device (docs/results/scale.md); with less memory,
    set batch.rows=8 batch.accumulation=2, or let `bimedix plan --fit` choose.
    """
    return Experiment(
        name="bimedix-mixtral-8x7b",
        model=ModelSource(path=base, base="nf4"),
        lora=LoraConfig(rank=128, alpha=64.0, targets=("q", "k", "v", "w1", "w2", "w3", "router")),
        data=DataSource(sequence_length=4096),
        router=RouterTraining(aux_loss_coef=0.001, aux_scope="sequence"),
        optimiser=OptimiserConfig(learning_rate=2e-4, warmup_steps=10),
        batch=BatchConfig(rows=16),
        mesh=MeshConfig(),
        epochs=2,
        remat="experts",
        checkpoint_every=250,
    )


def bimedix_mixtral_8x7b_instruct() -> Experiment:
    """The same on Mixtral-8x7B-Instruct-v0.1, the base according to the model cards of the published weights."""
    return bimedix_mixtral_8x7b(MIXTRAL_INSTRUCT)


def quickstart() -> Experiment:
    """SmolLM2-135M-Instruct upcycled to 4 experts, top-2. Minutes on a laptop's CPU; set model.path to its folder."""
    return Experiment(
        name="quickstart",
        model=ModelSource(base="nf4"),
        lora=LoraConfig(rank=16, alpha=32.0, targets=("q", "k", "v", "w1", "w2", "w3", "router")),
        data=DataSource(sequence_length=1024),
        router=RouterTraining(aux_loss_coef=0.01, aux_scope="global"),
        optimiser=OptimiserConfig(learning_rate=1e-3, warmup_steps=5),
        batch=BatchConfig(rows=1),
        steps=36,
        checkpoint_every=12,
    )


def smoke() -> Experiment:
    """A tiny random model on synthetic rows: all parts of training in seconds, without input files."""
    tiny = MixtralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        router=RouterConfig(num_experts=4, top_k=2),
        rope_theta=10_000.0,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_embeddings=True,
        max_position_embeddings=256,
    )
    return Experiment(
        name="smoke",
        model=ModelSource(base="nf4", dtype="float32", random=tiny),
        lora=LoraConfig(rank=4, alpha=8.0),
        data=DataSource(sequence_length=64, synthetic_rows=4),
        router=RouterTraining(aux_loss_coef=0.01, aux_scope="global"),
        optimiser=OptimiserConfig(learning_rate=1e-2, warmup_steps=2),
        batch=BatchConfig(rows=2, accumulation=2),
        steps=10,
        checkpoint_every=5,
        tracking=Tracking(mode="disabled"),
    )


PRESETS: dict[str, Callable[[], Experiment]] = {
    "bimedix-mixtral-8x7b": bimedix_mixtral_8x7b,
    "bimedix-mixtral-8x7b-instruct": bimedix_mixtral_8x7b_instruct,
    "quickstart": quickstart,
    "smoke": smoke,
}
