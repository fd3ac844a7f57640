"""Knock-outs against models and plans that are made for one cell, and their statistics."""

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from tiny import TINY

from bimedix_jax import cli
from bimedix_jax.adapters import add_lora, linears
from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.checkpoint.store import save_adapter
from bimedix_jax.commands import routes_knockout
from bimedix_jax.data.encoding import ROLES
from bimedix_jax.data.records import Record, conversation, write_jsonl
from bimedix_jax.errors import BimedixError
from bimedix_jax.inference import scoring
from bimedix_jax.inference.planning import Source
from bimedix_jax.inference.scoring import score
from bimedix_jax.kernels import backends
from bimedix_jax.models.call import Start
from bimedix_jax.models.config import LoraConfig, RouterConfig
from bimedix_jax.models.init import init_random, with_router
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import RoutingPlan
from bimedix_jax.routing.knockout import (
    ANSWER,
    MEANINGS,
    PROMPT,
    Cell,
    LeftOut,
    Measured,
    cells_of,
    gain_gradients,
    knock_out,
    possible,
    screen,
    swapped,
)
from bimedix_jax.routing.knockout_effects import interactions, report
from bimedix_jax.routing.recording import Manifest
from bimedix_jax.routing.report.knockouts import read_interactions
from bimedix_jax.routing.sequences import Sequences, sequences_of
from bimedix_jax.routing.stats import holm
from bimedix_jax.routing.watch import Watch

LAYER, EXPERT = 1, 2


@pytest.fixture(autouse=True)
def quick_kernels():
    """Kernels that compile fast; what they compute is tested elsewhere."""
    with backends.use(expert_mlp="composed", grouped_matmul="ragged_dot"):
        yield


@pytest.fixture(scope="module")
def model() -> Mixtral:
    return init_random(TINY, seed=3, std=0.3)


def sequences(count: int = 24) -> Sequences:
    """Half English, half Arabic; the first tokens are the prompt."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 300, length).astype(np.int32) for length in rng.integers(6, 14, count)]
    answer = [np.arange(len(row)) >= 4 for row in ids]
    roles = np.full(4, ROLES.index("prompt"), np.uint8)
    sources = [Source(f"r{row}", ("en", "ar")[row % 2], ("qa", "chat")[row % 4 // 2], roles) for row in range(count)]
    return Sequences(ids=ids, answer=answer, sources=sources)


@pytest.fixture(scope="module")
def measured(model: Mixtral) -> Measured:
    with backends.use(expert_mlp="composed", grouped_matmul="ragged_dot"):
        every, _ = screen(model, sequences(), None)
        return knock_out(model, sequences(), list(cells_of(every, MEANINGS)))


def nats(model: Mixtral, plan: RoutingPlan | None = None) -> np.ndarray:
    """[R, 2]: nats of answers and prompts."""
    text, found = sequences(), np.zeros((24, 2))
    for row, logprobs_T, _ in score(model, text.ids, plan=plan):
        found[row] = [-logprobs_T[4:].sum(), -logprobs_T[:4].sum()]
    return found


def swap_plan(model: Mixtral) -> RoutingPlan:
    """The model's own routes in LAYER, with EXPERT replaced by the next one that the token does not use."""
    text = sequences()
    shape = (2, len(text.ids), max(text.lengths), 2)
    experts, weights = np.full(shape, -1, np.int32), np.full(shape, -1, np.float32)
    for row, _, routing in score(model, text.ids, record="choices"):
        assert routing is not None
        for position in range(len(text.ids[row])):
            own = list(map(int, routing.experts_LBTK[LAYER, 0, position]))
            free = next(e % 4 for e in range(EXPERT + 1, EXPERT + 4) if e % 4 not in own)
            experts[LAYER, row, position] = [free if e == EXPERT else e for e in own]
            weights[LAYER, row, position] = routing.weights_LBTK[LAYER, 0, position]
    return RoutingPlan(experts_LBTK=jnp.asarray(experts), weights_LBTK=jnp.asarray(weights))


def test_each_meaning_is_what_it_says(model: Mixtral, measured: Measured) -> None:
    silent = nnx.merge(*nnx.split(model), copy=True)
    w2 = silent.layers.moe.w2
    for matrix in [w2.w] if w2.lora is None else [w2.w, w2.lora.b]:
        matrix.set_value(matrix.get_value().at[LAYER, EXPERT].set(0))
    own_R2 = nats(model)
    expected = {
        "silence": nats(silent),
        "ban": nats(model, RoutingPlan.ban(model.config, EXPERT, LAYER)),
        "swap": nats(model, swap_plan(model)),
    }
    np.testing.assert_allclose(measured.nll_R2, own_R2, atol=1e-4)
    for meaning, nats_R2 in expected.items():
        change_R2 = measured.change_CR2[measured.cells.index(Cell(LAYER, EXPERT, meaning))]  # pyright: ignore
        np.testing.assert_allclose(change_R2, nats_R2 - own_R2, atol=1e-4)
        assert np.abs(change_R2).max() > 0.01
    assert measured.tokens_R2[:, PROMPT].tolist() == [3.0] * 24, "the first token is never scored"


