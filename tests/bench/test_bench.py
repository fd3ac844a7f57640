"""The benchmarks of single operations. No test asserts a speed."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from bimedix_jax.bench.moe import Size, balanced, contestants, dequantise_all, skewed
from bimedix_jax.bench.timing import medians
from bimedix_jax.cli import main
from bimedix_jax.kernels import native
from bimedix_jax.kernels.nf4 import dequantize, quantize

TINY = Size(tokens=24, width=64, hidden=96, experts=4, top_k=2)


def test_contestants_are_interleaved_after_a_warm_up():
    calls = []
    seconds = medians({name: lambda name=name: calls.append(name) for name in "ab"}, repetitions=3, warm_up=1)
    assert calls == ["a", "b", "a", "b", "a", "b", "a", "b"]
    assert set(seconds) == {"a", "b"}


def test_group_sizes_add_up_to_all_rows():
    assert balanced(TINY).sum() == skewed(TINY).sum() == TINY.rows
    assert skewed(TINY).max() == TINY.rows // 2


def test_all_contestants_compute_the_same_product():
    contestant = contestants(TINY)
    ours, ragged = (np.asarray(contestant[name](), np.float32) for name in ("ours", "ragged_dot"))
    np.testing.assert_allclose(ours, ragged, rtol=0.02, atol=0.1)
    assert contestant["nf4"]().shape == contestant["dense"]().shape == (TINY.rows, TINY.hidden)


def test_dequantisation_ends_with_the_last_matrix():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8, 64)), jnp.bfloat16)
    t = quantize(w, batch_dims=1)
    even, odd = dequantise_all(t)
    expected = dequantize(t)[2]
    np.testing.assert_array_equal(even, expected[:, 0::2])
    np.testing.assert_array_equal(odd, expected[:, 1::2])


def test_the_command_line(tmp_path, capsys):
    words = ["bench", "moe", "--tokens", "8", "16", "--width", "64", "--hidden", "96", "--experts", "4"]
    assert main([*words, "--repetitions", "2", "--plot", str(tmp_path / "speed.png"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["tokens"] for row in rows] == [8, 16]
    for name in ("dense_gflops", "ours_gflops", "nf4_gflops", "ragged_dot_gflops", "dequant_gelems"):
        assert all(row[name] > 0 for row in rows)
    assert (tmp_path / "speed.png").stat().st_size > 1000
    assert main([*words, "--top-k", "9"]) == 1
    assert "at most --experts" in capsys.readouterr().err


def test_fused_and_composed_feed_forward(capsys):
    words = ["bench", "moe", "--tokens", "4", "--width", "64", "--hidden", "64", "--experts", "2", "--feed-forward"]
    assert main([*words, "--rank", "2", "--repetitions", "1", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    for name in ("forward", "forward_adapters", "training"):
        fused = [row[f"{name}_{backend}_ms"] for backend in ("avx512", "xla")]
        assert (fused[0] is not None) == (native.has_avx512() and any(map(shutil.which, native.COMPILERS)))
        fastest = min(taken for taken in fused if taken is not None)
        assert row[f"{name}_ratio"] == pytest.approx(row[f"{name}_composed_ms"] / fastest)
    assert main([*words, "--plot", "speed.png"]) == 1
    assert "no --plot" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [1, 7])
def test_flops_count_owned_rows_only(tokens):
    assert Size(tokens=tokens, width=64, hidden=96, experts=4, top_k=2).flops == 2 * 2 * tokens * 64 * 96
