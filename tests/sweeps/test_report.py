"""Curves, pictures and the page: made from numbers alone, and the same bytes each time."""

import chromium
import numpy as np
import pytest

from bimedix_jax.sweeps.picture import aligned, draw_curves, smoothed
from bimedix_jax.sweeps.report import Grid, Heading, Paragraph, Picture, Quote, counted, markdown, page
from bimedix_jax.sweeps.results import by_group, logged
from bimedix_jax.training.picture import draw_load, loads_of


def test_curves_use_the_steps_that_all_seeds_have():
    steps, losses = aligned([[(1, 4.0), (2, 3.0), (3, 2.5)], [(1, 5.0), (2, 4.0)]])
    assert steps.tolist() == [1, 2]
    assert losses.tolist() == [[4.0, 3.0], [5.0, 4.0]]
    assert smoothed(np.asarray([[4.0, 2.0, 6.0]]), 2).tolist() == [[4.0, 3.0, 4.0]]
    curves = {"a": [[(1, 4.0), (2, 3.0)], [(1, 4.5), (2, 3.5)]], "b": []}
    assert draw_curves(curves) == draw_curves(curves)


def test_load_is_a_mean_over_tokens(tmp_path):
    groups = [{"tokens": 3.0, "load": [[1.0, 0.0]]}, {"tokens": 1.0, "load": [[0.0, 1.0]]}]
    lines = [{"step": s, "load_max_share": [0.5, 0.6], "by_language": {"ar": groups[s % 2]}} for s in range(8)]
    assert loads_of(lines)["ar"].tolist() == [[0.75, 0.25]]
    assert (
        draw_load(lines, tmp_path / "a.png").read_bytes()
        != draw_load(
            [{"step": line["step"], "load_max_share": line["load_max_share"]} for line in lines], tmp_path / "b.png"
        ).read_bytes()
    )


def test_metrics_are_means_over_the_last_tenth_and_over_layers():
    lines = [{"nll": float(step), "load_entropy": [step, step + 1.0], "seconds": 1.0} for step in range(20)]
    assert logged(lines) == {"nll": 18.5, "load_entropy": 19.0}


def test_groups_sum_over_records():
    rows = [("en", "qa", 10.0, 5), ("en", "chat", 30.0, 15), ("ar", "qa", 8.0, 2)]
    found = by_group(
        {"language": language, "kind": kind, "nats": nats, "tokens": tokens, "bytes": 2 * tokens}
        for language, kind, nats, tokens in rows
    )
    assert list(found) == ["all", "ar", "ar/qa", "en", "en/chat", "en/qa"]
    assert found["en"]["nats_per_token"] == 2.0
    assert found["all"]["nats_per_token"] == pytest.approx(48 / 22)
    assert found["en/chat"]["bits_per_byte"] == pytest.approx(1 / np.log(2))


def test_a_page_escapes_what_users_wrote():
    blocks = [
        Heading(1, "a < b"),
        Paragraph("**p** & <q>"),
        Quote("> x"),
        Grid(["a|b"], [["<script>"]]),
        Picture("i", b"1", "i.png"),
    ]
    shown = page(blocks)
    assert "<script>" not in shown
    assert "<strong>p</strong> &amp; &lt;q&gt;" in shown
    assert "a\\|b" in markdown(blocks)
    assert "![i](i.png)" in markdown(blocks)


def test_a_page_is_legible_on_a_telephone_on_a_screen_and_in_print(browser, tmp_path):
    arms = [f"balance_{number}" for number in range(9)]
    curves = {arm: [[(step, 4 - 0.1 * step + number) for step in range(9)]] for number, arm in enumerate(arms)}
    blocks = [
        Heading(1, "Sweep"),
        Quote("Does it matter?\n" + "a_long_name_without_a_space_" * 9),
        Paragraph("**Primary contrast**, declared beforehand: loss of router_learning_rate_times_ten minus baseline."),
        Grid(["metric", *arms], [["held-out loss, nats per token", *["-0.0123 [-0.0345, +0.0099]"] * 9]] * 40),
        Picture("Training loss by step", draw_curves(curves), "curves.png"),
    ]
    (tmp_path / "report.html").write_text(page(blocks), "utf-8")
    chromium.check(browser, tmp_path / "report.html")


def test_a_start_without_an_end_is_a_kill_and_one_of_a_busy_run_is_none():
    events = ["start", "start", "finish", "start", "elsewhere", "start"]  # the last one may still run
    lines = [{"arm": "a", "event": event, "identity": "1"} for event in events]
    lines += [{"arm": "a", "event": "start", "identity": "superseded"}]
    assert counted(lines, {"1"}) == {("a", "start"): 3, ("a", "finish"): 1, ("a", "killed"): 1}