EVERYWHERE = ("q", "o", "w1", "w2", "w3", "router", "lm_head")


@pytest.mark.parametrize(
    ("variant", "targets"),
    [
        ("topk", ("q", "v")),
        ("topk", ("w1", "w2", "w3")),
        ("softmax_topk", ("router",)),
        ("softmax_topk", EVERYWHERE),
        ("sigmoid_bias", ("w2", "router")),
        ("sigmoid_bias", EVERYWHERE),
    ],
)
def test_every_router_variant_and_adapter(variant: str, targets: tuple[str, ...]) -> None:
    """Against separate models and plans, for one layer; a router's state decides too, where a variant has one."""
    base = with_router(init_random(TINY, seed=3, std=0.3), RouterConfig(num_experts=4, top_k=2, variant=variant))
    if (state := base.layers.moe.state) is not None:
        state.set_value(0.2 * jax.random.normal(jax.random.key(5), state.get_value().shape))
    tuned = add_lora(base, LoraConfig(rank=2, alpha=2.0, targets=targets), seed=1)
    for number, layer in enumerate(linears(tuned).values()):
        if layer.lora is not None:
            b = layer.lora.b
            b.set_value(0.3 * jax.random.normal(jax.random.key(number), b.get_value().shape))
    assert not np.allclose(nats(tuned), nats(base))
    test_each_meaning_is_what_it_says(tuned, knock_out(tuned, sequences(), list(cells_of([(LAYER, EXPERT)], MEANINGS))))


def test_layers_before_the_cell_are_not_run_again(model: Mixtral, measured: Measured) -> None:
    """Cells give the same alone and among others, and a call that starts at a layer equals a whole call."""
    places = [cell for cell in measured.cells if cell.layer == LAYER]
    found = knock_out(model, sequences(), places[::-1])
    rows = [measured.cells.index(cell) for cell in found.cells]
    np.testing.assert_array_equal(found.change_CR2, measured.change_CR2[rows])
    text = sequences(2)
    tokens_BT = np.stack([row[:6] for row in text.ids])
    with pytest.raises(ValueError, match="starts at a later layer"):
        model.hidden(tokens_BT, record="choices", start=Start(jnp.int32(1), jnp.zeros((2, 6, 16))))
    out = model.hidden(tokens_BT, record="choices", observe=Watch(before=True))
    for layer in range(2):
        later = model.hidden(tokens_BT, start=Start(jnp.int32(layer), out.observed["before"][layer]))
        np.testing.assert_allclose(later.hidden_BTD, out.hidden_BTD, atol=1e-6)
    changed = model.hidden(tokens_BT, start=Start(jnp.int32(1), 0 * out.observed["before"][1]))
    assert not np.allclose(changed.hidden_BTD, out.hidden_BTD), "the states given are those it begins with"


def test_one_program_runs_all_cells(model: Mixtral, measured: Measured) -> None:
    assert len(measured.cells) == 2 * 4 * 3
    compiled: Any = scoring._logprobs_at
    before = compiled._cache_size()
    knock_out(model, sequences(), measured.cells)
    assert compiled._cache_size() == before


def test_a_swap_is_a_permutation_for_tokens_that_chose_the_expert() -> None:
    chosen_BTK = np.array([[[2, 3], [1, 2], [0, 1], [3, 0]]])
    np.testing.assert_array_equal(swapped(chosen_BTK, 2, 4), [[[2, 1, 0, 3], [0, 1, 3, 2], [0, 1, 2, 3], [0, 1, 2, 3]]])


def test_the_screen_keeps_the_largest_gradients(model: Mixtral, measured: Measured) -> None:
    gradient_RLE = gain_gradients(model, sequences())
    step, text = 1e-2, sequences()
    gain = np.ones((2, 2, 1, 1, 4), np.float32)
    gain[:, LAYER, 0, 0, EXPERT] += [step, -step]
    up, down = (nats(model, RoutingPlan(gain_LBTE=jnp.asarray(x)))[:, ANSWER] for x in gain)
    np.testing.assert_allclose(gradient_RLE[:, LAYER, EXPERT], (up - down) / (2 * step), atol=2e-2)
    kept, left_out = screen(model, text, 3)
    tokens_R = measured.tokens_R2[:, ANSWER]
    size_LE = np.max([np.abs(gradient_RLE[row::2].sum(0) / tokens_R[row::2].sum()) for row in range(2)], axis=0)
    least = min(size_LE[place] for place in kept)
    assert (len(kept), len(left_out.cells)) == (3, 5)
    assert all(size_LE[place] <= least for place in left_out.cells)
    assert screen(model, text, 8)[1].cells == ()
    rows = report(measured, left_out, text)["left_out"]
    assert [(row["layer"], row["expert"]) for row in rows] == list(left_out.cells)
    assert set(rows[0]["gradient"]) == {"ar", "en"}


