"""Adapters to and from transformers + peft, which run in the tests: the same logits."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bimedix_jax as bmx
from bimedix_jax.adapters import linears
from bimedix_jax.checkpoint.peft_read import load_peft
from bimedix_jax.checkpoint.peft_write import export_peft
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.config import LoraConfig, LoraOverride
from bimedix_jax.models.mixtral import Mixtral

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 12))
LAYOUTS = ("per_expert", "fused")
ALL = ("q", "k", "v", "o", "w1", "w2", "w3", "router", "lm_head")
UNEVEN = (
    LoraOverride(target="w1", rank=3, alpha=5.0),
    LoraOverride(target="w2", rank=5),
    LoraOverride(target="w3", rank=2, alpha=7.0),
    LoraOverride(target="router", rank=2, alpha=3.0),
    LoraOverride(target="q", alpha=1.0),
    LoraOverride(target="lm_head", rank=3),
)
CONFIGS = {
    "default": LoraConfig(rank=4, alpha=8.0),
    "rank-stabilised": LoraConfig(rank=4, alpha=8.0, rank_stabilised=True),
    "uneven": LoraConfig(rank=4, alpha=8.0, targets=ALL, overrides=UNEVEN),
    "uneven, rank-stabilised": LoraConfig(rank=4, alpha=8.0, targets=ALL, rank_stabilised=True, overrides=UNEVEN),
    "some layers and experts": LoraConfig(
        rank=4,
        alpha=8.0,
        targets=(
            r"layers\.1\.attention\.q",
            r"layers\.0\.moe\.experts\.(0|2)\.w1",
            r"layers\.1\.moe\.experts\.3\.w2",
            r"layers\.1\.moe\.router",
        ),
    ),
    "w3 alone": LoraConfig(
        rank=4,
        alpha=8.0,
        targets=("w3",),
        rank_stabilised=True,
        overrides=(LoraOverride(target="w3", rank=3, alpha=7.0),),
    ),
    "w2 alone": LoraConfig(rank=4, alpha=8.0, targets=("w2",)),
    "w1 and w2": LoraConfig(
        rank=4, alpha=8.0, targets=("w1", "w2"), rank_stabilised=True, overrides=(LoraOverride(target="w1", rank=2),)
    ),
    "attention": LoraConfig(rank=2, alpha=3.0, targets=("v", "o"), dropout=0.1),
    "router in full": LoraConfig(rank=4, alpha=8.0, targets=(), train_router=True),
    "router in full beside adapters": LoraConfig(rank=4, alpha=8.0, targets=("q", "w1", "w3"), train_router=True),
}


def our_logits(model: Mixtral) -> np.ndarray:
    return np.asarray(model(TOKENS).logits_BTV)


def hugging_face(base: Path) -> Any:
    import transformers

    eager: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return transformers.MixtralForCausalLM.from_pretrained(base, **eager).eval()


def with_peft(base: Path, folder: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(hugging_face(base), str(folder))


def their_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Within 1e-4 of the largest logit."""
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_an_exported_adapter_gives_the_same_logits_in_peft_and_back(base, model, trained, tmp_path, name, layout):
    adapted = trained(model, CONFIGS[name])
    expected = our_logits(adapted)
    assert np.abs(expected - our_logits(model)).max() > 0.1
    bmx.export_peft(adapted, tmp_path / "ours", layout)
    theirs = with_peft(base, tmp_path / "ours")
    assert_same(their_logits(theirs), expected)
    back = bmx.load(base, base="float32", adapter=tmp_path / "ours")
    assert_same(our_logits(back), expected)
    assert back.lora is not None
    assert dict(targets_and_ranks(back)) == dict(targets_and_ranks(adapted))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = bmx.load(base, base="float32", adapter=tmp_path / "theirs")
    assert_same(our_logits(again), expected)
    assert dict(targets_and_ranks(again)) == dict(targets_and_ranks(adapted))


def targets_and_ranks(model: Mixtral) -> Iterator[tuple[str, tuple]]:
    """The adapters: kind -> (slots, rank)."""
    for path, layer in linears(model).items():
        if layer.lora is not None:
            yield path[-1], (layer.lora.slots, layer.lora.a.get_value().shape[-1])


