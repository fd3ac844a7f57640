"""Named experiments, each a function that returns a value. A study varies one by named deltas."""

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

    Stated by the paper: the base v0.1, rank and alpha, learning rate, warm-up, 16 rows a step in two halves, epochs.
    Not stated and chosen here: 4,096 tokens a row with packing and the auxiliary weight 0.001 (axolotl's example for
    Mixtral of that time, whose other values match). Each of the 8 devices held one row of a micro-batch and balanced
    load over it alone, which is the scope "sequence". It recomputed whole layers; here the products of the experts are
    kept, for which 40 GB a device suffice and which saves a quarter of the work (docs/results/scale.md).
    """
    return Experiment(
        name="bimedix-mixtral-8x7b",
        model=ModelSource(path=base, base="nf4"),
        lora=LoraConfig(rank=128, alpha=64.0, targets=("q", "k", "v", "w1", "w2", "w3", "router")),
        data=DataSource(sequence_length=4096),
        router=RouterTraining(aux_loss_coef=0.001, aux_scope="sequence"),
        optimiser=OptimiserConfig(learning_rate=2e-4, warmup_steps=10),
        batch=BatchConfig(rows=8, accumulation=2),
        mesh=MeshConfig(),
        epochs=2,
        remat="experts",
        checkpoint_every=250,
    )


def bimedix_mixtral_8x7b_instruct() -> Experiment:
    """The same from Mixtral-8x7B-Instruct-v0.1, which the model cards of the published weights name as the base."""
    return bimedix_mixtral_8x7b(MIXTRAL_INSTRUCT)


def quickstart() -> Experiment:
    """SmolLM2-135M-Instruct upcycled to 4 experts, 2 at a time, minutes on a laptop's CPU. Give the model's folder."""
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
    """A tiny random model on made-up rows: every part of training in seconds, without any file."""
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
