"""A merged model equals base plus adapters, up to the rounding in its report."""

import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from bimedix_jax.adapters import add_lora, linears
from bimedix_jax.checkpoint.bnb import export_bnb
from bimedix_jax.checkpoint.load import load
from bimedix_jax.checkpoint.merge import export_merged
from bimedix_jax.checkpoint.store import save_adapter
from bimedix_jax.cli import main
from bimedix_jax.data.records import Record, conversation
from bimedix_jax.data.tokenizer import byte_tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.config import LORA_TARGETS, LoraConfig
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.routing.drift import Observed, drift, observe

SOME = LoraConfig(rank=3, alpha=6.0, targets=(r"layers\.1\.moe\.experts\.2\.w[12]", "v"))


def trained(model: Mixtral, config: LoraConfig, size: float = 0.2) -> Mixtral:
    """The model with random factors, as after training."""
    adapted, random = add_lora(model, config), np.random.default_rng(0)
    for layer in linears(adapted).values():
        if layer.lora is not None:
            for factor in (layer.lora.a, layer.lora.b):
                factor.set_value(jnp.asarray(size * random.standard_normal(factor.get_value().shape), jnp.float32))
    if config.train_router:
        adapted.layers.moe.router.w.set_value(adapted.layers.moe.router.w.get_value() * 1.1)
    return adapted


def texts(model: Mixtral, count: int = 4) -> list[tuple[str, list[int]]]:
    random = np.random.default_rng(1)
    return [
        ("en" if i % 2 else "ar", random.integers(0, model.config.vocab_size, 5 + 4 * i).tolist()) for i in range(count)
    ]


@pytest.mark.parametrize("into", ["original", "dequantised"])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=3, alpha=6.0, targets=LORA_TARGETS),
        LoraConfig(rank=3, alpha=6.0, targets=("q",), train_router=True),
        SOME,
    ],
    ids=["everything", "router in full", "some experts"],
)
def test_a_float32_merge_equals_the_model(write_mixtral, tmp_path, config, into):
    source = write_mixtral(tmp_path / "source", "float32")
    model = trained(load(source, "float32" if into == "original" else "nf4", dtype="float32"), config)
    report = export_merged(model, tmp_path / "merged", into, dtype="float32")
    assert max(report.rounding_loss.values()) < 1e-5
    seen = drift(observe(model, texts(model)), observe(load(tmp_path / "merged", "float32"), texts(model)))
    assert seen["max_logit_diff"] < 1e-5
    assert seen["routes_changed"] == 0
    if config is SOME:
        assert report.matrices == {"v": 2, "w1": 1, "w2": 1}


def test_transformers_loads_it(write_mixtral, tmp_path):
    import torch
    import transformers

    model = trained(
        load(write_mixtral(tmp_path / "source", "float32"), "nf4", dtype="float32"), LoraConfig(rank=3, alpha=6.0)
    )
    export_merged(model, tmp_path / "merged", "dequantised", dtype="float32")
    theirs = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = np.array([texts(model)[2][1]])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    assert np.abs(np.asarray(model(ids).logits_BTV) - expected).max() < 1e-4 * np.abs(expected).max()