def test_the_report_has_changes_by_group_and_interactions(measured: Measured) -> None:
    text = sequences()
    found = report(measured, LeftOut(), text)
    groups = ["ar", "ar/chat", "ar/qa", "ar/prompt", "en", "en/chat", "en/qa", "en/prompt"]
    cell = next(x for x in found["cells"] if (x["layer"], x["expert"], x["meaning"]) == (LAYER, EXPERT, "ban"))
    assert list(cell["delta"]) == groups
    place = measured.cells.index(Cell(LAYER, EXPERT, "ban"))
    mean_R = measured.change_CR2[place, :, ANSWER] / measured.tokens_R2[:, ANSWER]
    assert cell["delta"]["ar"] == pytest.approx(mean_R[1::2].mean())
    total = measured.change_CR2[place, 1::2, ANSWER].sum() / measured.tokens_R2[1::2, ANSWER].sum()
    assert cell["delta_by_token"]["ar"] == pytest.approx(total)
    assert cell["low"]["ar"] < cell["delta"]["ar"] < cell["high"]["ar"]
    assert 0 < cell["p_adjusted"]["ar"] <= 1
    assert cell["low"]["ar/qa"] is None, "six records have no interval"
    row = next(x for x in found["interaction"] if (x["layer"], x["expert"], x["meaning"]) == (LAYER, EXPERT, "ban"))
    assert row["groups"] == ["ar", "en"]
    assert row["estimate"] == pytest.approx(mean_R[1::2].mean() - mean_R[::2].mean())
    assert row["low"] < row["estimate"] < row["high"]
    assert row["mde80"] > 0
    few = [row for row in range(24) if row % 2 or row < 6]
    small = dataclasses.replace(
        measured,
        change_CR2=measured.change_CR2[:, few],
        nll_R2=measured.nll_R2[few],
        tokens_R2=measured.tokens_R2[few],
    )
    part = Sequences(
        ids=[text.ids[row] for row in few],
        answer=[text.answer[row] for row in few],
        sources=[text.sources[row] for row in few],
    )
    found = report(small, LeftOut(), part)
    assert {row["p_adjusted"] for row in found["interaction"]} == {None}
    assert found["cells"][0]["p_adjusted"]["ar"] is not None


def test_translations_are_compared_with_each_other(measured: Measured) -> None:
    text = sequences()
    paired = dataclasses.replace(
        text,
        sources=[dataclasses.replace(x, fields={"pair": f"p{row // 2}"}) for row, x in enumerate(text.sources)],
    )
    row = report(measured, LeftOut(), paired)["interaction"][0]
    assert row["paired"]
    assert row["clusters"] == {"ar": 12, "en": 12}
    mean_R = measured.change_CR2[0, :, ANSWER] / measured.tokens_R2[:, ANSWER]
    assert row["estimate"] == pytest.approx((mean_R[1::2] - mean_R[::2]).mean())


def test_p_values_are_adjusted_for_all_cells_and_all_questions() -> None:
    """Three languages are three interactions, of which Holm adjusts the smallest p-value for three."""
    rng, cells = np.random.default_rng(0), (Cell(0, 0, "silence"), Cell(0, 1, "ban"))
    sources = [Source(f"r{row}", ("ar", "en", "fr")[row % 3], "qa") for row in range(45)]
    ids = [np.arange(5, dtype=np.int32)] * 45
    text = Sequences(ids=ids, answer=[np.arange(5) > 0] * 45, sources=sources)
    change_CR2 = rng.normal(size=(2, 45, 2))
    change_CR2[0, ::3] += 1.0
    own = Measured(cells=cells, change_CR2=change_CR2, nll_R2=np.ones((45, 2)), tokens_R2=np.full((45, 2), 4.0))
    found = interactions(own, text, 0)
    assert [one.contrast.name for one in found] == ["language=ar", "language=en", "language=fr"]
    alone = [one.test.p_X for one in found if one.test is not None]
    for one, expected_C in zip(found, holm(alone), strict=True):
        np.testing.assert_array_equal(one.p_C, expected_C)  # pyright: ignore[reportArgumentType]
    least = min(p_C.min() for p_C in alone)
    result = report(own, LeftOut(), text)
    assert min(row["p_adjusted"] for row in result["interaction"]) == pytest.approx(3 * least)
    both = {"cells": 2, "meanings": ["ban", "silence"]}
    groups = ["ar", "ar/prompt", "en", "en/prompt", "fr", "fr/prompt"]
    assert result["families"]["cells"] == both | {"questions": groups}
    assert result["families"]["interaction"]["questions"] == [one.contrast.name for one in found]


