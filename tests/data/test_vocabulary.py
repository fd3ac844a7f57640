"""A tokenizer that does not fit the model raises in every command, and an id out of range in every function."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny

from bimedix_jax import cli
from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.checkpoint.store import save
from bimedix_jax.data.pack import Row
from bimedix_jax.data.records import Record, conversation
from bimedix_jax.data.tokenizer import byte_tokenizer, load_tokenizer
from bimedix_jax.data.vocabulary import outside, require_fit, vocab_size_of
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.heldout import heldout_loss
from bimedix_jax.evals.multiple_choice import multiple_choice
from bimedix_jax.inference.generate import generate
from bimedix_jax.models.init import init_random
from bimedix_jax.routing.drift import observe
from bimedix_jax.routing.load import expert_load
from bimedix_jax.training.interventions import StepPlans
from bimedix_jax.training.loop import measure_heldout

CONFIG = tiny(vocab_size=256, num_layers=1, experts=2, top_k=1)
"""A model with fewer rows than the byte tokenizer's 304 ids."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def small():
    return init_random(CONFIG)


@pytest.fixture(scope="module")
def folder(small, tokenizer, tmp_path_factory):
    """The small model's configuration and the tokenizer, without weights: errors are raised before they are loaded."""
    place = export_hf(small, tmp_path_factory.mktemp("model") / "hf", tokenizer_from=tokenizer.folder)
    (place / "model.safetensors").unlink()
    return place


@pytest.fixture(scope="module")
def records():
    turns = conversation("Is anaemia common?", "Answer: A. yes")
    common = {"id": "1", "language": "en", "source": "test", "licence": "CC0-1.0", "conversations": turns}
    return [Record(kind="mcqa", choices=("yes", "no"), answer=0, **common)]


def test_a_tokenizer_fits_a_vocabulary_that_is_at_least_as_large(tokenizer):
    for vocab_size in (304, 320, None):
        require_fit(tokenizer, vocab_size, "M")
    with pytest.raises(BimedixError, match=r"up to 303, but M has 303 embedding rows; use tokenizer and weights"):
        require_fit(tokenizer, 303, "M")
    with pytest.raises(BimedixError, match=r"up to 303 \(bos, eos, pad included\), but M has 256"):
        require_fit(tokenizer, 256, "M")


def test_added_tokens_and_stop_tokens_count(tmp_path):
    byte_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [258, 999]}')
    with pytest.raises(BimedixError, match=r"up to 999 \(stop token 999 included\)"):
        require_fit(load_tokenizer(tmp_path), 304, "M")
    (tmp_path / "generation_config.json").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    added = {"304": {"content": "<extra>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": added}))
    with pytest.raises(BimedixError, match="up to 304, but M has 304"):
        require_fit(load_tokenizer(tmp_path), 304, "M")


def test_the_vocabulary_is_read_from_the_configuration_alone(small, folder, tmp_path):
    assert vocab_size_of(folder) == 256
    assert vocab_size_of(save(small, tmp_path / "native")) == 256
    (tmp_path / "config.json").write_text("{")
    assert vocab_size_of(tmp_path) is vocab_size_of(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "run", "--model", "MODEL", "--heldout", "sample"],
        ["chat", "--model", "MODEL", "--prompt", "hello", "--max-new-tokens", "8"],
        ["data", "pack", "--records", "sample", "--tokenizer", "MODEL", "--out", "OUT", "--workers", "0"],
        ["export", "MODEL", "--out", "OUT", "--tokenizer-from", "MODEL"],
    ],
)
def test_a_tokenizer_of_another_model_raises_in_every_command(words: list[str], folder, tmp_path, capsys):
    places: dict[str, str] = {"MODEL": str(folder), "OUT": str(tmp_path / "out")}
    assert cli.main([places.get(word, word) for word in words]) == 1
    captured = capsys.readouterr()
    assert "has 256 embedding rows; use tokenizer and weights of the same model" in captured.err
    assert "nan" not in captured.out
    assert not (tmp_path / "out").exists()


def test_an_id_that_the_model_lacks_raises_in_every_function(small, tokenizer, records):
    for function in (heldout_loss, multiple_choice, expert_load):
        with pytest.raises(BimedixError, match="token id 257 is outside the vocabulary of 256"):
            function(small, tokenizer, records)
    for wrong in (256, -1):
        with pytest.raises(BimedixError, match=f"token id {wrong} is outside"):
            observe(small, [("en", [1, wrong])])
        with pytest.raises(BimedixError, match=f"token id {wrong} is outside"):
            generate(small, [1, wrong], 1)


def test_heldout_rows_of_a_training_run_are_checked_too(monkeypatch):
    from bimedix_jax.training import loop

    row = Row(np.array([256]), np.array([1]), np.array([True]), ())
    monkeypatch.setattr(loop, "heldout_batches", lambda experiment: [[row]])
    nothing: Any = None
    plans, others = StepPlans(nothing, nothing, nothing, nothing, nothing), (nothing,) * 5
    with pytest.raises(BimedixError, match="token id 256 is outside"):
        measure_heldout(*others, vocab_size=256, plans=plans)


def test_the_first_id_out_of_range():
    assert outside([[0, 3], np.array([[1, 2]])], 4) is None
    assert outside([[], [0, 4], [-1]], 4) == 4
    assert outside([[-1, 4]], 4) == -1


def test_a_model_that_computes_nan_gets_no_result(tokenizer, records):
    broken = init_random(dataclasses.replace(CONFIG, vocab_size=304))
    broken.norm.scale.set_value(jnp.full_like(broken.norm.scale.get_value(), jnp.nan))
    with pytest.raises(BimedixError, match="loss of en, en/mcqa is not finite"):
        heldout_loss(broken, tokenizer, records)
    with pytest.raises(BimedixError, match="likelihood of question 1 is not finite"):
        multiple_choice(broken, tokenizer, records)


def test_a_training_run_has_the_size_of_its_model_and_names_its_bases_tokenizer(tokenizer, tmp_path):
    base = tokenizer.folder
    for name, model, message in (
        ("random", {"random": {"vocab_size": 7}, "path": None}, "its data were packed"),
        ("folder", {"random": None, "path": str(base)}, f"pass `--tokenizer {base}`"),
        ("hub", {"random": None, "path": "a/b"}, "a folder with that of a/b"),
    ):
        run = tmp_path / name
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"optimiser": {}, "model": model}))
        assert vocab_size_of(run) == (7 if name == "random" else None)
        with pytest.raises(BimedixError, match=f"is a training run, which has no tokenizer; .*{message}"):
            load_tokenizer(run)
    with pytest.raises(BimedixError, match="does not exist; name a folder"):
        load_tokenizer(tmp_path / "none")
