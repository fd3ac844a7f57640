"""The whole-model benchmarks on a tiny model: their rows, their bounds, and that both sides do the same work."""

import importlib
import json
import math

import numpy as np
import pytest

from bimedix_jax.bench import bounds, model, peer
from bimedix_jax.cli import main

CONFIG = model.SMOKE
FIELDS = {
    "name",
    "ours_tokens_per_s",
    "peer_tokens_per_s",
    "ratio",
    "bound_tokens_per_s",
    "ours_over_bound",
    "ours_dtype",
    "ours_implementation",
    "compile_seconds",
}


def bench(capsys, *words: str) -> dict:
    assert main(["bench", *words, "--size", "smoke", "--repetitions", "2", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def check(rows: list[dict], names: list[str], against: bool) -> None:
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["ours_tokens_per_s"] > 0
        assert row["ours_over_bound"] == pytest.approx(row["ours_tokens_per_s"] / row["bound_tokens_per_s"])
        if against:
            assert row["ratio"] == pytest.approx(row["ours_tokens_per_s"] / row["peer_tokens_per_s"])
            assert {trial["dtype"] for trial in row["peer_trials"]} == set(peer.DTYPES["cpu"])
            assert row["peer_dtype"] in peer.DTYPES["cpu"]
        else:
            assert row["ratio"] is None


def test_training_steps(capsys):
    found = bench(capsys, "train", "--length", "16")
    check(found["rows"], ["train"], against=False)
    assert found["threads"] >= 1
    assert found["peer"] is None


def test_decoding_against_the_peer(capsys):
    words = [
        "--length",
        "16",
        "--prompt-tokens",
        "8",
        "--steps",
        "2",
        "--decode-batches",
        "1",
        "3",
        "--base",
        "bfloat16",
    ]
    found = bench(capsys, "decode", *words, "--against", "transformers")
    check(found["rows"], ["prefill", "decode_b1", "decode_b3"], against=True)
    assert found["rows"][2]["bytes_read_per_step"] > found["rows"][1]["bytes_read_per_step"]
    assert "transformers" in found["peer"]


def test_a_missing_peer_raises_with_the_install_command(capsys, monkeypatch):
    real = importlib.import_module

    def without_peft(name: str, *rest):
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without_peft)
    assert main(["bench", "train", "--size", "smoke", "--against", "transformers"]) == 1
    assert 'pip install "bimedix_jax[bench]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["train", "--length", "5000"], "lower --length"),
        (["train", "--length", "1"], "--length at least 2"),
        (["decode", "--steps", "0"], "at least 1"),
        (["decode", "--steps", "500"], "lower --length"),
    ],
)
def test_invalid_sizes_raise(capsys, words, remedy):
    assert main(["bench", *words, "--size", "smoke"]) == 1
    assert remedy in capsys.readouterr().err


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks transformers by its old name
def test_both_sides_have_the_same_loss():
    """A random model has the loss of a uniform guess plus the balancing loss. Then the loss of both sides falls."""
    expected = math.log(CONFIG.vocab_size) + model.AUX_COEF * CONFIG.router.top_k
    ours = model.training(CONFIG, "float32", "none", batch=2, length=16)
    theirs = peer.training(CONFIG, "float32", "eager", batch=2, length=16)
    packed = peer.training(CONFIG, "nf4", "grouped_mm", batch=2, length=16)
    for side in (ours, theirs, packed):
        losses = [side.run() for _ in range(3)]
        assert losses[0] == pytest.approx(expected, rel=0.02)
        assert losses[-1] < losses[0]


def test_decoding_continues_where_the_last_call_ended():
    side = model.decoding(CONFIG, "float32", batch=2, prompt=4, steps=3, runs=1)
    assert np.shape(side.run()) == (3, 2)
    theirs = peer.decoding(CONFIG, "float32", "eager", batch=2, prompt=4, steps=3)
    assert np.shape(theirs.run()) == (3, 2)


def test_products_of_a_forward_pass_count_every_weight_once():
    batch, length = 2, 64
    counted = bounds.total_flops(bounds.forward_products(CONFIG, batch, length))
    width, head, share = CONFIG.hidden_size, CONFIG.head_dim, CONFIG.router.top_k
    attention = width * head * (2 * CONFIG.num_heads + 2 * CONFIG.num_kv_heads)
    used = CONFIG.num_layers * (attention + 3 * share * width * CONFIG.intermediate_size) + width * CONFIG.vocab_size
    scores = CONFIG.num_layers * batch * CONFIG.num_heads * length * length * head * 2  # causal: half of two products
    assert counted == 2 * batch * length * used + scores


def test_training_has_twice_the_products_plus_adapters():
    forward = bounds.total_flops(bounds.forward_products(CONFIG, 2, 64))
    assert 2 * forward < bounds.total_flops(bounds.training_products(CONFIG, 2, 64, 1, ("q",))) < 2.2 * forward


def test_a_decoding_step_reads_the_expected_experts():
    dense, packed = model.base_model(CONFIG, "bfloat16"), model.base_model(CONFIG, "nf4")
    assert bounds.bytes_of_step(packed, 1) < bounds.bytes_of_step(dense, 1) < bounds.bytes_of_step(dense, 8)
    experts = 3 * CONFIG.num_layers * 8 * CONFIG.hidden_size * CONFIG.intermediate_size * 2
    assert bounds.bytes_of_step(dense, 8) - bounds.bytes_of_step(dense, 1) == pytest.approx(
        experts * ((1 - 0.75**8) - 0.25), rel=0.01
    )
    assert bounds.reading(1 << 20).bytes == 1 << 20


def test_the_fastest_implementation_is_chosen(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(peer.time, "perf_counter", lambda: clock[0])

    def make(dtype: str, experts: str) -> model.Side:
        def slow() -> None:
            clock[0] += 1.0 if (dtype, experts) == ("bfloat16", "eager") else 2.0

        return model.Side(slow, dtype, experts)

    side, trials = peer.fastest(make, peer.EXPERTS, warm_up=0)
    assert (side.dtype, side.implementation) == ("bfloat16", "eager")
    assert len(trials) == len(peer.DTYPES["cpu"]) * len(peer.EXPERTS)