def test_only_silence_is_possible_where_tokens_use_all_experts() -> None:
    every = dataclasses.replace(TINY, router=RouterConfig(num_experts=2, top_k=2))
    meanings, lacking = possible(MEANINGS, every)
    assert meanings == ["silence"]
    assert [meaning for meaning, _ in lacking] == ["ban", "swap"]
    assert possible(MEANINGS, TINY) == (list(MEANINGS), [])


def record(number: int, language: str) -> Record:
    question, answer = {"en": ("What helps?", "Rest, {}."), "ar": ("ما العلاج؟", "الراحة {}")}[language]
    return Record(
        id=f"{language}{number}",
        language=language,  # pyright: ignore
        kind="qa",
        source="test",
        licence="Apache-2.0",
        conversations=conversation(question, answer.format(number)),
    )


def test_the_commands_of_the_page(model: Mixtral, tmp_path, monkeypatch, capsys, bytes_tokenizer) -> None:
    """They run as docs/routing.md has them, on few records and a screen that leaves experts out."""
    export_hf(model, tmp_path / "runs/noisy", tokenizer_from=bytes_tokenizer.folder)
    save_adapter(add_lora(model, LoraConfig(rank=2, alpha=2.0, targets=("router",))), tmp_path / "runs/tuned/adapter")
    write_jsonl(tmp_path / "few", [record(number, language) for number in range(10) for language in ("en", "ar")])
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).resolve().parents[2] / "docs/routing.md").read_text("utf-8")
    commands = [line.split()[1:] for line in page.splitlines() if line.startswith("bimedix routes knockout")]
    results = []
    for words in commands:
        words = [{"sample": "few", "16": "2"}.get(word, word) for word in words if word != "--json"]
        assert cli.main([*words, "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    screened, silenced = results
    assert len(screened["cells"]) == len(screened["interaction"]) == 2 * len(MEANINGS)
    assert len(screened["left_out"]) == 6
    largest = min(max(map(abs, cell["gradient"].values())) for cell in screened["cells"])
    assert largest >= max(max(map(abs, row["gradient"].values())) for row in screened["left_out"])
    formats = (Path(__file__).resolve().parents[2] / "docs/formats.md").read_text("utf-8")
    assert all(f"`{key}" in formats for key in (*screened, "cells[].gradient")), "formats.md has every key"
    assert json.loads(Path("knockout.json").read_text())["cells"] == screened["cells"]
    assert screened["manifest"]["hashes"]["adapter"] is None
    assert silenced["manifest"]["hashes"]["adapter"] is not None
    assert {cell["meaning"] for cell in silenced["cells"]} == {"silence"}
    assert len(silenced["cells"]) == 8
    assert set(silenced["cells"][0]["delta"]) == {"en", "en/prompt", "ar", "ar/prompt"}
    assert all(row["p_adjusted"] is not None for row in silenced["interaction"])
    known = Manifest.model_construct(hashes=dict(screened["manifest"]["hashes"]), experts=4)
    recording: Any = SimpleNamespace(
        manifest=known, layer_numbers=[0, 1], folder="R", groups=lambda: {"language": None}
    )
    found = read_interactions(Path("knockout.json"), recording)
    assert {(one.layer, one.expert) for one in found} == {(x["layer"], x["expert"]) for x in screened["cells"]}
    assert found[0].p_adjusted == min(row["p_adjusted"] for row in screened["interaction"])
    known.hashes["data"] = "0" * 64
    with pytest.raises(BimedixError, match="was made with another data"):
        read_interactions(Path("knockout.json"), recording)
    console = io.StringIO()
    Console(file=console, width=140).print(routes_knockout.knockout_table(screened))
    assert "6 were left out" in console.getvalue()
    console = io.StringIO()
    Console(file=console, width=80).print(routes_knockout.knockout_table(screened))
    assert "ar - en" in console.getvalue().splitlines()[3], "a table, where the terminal has 80 columns"
    one = screened | {"interaction": []}
    Console(file=console, width=80).print(routes_knockout.knockout_table(one))
    assert "it needs records in two languages" in " ".join(console.getvalue().split())
    assert cli.main([*commands[0], "--json"]) == 1
    assert "knockout.json exists" in json.loads(capsys.readouterr().out)["error"]
    assert cli.main(["routes", "knockout", "--model", "m", "--data", "few", "--screen", "0"]) == 1
    with pytest.raises(BimedixError, match="2 records have the id en0"):
        sequences_of([record(0, "en"), record(0, "en")], bytes_tokenizer, 100)
