"""The quickstart's smoke run, end to end on a tiny random model, interrupted once and resumed."""

import html
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bimedix_jax.cli import main

LOSSES = {"en", "ar", *(f"{language}/{kind}" for language in ("en", "ar") for kind in ("qa", "mcqa", "chat"))}


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bimedix_jax", "quickstart", "--out", str(folder), "--json", *options]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"  # the last one counts
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder.parent,
        env=os.environ | {"XLA_FLAGS": flags},
    )


@pytest.mark.whole_process
def test_an_interrupted_smoke_run_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder, "--smoke")
    while not (folder / "training" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert f"bimedix quickstart --resume --out {folder}" in stderr
    assert not (folder / "result.json").exists()

    process = start(folder, "--resume")
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    result = json.loads(stdout)
    assert set(result["loss_before"]) == set(result["loss_after"]) == LOSSES
    assert "WARNING" not in stderr  # of a library's logger
    assert all(result["loss_after"][language] < result["loss_before"][language] for language in ("en", "ar"))
    assert set(result["accuracy_before"]) == {"en", "ar"}
    assert 0 < result["peak_rss_bytes"] < 8 * 2**30
    steps = [json.loads(line)["step"] for line in (folder / "training" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, result["steps"] + 1))
    page = Path(tmp_path / result["report"]).read_text("utf-8")
    assert 'dir="rtl"' in page
    assert page.count("data:image/png;base64") == 2
    assert "Before training: divergence gate fails: experts are identical (distance 0)" in page
    assert "specialis" not in page
    assert result["expert_distance"]["before"] == 0 < result["expert_distance"]["after"]
    before, after = (result["gate"][when] for when in ("before", "after"))
    assert (before["delta_nll"], before["diverged"]) == (0, False)
    assert after["low"] < after["delta_nll"] < after["high"]
    assert f"After training: divergence gate {'holds' if after['low'] > after['floor'] else 'fails'}: experts" in page
    for when in ("before", "after"):
        for score in result["accuracy"][when].values():
            assert score["low"] <= score["accuracy"] <= score["high"]
            assert score["n"] > 0
    assert f"bimedix_jax {result['version']}" in page
    assert f"seed {result['seed']}" in page
    assert result["hardware"]["processor"] in html.unescape(page)
    assert "95 % interval" in page
    assert result["limits"] in page
    assert (Path(tmp_path / result["adapter"]) / "adapter.json").exists()


def test_invalid_options_raise(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # which --smoke changes
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    for options, message in (
        (("--smoke",), "exists already; resume it with --resume"),
        (("--resume",), "contains no quickstart to resume"),
        (("--resume", "--smoke"), "keeps its own settings"),
        (("--steps", "0"), "give at least 1"),
    ):
        assert main(["quickstart", "--out", str(tmp_path / "taken"), "--json", *options]) == 1
        stderr = capsys.readouterr().err
        assert message in " ".join(stderr.split())
        assert "Traceback" not in stderr


@pytest.mark.parametrize("language", ["en", "ar"])
def test_the_sample_has_every_language_and_kind(language: str) -> None:
    from bimedix_jax.data.records import sample

    kept = [record for record in sample("heldout") if record.language == language]
    assert {record.kind for record in kept} == {"qa", "mcqa", "chat"}