def test_original_uses_the_unrounded_weights(mixtral, tmp_path):
    """The 4-bit base does not affect the result."""
    model = trained(load(mixtral, "nf4"), LoraConfig(rank=3, alpha=6.0))
    export_merged(model, tmp_path / "merged", "original", dtype="float32")
    before, after = load_file(mixtral / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    lora = model.layers.moe.w2.lora
    assert lora is not None
    delta = lora.scale * np.asarray(lora.a[...][1, 3] @ lora.b[...][1, 3]).T
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    np.testing.assert_allclose(after[name], before[name].astype(np.float32) + delta, rtol=1e-6, atol=1e-6)
    name = "model.layers.1.self_attn.o_proj.weight"
    np.testing.assert_array_equal(after[name], before[name].astype(np.float32))
    seen = drift(observe(model, texts(model)), observe(load(tmp_path / "merged", "float32"), texts(model)))
    assert seen["max_logit_diff"] > 1e-3, "4 bits and 16 bits are not the same model"


def test_a_merge_that_loses_the_deltas_warns(mixtral, tmp_path, caplog):
    model = trained(load(mixtral, "bfloat16"), LoraConfig(rank=3, alpha=6.0, targets=("q", "w1")), size=5e-3)
    with caplog.at_level(logging.WARNING):
        report = export_merged(model, tmp_path / "merged", "original")
    assert "lose a part of the fine-tuning" in caplog.text
    assert all(0.1 < loss < 2 for loss in report.rounding_loss.values())
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        export_merged(
            add_lora(load(mixtral), LoraConfig(rank=2, alpha=4.0, targets=("q",))), tmp_path / "untrained", "original"
        )
    assert "every delta is zero" in caplog.text


def test_another_base_raises(mixtral, write_mixtral, tmp_path):
    model = trained(load(mixtral, "nf4"), SOME)
    other = write_mixtral(tmp_path / "other", initializer_range=0.2)
    with pytest.raises(BimedixError, match="differs from the model's"):
        export_merged(model, tmp_path / "merged", "original", original=other)
    wider = write_mixtral(tmp_path / "wider", num_local_experts=8)
    with pytest.raises(BimedixError, match="another architecture"):
        export_merged(model, tmp_path / "merged", "original", original=wider)
    with pytest.raises(BimedixError, match="no adapters to merge"):
        export_merged(load(mixtral), tmp_path / "merged", "original")
    export_bnb(load(mixtral, "nf4"), tmp_path / "packed")
    packed = trained(load(tmp_path / "packed"), SOME)
    with pytest.raises(BimedixError, match="contains 4-bit weights, not the original ones"):
        export_merged(packed, tmp_path / "merged", "original")
    lora = model.layers.moe.w1.lora
    assert lora is not None
    lora.b.set_value(lora.b.get_value() * jnp.inf)
    with pytest.raises(BimedixError, match=r"experts\.2\.w1\.weight contains NaN or infinity"):
        export_merged(model, tmp_path / "merged", "dequantised")
    assert not (tmp_path / "merged").exists()


def test_drift_of_a_model_from_itself_and_from_another(mixtral, write_mixtral, tmp_path):
    model = load(mixtral, "float32")
    ours = observe(model, texts(model))
    same = drift(ours, observe(model, texts(model)))
    assert (same["max_logit_diff"], same["kl"], same["routes_changed"]) == (0, 0, 0)
    assert same["tokens"] == sum(len(ids) for _, ids in texts(model))
    other = drift(ours, observe(load(write_mixtral(tmp_path / "other", initializer_range=0.2)), texts(model)))
    assert other["kl"] > 0
    assert other["routes_changed"] > 0
    assert np.mean(other["routes_changed_by_layer"]) == pytest.approx(other["routes_changed"])
    parts = other["by_label"]
    whole = sum(parts[name]["tokens"] * parts[name]["kl"] for name in ("ar", "en")) / other["tokens"]
    assert whole == pytest.approx(other["kl"], rel=1e-5)
    with pytest.raises(ValueError, match="same texts"):
        drift(ours, observe(model, texts(model, 3)))
    with pytest.raises(BimedixError, match="model takes 1 to 64"):
        observe(model, [("en", [1] * 65)])


def test_observation_does_not_depend_on_padding(mixtral):
    model = load(mixtral, "float32")
    short, long = ("en", [5, 6, 7]), ("en", list(range(20)))
    alone, beside = observe(model, [short]), observe(model, [short, long])
    np.testing.assert_allclose(beside.logits_NV[:3], alone.logits_NV, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(beside.experts_LNK[:, :3], alone.experts_LNK)


def test_the_command_line(write_mixtral, tmp_path, capsys):
    """A merge with its report; contradictory options raise before anything is loaded."""
    source = write_mixtral(tmp_path / "source", vocab_size=304, max_position_embeddings=512)
    byte_tokenizer(source)
    probe = tmp_path / "probe.jsonl"
    turns = conversation("What is anaemia?", "Too little haemoglobin.")
    record = Record(id="1", language="en", kind="qa", source="test", licence="CC0-1.0", conversations=turns)
    probe.write_text(record.model_dump_json(by_alias=True) + "\n")
    save_adapter(trained(load(source, "nf4"), SOME), tmp_path / "adapter")
    words = [
        "export",
        str(source),
        "--out",
        str(tmp_path / "merged"),
        "--adapter",
        str(tmp_path / "adapter"),
        "--base",
        "nf4",
    ]
    assert main([*words, "--merge", "dequantised", "--probe", str(probe), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["merged"]["matrices"] == {"v": 2, "w1": 1, "w2": 1}
    assert 0 <= result["drift"]["routes_changed"] < 0.5
    assert "config.json" in result["files"]
    for extra, message in (
        ([], "--merge original or --merge dequantised"),
        (["--merge", "original", "--format", "peft"], "--merge gives a whole model"),
        (["--dtype", "float32"], "--dtype is the precision of a merge"),
    ):
        assert main([*words[:3], str(tmp_path / "none"), *words[4:], *extra]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_drift_equals_its_definition():
    """Two layers, three tokens, two of four experts: one expert of one token differs in one layer."""
    logits = np.array([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 4.0]], np.float32)
    experts = np.array([[[0, 1], [1, 2], [2, 3]], [[0, 3], [1, 3], [0, 2]]])
    labels = np.array(["en", "en", "ar"])
    ours = Observed(logits, experts, labels)
    rerouted, doubted = experts.copy(), logits.copy()
    rerouted[1, 2] = [0, 1]
    doubted[2] = [4.0, 0.0, 0.0]
    seen = drift(ours, Observed(doubted, rerouted, labels))
    assert seen["routes_changed"] == pytest.approx(1 / 6)
    assert seen["tokens_rerouted"] == seen["top1_changed"] == pytest.approx(1 / 3)
    assert seen["routes_changed_by_layer"] == pytest.approx([0, 1 / 3])
    p = np.exp(4) / (np.exp(4) + 2)
    expected = (p - (1 - p) / 2) * 4  # sum of p log(p / q) where the two largest logits are swapped
    assert seen["by_label"]["ar"]["kl"] == pytest.approx(expected, rel=1e-5)
    assert seen["max_logit_diff"] == 1
    assert (seen["by_label"]["en"]["kl"], seen["by_label"]["en"]["tokens_rerouted"]) == (0, 0)


def test_sets_of_experts_are_compared_not_their_order(mixtral):
    model = load(mixtral, "float32")
    assert (np.diff(observe(model, texts(model)).experts_LNK, axis=-1) > 0).all()
