"""A base that is stored by rows for a TPU computes, identifies itself and is saved as it was loaded."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import GROUPED, quick_kernels, tiny

from bimedix_jax.adapters import add_lora, coverage
from bimedix_jax.checkpoint.identity import base_record
from bimedix_jax.checkpoint.merge import export_merged
from bimedix_jax.checkpoint.store import save
from bimedix_jax.experiment import RouterTraining
from bimedix_jax.kernels import backends
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.rows import RowMajor
from bimedix_jax.models.config import LoraConfig
from bimedix_jax.models.init import init_random
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.quantise import quantise_base
from bimedix_jax.sharding.by_rows import store_as_loaded, store_by_rows
from bimedix_jax.sharding.placement import place
from bimedix_jax.sharding.rules import make_mesh
from bimedix_jax.training.metadata import fingerprint
from bimedix_jax.training.state import split_for_training, split_params
from bimedix_jax.training.step import make_gradient

CONFIG = tiny(GROUPED, vocab_size=48, hidden_size=256, intermediate_size=512, head_dim=64, experts=2)
"""All matrices of the experts and the output projection of attention have whole tiles of rows."""


def model_in_4_bits(**changes) -> Mixtral:
    model = init_random(dataclasses.replace(CONFIG, **changes), dtype="float32", std=0.1)
    return add_lora(quantise_base(model), LoraConfig(rank=2, alpha=4.0))


def bases(model: Mixtral) -> dict[str, object]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_model_in_training_is_saved_and_identified_as_it_was_loaded(tmp_path):
    """By all that reads a base: identity of adapters, fingerprint of the run, coverage, checkpoints, merged exports."""
    model = model_in_4_bits()
    before = bases(model)

    def everything(folder):
        save(model, folder / "native")
        export_merged(model, folder / "merged", "dequantised")
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return files, base_record(model), coverage(model).to_dict()

    expected = everything(tmp_path / "loaded"), fingerprint(split_params(model)[2])
    with backends.use("tpu"), split_for_training(model) as (_, _, frozen):
        assert isinstance(frozen["layers.moe.w2.w"], RowMajor)
        assert isinstance(frozen["layers.attention.o.w"], RowMajor)
        with backends.use("cpu"):
            assert (everything(tmp_path / "training"), fingerprint(frozen)) == expected
    assert not frozen
    assert_equal(bases(model), before)


@pytest.mark.parametrize("placed", [False, True])
def test_after_an_error_only_a_model_on_one_device_is_converted_back(placed):
    """On a mesh other processes may not have had the error, and conversions are programs of all processes."""
    model = model_in_4_bits(num_layers=1)
    model = place(model, make_mesh(fsdp=8)) if placed else model
    with pytest.raises(RuntimeError, match="stopped"), backends.use("tpu"), split_for_training(model):
        raise RuntimeError("stopped")
    kinds = {type(value) for path, value in bases(model).items() if path.endswith("w1.w")}
    assert kinds == {RowMajor if placed else NF4Tensor}


@quick_kernels()
def test_gradients_on_a_mesh_equal_those_of_one_device():
    """The axis `fsdp` divides the rows of units that were split for `tensor`."""
    model = model_in_4_bits()
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, 8, 8), dtype=np.int32)
    batch = {"tokens_BT": tokens, "segment_ids_BT": np.ones_like(tokens), "loss_mask_BT": tokens > 4}

    def gradients_of(model):
        structure, params, frozen = split_params(model)
        return jax.jit(make_gradient(structure, RouterTraining(), "layer"))(params, frozen, batch)[0]

    sharded = place(model, make_mesh(fsdp=2, expert=2, tensor=2))
    before, layout = bases(sharded), sharded.placement
    store_by_rows(sharded)
    w1 = sharded.layers.moe.w1.w.get_value()
    assert isinstance(w1, RowMajor)
    expected = NamedSharding(make_mesh(fsdp=2, expert=2, tensor=2), P(None, "expert", "tensor", "fsdp", None))
    assert w1.packed.sharding == expected
    ours, theirs = gradients_of(sharded), gradients_of(model)
    for path, value in theirs.items():
        np.testing.assert_allclose(ours[path], value, atol=1e-5 * np.abs(value).max(), err_msg=path)
    store_as_loaded(sharded)
    assert_equal(bases(sharded), before)
    assert sharded.placement == layout