def test_the_configuration_round_trips(model, trained, tmp_path):
    config = LoraConfig(
        rank=4, alpha=8.0, overrides=(LoraOverride(target="w2", rank=5, alpha=3.0), LoraOverride(target="q", alpha=1.0))
    )
    for layout, stabilised in itertools.product(LAYOUTS, (False, True)):
        there = LoraConfig(
            rank=config.rank,
            alpha=config.alpha,
            targets=config.targets,
            rank_stabilised=stabilised,
            dropout=0.0,
            overrides=config.overrides,
        )
        export_peft(trained(model, there), tmp_path / "adapter", layout, overwrite=True)
        back = load_peft(model, tmp_path / "adapter").lora
        assert back is not None
        assert (set(back.overrides), set(back.targets)) == (set(there.overrides), set(there.targets))
        assert (back.rank, back.alpha, back.rank_stabilised) == (4, 8.0, stabilised)


def peft_trained(base: Path, folder: Path, **settings: Any) -> np.ndarray:
    """Saves an adapter that peft made, every entry of its B random; returns the logits."""
    import peft
    import torch

    theirs = peft.get_peft_model(hugging_face(base), peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **settings})).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(str(folder))
    return their_logits(theirs)


FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
THEIRS = {
    "everything": {"target_modules": ["q_proj", "o_proj", "lm_head"], "target_parameters": FUSED},
    "rank-stabilised": {"target_modules": [], "target_parameters": FUSED, "use_rslora": True},
    "names of transformers 4": {"target_modules": ["k_proj", "w1", "w2", "w3", "gate"]},
    "patterns": {
        "target_modules": ["q_proj", "k_proj"],
        "target_parameters": FUSED,
        "rank_pattern": {"mlp.experts.gate_up_proj": 4, "layers.1.self_attn.q_proj": 6, "k_proj": 1},
        "alpha_pattern": {r"layers\.0\..*\.down_proj": 20, "k_proj": 2},
    },
    "one layer": {
        "target_modules": r".*layers\.1\..*\.v_proj",
        "target_parameters": ["layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"],
    },
    "layers_to_transform": {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
    "router in full": {"target_modules": ["q_proj"], "modules_to_save": ["gate"], "lora_dropout": 0.1},
}


@pytest.mark.parametrize("name", THEIRS)
def test_adapter_of_peft_gives_the_same_logits_here(base, model, tmp_path, name):
    expected = peft_trained(base, tmp_path / "theirs", **THEIRS[name])
    adapted = load_peft(model, tmp_path / "theirs")
    assert np.abs(expected - our_logits(model)).max() > 0.05
    assert_same(our_logits(adapted), expected)


def test_shared_a_of_w1_and_w3_is_not_truncated(base, model, tmp_path):
    """peft trains all of B, so that w1 and w3 share every rank: each gets the whole A."""
    peft_trained(base, tmp_path / "theirs", target_modules=[], target_parameters=FUSED[:1])
    adapted = load_peft(model, tmp_path / "theirs")
    assert {kind: rank for kind, (_, rank) in targets_and_ranks(adapted)} == {"w1": 3, "w3": 3}
    lora_1, lora_3 = adapted.layers.moe.w1.lora, adapted.layers.moe.w3.lora
    assert lora_1 is not None
    assert lora_3 is not None
    np.testing.assert_array_equal(lora_1.a[...], lora_3.a[...])


def test_differing_ranks_and_scales_are_padded_with_a_warning(base, model, tmp_path, caplog):
    expected = peft_trained(
        base,
        tmp_path / "theirs",
        target_modules=["q_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 6},
        alpha_pattern={"layers.1.self_attn.q_proj": 2},
    )
    adapted = load_peft(model, tmp_path / "theirs")
    assert "2 adapters of q have another rank or scale than 6" in caplog.text
    lora = adapted.layers.attention.q.lora
    assert lora is not None
    assert not np.asarray(lora.a[...])[0, :, 3:].any()
    assert np.asarray(lora.a[...])[1, :, 3:].all()
    assert_same(our_logits(adapted), expected)


def test_adapter_on_a_4_bit_base(base, trained, tmp_path):
    packed = bmx.load(base, base="nf4", dtype="float32")
    adapted = trained(packed, CONFIGS["default"])
    export_peft(adapted, tmp_path / "adapter")
    back = bmx.load(base, base="nf4", dtype="float32", adapter=tmp_path / "adapter")
    np.testing.assert_array_equal(our_logits(back), our_logits(adapted))


def test_copies_of_the_base_are_compared(base, model, tmp_path):
    """peft saves a copy of the head with an adapter on it."""
    peft_trained(base, tmp_path / "theirs", target_modules=["lm_head"])
    weights, name = tmp_path / "theirs" / "adapter_model.safetensors", "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(weights)
    assert name in tensors
    load_peft(model, tmp_path / "theirs")
    tensors[name][0, 0] += 1
    save_file(tensors, weights)
    with pytest.raises(BimedixError, match="differs from the base's"):
        load_peft(model, tmp_path / "theirs")
