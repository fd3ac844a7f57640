"""Tiny models and batches, for tests that run in seconds."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny import TINY

from bimedix_jax.experiment import (
    BatchConfig,
    DataSource,
    Experiment,
    ModelSource,
    OptimiserConfig,
    RouterTraining,
    Tracking,
)
from bimedix_jax.models.config import LoraConfig, MixtralConfig


def tiny_experiment(**changes: Any) -> Experiment:
    """A run of a few steps on six synthetic rows of 16 tokens."""
    plain = Experiment(
        name="tiny",
        model=ModelSource(base="float32", random=TINY),
        lora=LoraConfig(rank=2, alpha=4.0),
        data=DataSource(sequence_length=16, synthetic_rows=6),
        router=RouterTraining(aux_loss_coef=0.01),
        optimiser=OptimiserConfig(learning_rate=0.02, warmup_steps=1),
        batch=BatchConfig(rows=2),
        steps=6,
        remat="none",
        checkpoint_every=2,
        tracking=Tracking(mode="disabled"),
    )
    return dataclasses.replace(plain, **changes)


def random_batch(rows: int, length: int, seed: int = 0, vocab_size: int = TINY.vocab_size) -> dict[str, np.ndarray]:
    """Rows with documents and padding of random lengths; some rows may be empty."""
    random = np.random.default_rng(seed)
    segment_ids = np.zeros((rows, length), np.int32)
    for row in range(rows):
        borders = np.sort(random.integers(0, length + 1, 3))
        for number, (first, end) in enumerate(zip(borders, borders[1:], strict=False), start=1):
            segment_ids[row, first:end] = number
    return {
        "tokens_BT": random.integers(0, vocab_size, (rows, length), dtype=np.int32),
        "segment_ids_BT": segment_ids,
        "loss_mask_BT": (random.random((rows, length)) < 0.6) & (segment_ids != 0),
    }


@pytest.fixture(scope="session")
def experiment() -> Callable[..., Experiment]:
    return tiny_experiment


@pytest.fixture(scope="session")
def batch() -> Callable[..., dict[str, np.ndarray]]:
    return random_batch


@pytest.fixture(scope="session")
def config() -> MixtralConfig:
    return TINY
