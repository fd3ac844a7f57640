"""The full-size training step compiles for eight A100s and for eight TPU v5e, within bounds on memory; recording too.

The paper's recipe on Mixtral-8x7B: rank 128, 16 rows of 4,096 tokens on 8 devices. The bounds fail if weights
are no longer sharded, if gathers are hoisted out of the loop over layers, or if dequantised weights are kept.
"""

import re

import pytest

from bimedix_jax.costs.devices import target
from bimedix_jax.experiment import override
from bimedix_jax.models.config import MIXTRAL_8X7B
from bimedix_jax.plan import hardware, shares
from bimedix_jax.plan.report import Estimate, estimate_training, to_document
from bimedix_jax.plan.step import recording_step, training_step
from bimedix_jax.presets import bimedix_mixtral_8x7b

GIB = 2**30
BOUND, TPU_BOUND = 51.0 * GIB, 14.0 * GIB
"""Bytes of each A100; of each v5e with one row at a time and whole layers recomputed."""


def estimated(devices: str, **changes) -> Estimate:
    return estimate_training(MIXTRAL_8X7B, override(bimedix_mixtral_8x7b(), changes), target(devices))


def test_the_recipe_fits_eight_a100s() -> None:
    found = estimated("a100-80gb:8")
    document = to_document(found)
    assert document["fits"]
    assert document["peak_bytes_per_device"] <= BOUND
    assert document["hours"] <= 20
    # NF4 with double quantisation takes 4.13 bits a weight; embeddings, head, norms and routers 16
    assert document["parts"]["base"] <= 22.9 * GIB / 8
    assert document["parts"]["optimiser"] == pytest.approx(2 * document["parts"]["adapters"], rel=1e-3)
    # the forward pass and its recomputation gather each layer's packed bytes, never 16-bit weights
    gathered = document["collective_bytes"]["all-gather"] / found.experiment.batch.accumulation
    assert gathered <= 2 * (22.9 + 7.1) * GIB
    assert document["flops"] <= 1.15 * document["useful_flops"]
    assert abs(document["excess_flops"]["other"]) <= 0.02 * document["useful_flops"]
    parts, total = document["device_seconds_by_part"], document["device_seconds"]
    assert sum(parts.values()) == pytest.approx(total)
    assert next(iter(parts)) == shares.EXPERTS
    assert parts[shares.MOVED] + parts[shares.ZEROS] <= 0.03 * total


@pytest.mark.usefixtures("least_effort")
def test_rows_of_32768_tokens_fit_without_an_array_of_all_pairs_of_tokens() -> None:
    length = 32_768
    changes = {"data.sequence_length": length, "batch.rows": 8, "batch.accumulation": 1, "remat": "layer"}
    devices = hardware.devices("a100-80gb", 8)
    found = training_step(MIXTRAL_8X7B, override(bimedix_mixtral_8x7b(), changes), devices)
    assert found.text is not None
    assert f"[{length}," in found.text
    assert not re.search(rf"\[[\d,]*\b{length},{length}\b[\d,]*\]", found.text)
    assert found.peak_bytes is not None
    assert found.peak_bytes <= 35 * GIB


@pytest.mark.usefixtures("least_effort")
def test_the_recipe_fits_eight_v5es() -> None:
    """With least effort the TPU's compiler takes 50 seconds instead of 157.

    The program gathers 14 % more, and its peak is 12.0 GiB instead of 12.5 at the usual level.
    """
    found = estimated("v5e:8", remat="layer", batch={"rows": 8, "accumulation": 2})
    document = to_document(found)
    assert document["fits"], "the TPU's compiler ran out of the 15.75 GiB that a chip has"
    assert document["peak_bytes_per_device"] <= TPU_BOUND
    gathered = document["collective_bytes"]["all-gather"] / found.experiment.batch.accumulation
    assert gathered <= 2 * (22.9 + 7.1) * GIB
    assert document["flops"] <= 1.75 * document["useful_flops"]


def test_recording_routes_fits_eight_a100s() -> None:
    """Margins, entropies and losses add little to the forward pass: no array has logits of all layers and tokens."""
    absent = hardware.devices("a100-80gb", 8)
    found = recording_step(MIXTRAL_8X7B, bimedix_mixtral_8x7b(), absent, rows=8, length=4096)
    assert found.peak_bytes is not None
    assert found.peak_bytes <= 10.0 * GIB
