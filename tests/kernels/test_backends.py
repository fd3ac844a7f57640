"""Backends can be chosen by the caller, by `use` and by configuration, and choices are recorded."""

import typing

import jax
import jax.numpy as jnp
import pytest

from bimedix_jax import experiment
from bimedix_jax.kernels import backends
from bimedix_jax.kernels.attention import api as attention
from bimedix_jax.kernels.expert_mlp import api as expert_mlp
from bimedix_jax.kernels.grouped_low_rank import api as grouped_low_rank
from bimedix_jax.kernels.grouped_matmul import api as grouped_matmul
from bimedix_jax.kernels.layer_scan import api as layer_scan
from bimedix_jax.kernels.nf4 import quantize
from bimedix_jax.kernels.nf4_matmul import api as nf4_matmul

X, W, GROUPS = jnp.ones((8, 64)), jnp.ones((2, 64, 64)), jnp.asarray([4, 4], jnp.int32)


@jax.jit
def layer(x: jax.Array) -> jax.Array:
    """All operations with backends."""
    x = grouped_matmul.grouped_matmul(x, W, GROUPS)
    x = x + grouped_low_rank.grouped_low_rank(x, W[:, :, :2], W[:, :2], GROUPS)
    return nf4_matmul.matmul(x, quantize(W[0]))


def picked(platform: str, **names: str) -> dict[str, list[str]]:
    with backends.use(platform, **names), backends.recording() as record:
        jax.eval_shape(layer, X)
    return record.to_dict()


def test_choices_are_recorded() -> None:
    """Also for a function that was traced before: each recording traces it again."""
    for _ in range(2):
        assert picked("cpu") == {
            "grouped_low_rank": ["masked"],
            "grouped_matmul": ["xla"],
            "nf4_matmul": ["xla"],
        }
    assert picked("gpu") == {
        "grouped_low_rank": ["grouped"],
        "grouped_matmul": ["triton"],
        "nf4_matmul": ["triton"],
    }
    assert picked("tpu", grouped_matmul="ragged_dot", grouped_low_rank="masked") == {
        "grouped_low_rank": ["masked"],
        "grouped_matmul": ["ragged_dot"],
        "nf4_matmul": ["mosaic_tpu"],
    }


def test_all_backends_of_an_operation_are_recorded() -> None:
    with backends.recording() as record:
        for name in ("xla", "ragged_dot", "xla"):
            grouped_matmul.grouped_matmul(X, W, GROUPS, backend=name)
        with backends.recording() as inner:
            pass
    assert record.to_dict() == {"grouped_matmul": ["ragged_dot", "xla"]}
    assert inner.to_dict() == {}


@pytest.mark.parametrize("operation", backends.OPERATIONS)
def test_every_operation_can_be_chosen_by_configuration(operation: str) -> None:
    tables = {
        "layer_scan": layer_scan,
        "attention": attention,
        "expert_mlp": expert_mlp,
        "grouped_matmul": grouped_matmul,
        "nf4_matmul": nf4_matmul,
        "grouped_low_rank": grouped_low_rank,
    }
    hint = typing.get_type_hints(experiment.KernelChoice)[operation]
    names = {name for option in typing.get_args(hint) for name in typing.get_args(option)}
    assert names == set(tables[operation].BACKENDS)
    assert set(tables) == set(backends.OPERATIONS) == set(typing.get_type_hints(experiment.KernelChoice))


def test_configured_backends() -> None:
    choice = experiment.KernelChoice(grouped_matmul="ragged_dot")
    assert choice.named() == {"grouped_matmul": "ragged_dot"}
    with backends.use(**choice.named()), backends.recording() as record:
        layer(X)
    assert record.to_dict()["grouped_matmul"] == ["ragged_dot"]
