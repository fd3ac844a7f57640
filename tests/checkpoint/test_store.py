"""Native folders restore bit-exactly; damaged and unfitting ones raise."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny

from bimedix_jax.adapters import add_lora
from bimedix_jax.checkpoint import steps
from bimedix_jax.checkpoint.integrity import find_damage
from bimedix_jax.checkpoint.store import (
    base_identity,
    is_adapter,
    is_native,
    leaves_of,
    load_adapter,
    restore,
    save,
    save_adapter,
)
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.config import LoraConfig
from bimedix_jax.models.init import init_random
from bimedix_jax.quantise import quantise_base

CONFIG = tiny(vocab_size=61, rope_theta=1e6, sliding_window=7, max_position_embeddings=64)
LORA = LoraConfig(rank=2, alpha=3.0, targets=("q", "w2", "router"))


def adapted(dtype="float32", packed=False, seed=0, config=CONFIG):
    """Adapters that are not zero."""
    model = init_random(config, seed=seed, dtype=dtype)
    model = add_lora(quantise_base(model) if packed else model, LORA, seed=3)
    assert model.layers.attention.q.lora is not None
    b = model.layers.attention.q.lora.b
    b.set_value(b.get_value() + 1.5)
    return model


def assert_equal(ours, theirs):
    assert jax.tree.structure(leaves_of(ours)) == jax.tree.structure(leaves_of(theirs)), (
        "layout of the 4-bit weights included"
    )
    jax.tree.map(np.testing.assert_array_equal, leaves_of(ours), leaves_of(theirs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_model_restores_bit_exactly(tmp_path, dtype, packed):
    model = adapted(dtype, packed)
    save(model, tmp_path / "model")
    restored = restore(tmp_path / "model")
    assert is_native(tmp_path / "model")
    assert not is_native(tmp_path)
    assert (restored.config, restored.dtype) == (CONFIG, dtype)
    assert restored.lora == LORA
    assert_equal(restored, model)


def test_a_tied_model_without_adapters(tmp_path):
    model = init_random(dataclasses.replace(CONFIG, tie_embeddings=True))
    save(model, tmp_path / "model")
    assert_equal(restore(tmp_path / "model"), model)


def test_a_folder_in_use_is_not_overwritten(tmp_path):
    save(init_random(CONFIG), tmp_path / "model")
    with pytest.raises(BimedixError, match="not empty"):
        save(init_random(CONFIG, seed=1), tmp_path / "model")
    save(init_random(CONFIG, seed=1), tmp_path / "model", overwrite=True)
    assert_equal(restore(tmp_path / "model"), init_random(CONFIG, seed=1))


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)


def test_one_flipped_bit_is_found(tmp_path):
    save(init_random(CONFIG), tmp_path / "model")
    flip_a_bit(tmp_path / "model/model.safetensors")
    with pytest.raises(BimedixError, match=r"content of model\.safetensors has changed"):
        restore(tmp_path / "model")
    restore(tmp_path / "model", verify=False)


def test_other_damage_is_found(tmp_path):
    save(init_random(CONFIG), tmp_path / "model")
    (tmp_path / "model/note.txt").write_text("mine")
    assert find_damage(tmp_path / "model") == "note.txt does not belong to it"
    (tmp_path / "model/note.txt").unlink()
    (tmp_path / "model/model.safetensors").unlink()
    assert find_damage(tmp_path / "model") == "model.safetensors is missing"
    (tmp_path / "model/manifest.json").unlink()
    assert "never finished" in str(find_damage(tmp_path / "model"))


def test_a_configuration_that_does_not_fit_raises(tmp_path):
    """Unknown keys, and tensors of another architecture."""
    save(init_random(CONFIG), tmp_path / "model")
    path = tmp_path / "model/bimedix.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"soft_cap": 30}, "unknown key soft_cap"),
        ({"hidden_size": 32}, r"embed\.table with shape \[61, 16\]"),
        ({"tie_embeddings": True}, "contains 1 tensors that the model does not have"),
    ):
        path.write_text(json.dumps(config | {"config": config["config"] | change}))
        with pytest.raises(BimedixError, match=message):
            restore(tmp_path / "model", verify=False)
    with pytest.raises(BimedixError, match="cannot be read"):
        restore(tmp_path)


def test_adapters_alone(tmp_path):
    """Saved over a dense base and loaded over the same base in 4 bits."""
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    assert is_adapter(tmp_path / "adapter")
    base = quantise_base(init_random(CONFIG))
    restored = load_adapter(base, tmp_path / "adapter")
    assert restored.lora == LORA
    for path, value in leaves_of(restored).items():
        if ".lora." in path:
            np.testing.assert_array_equal(value, leaves_of(model)[path])
    assert restored.layers.moe.w1.w.get_value().packed is base.layers.moe.w1.w.get_value().packed, "the base is shared"


def test_an_adapter_of_another_base_raises(tmp_path):
    save_adapter(adapted(), tmp_path / "adapter")
    other = init_random(dataclasses.replace(CONFIG, num_layers=3))
    with pytest.raises(BimedixError, match="num_layers 2 there, 3 here"):
        load_adapter(other, tmp_path / "adapter")
    with pytest.raises(BimedixError, match="already has adapters"):
        load_adapter(adapted(), tmp_path / "adapter")
    assert base_identity(other) != base_identity(adapted())
    assert base_identity(init_random(CONFIG, dtype="bfloat16")) == base_identity(adapted(packed=True))


def test_a_damaged_adapter_raises(tmp_path):
    save_adapter(adapted(), tmp_path / "adapter")
    flip_a_bit(tmp_path / "adapter/adapter.safetensors")
    with pytest.raises(BimedixError, match=r"content of adapter\.safetensors has changed"):
        load_adapter(init_random(CONFIG), tmp_path / "adapter")


def test_saving_adapters_of_a_model_without_any_raises(tmp_path):
    with pytest.raises(BimedixError, match="no adapters"):
        save_adapter(init_random(CONFIG), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_peft_folder_is_not_read_as_ours(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert not is_adapter(tmp_path)
    with pytest.raises(BimedixError, match="has format None"):
        load_adapter(init_random(CONFIG), tmp_path)


def state_of(step):
    return {"params": {"a": jnp.full((40, 30), step, jnp.float32)}, "step": jnp.asarray(step, jnp.int32)}


def write_steps(folder, numbers, keep=9):
    for step in numbers:
        steps.save_step(folder, step, state_of(step), {"seed": 0}, keep)


def test_training_states(tmp_path):
    """The newest `keep` checkpoints stay, and a state is restored exactly."""
    write_steps(tmp_path, [5, 10, 15], keep=2)
    assert steps.steps_in(tmp_path) == [10, 15]
    assert steps.newest_valid(tmp_path) == 15
    state, position = steps.restore_step(tmp_path, 10, state_of(0))
    jax.tree.map(np.testing.assert_array_equal, state, state_of(10))
    assert (position["step"], position["seed"]) == (10, 0)
    write_steps(tmp_path, [20], keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["00000020"]


def test_every_flipped_bit_of_a_training_state_is_found(tmp_path):
    """Orbax restores them without an error."""
    write_steps(tmp_path, [5])
    folder = steps.step_folder(tmp_path, 5)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        intact = path.read_bytes()
        path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
        assert find_damage(folder) is not None, path
        path.write_bytes(intact)
    assert find_damage(folder) is None


def test_a_damaged_newest_state_is_skipped_with_a_warning(tmp_path, caplog):
    write_steps(tmp_path, [5, 10])
    flip_a_bit(next((steps.step_folder(tmp_path, 10) / "state/ocdbt.process_0/d").iterdir()))
    with caplog.at_level(logging.WARNING):
        assert steps.newest_valid(tmp_path) == 5
    assert "00000010 is damaged" in caplog.text
    assert "resuming from the earlier step 5" in caplog.text


def test_no_valid_state_raises(tmp_path):
    with pytest.raises(BimedixError, match="contains no checkpoint"):
        steps.newest_valid(tmp_path)
    write_steps(tmp_path, [5])
    (steps.step_folder(tmp_path, 5) / "manifest.json").unlink()
    with pytest.raises(BimedixError, match=r"never finished.*No earlier one is valid"):
        steps.newest_valid(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        {"params": {"a": jnp.zeros((40, 31))}, "step": jnp.zeros((), jnp.int32)},
        {"params": {"b": jnp.zeros((40, 30))}, "step": jnp.zeros((), jnp.int32)},
    ],
)
def test_a_state_of_another_model_raises(tmp_path, template):
    write_steps(tmp_path, [5])
    with pytest.raises(BimedixError, match="resume with the experiment"):
        steps.restore_step(tmp_path, 5, template)
