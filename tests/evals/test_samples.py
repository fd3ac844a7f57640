"""The file of samples: written line by line, read back, and continued after a kill."""

import dataclasses

import pytest

from bimedix_jax.errors import BimedixError
from bimedix_jax.evals import samples
from bimedix_jax.evals.samples import Sample

ONE = Sample(
    task="t", id="q1", language="ar", target=1, logprobs=(-1.5, -0.25), logprobs_per_byte=(-0.5, -0.125), chosen=1,
    correct=True, scores={"acc": 1.0}, subject="anatomy", flags=("doses",),
)  # fmt: skip
TWO = Sample(task="t", id="q2", language="en", filter="letter", target="نعم", chosen="لا", correct=False, answer="لا")


def test_samples_are_read_as_they_were_written(tmp_path):
    with samples.writer(tmp_path / samples.NAME) as file:
        file.write([ONE, TWO])
    assert samples.read(tmp_path) == [ONE, TWO]
    assert "نعم" in (tmp_path / samples.NAME).read_text("utf-8")  # Arabic is not escaped


def test_a_cut_off_line_is_left_out_and_overwritten(tmp_path):
    path = tmp_path / samples.NAME
    path.write_text(ONE.to_json() + "\n" + TWO.to_json()[:20], "utf-8")
    assert samples.read(path) == [ONE]
    with samples.writer(path, append=True) as file:
        file.write([TWO])
    assert samples.read(path) == [ONE, TWO]


def test_predictions_of_eval_run_are_samples(tmp_path):
    path = tmp_path / "x.predictions.jsonl"
    path.write_text(
        '{"set": "medqa", "id": "m1", "language": "en", "groups": ["en", "en/surgery"], "answer": 0, "chosen": 1, '
        '"chosen_by_text": 0, "correct": false, "letter_logprobs": [-2, -1], "text_logprobs": [-9, -8]}\n'
    )
    (found,) = samples.read(path)
    assert (found.task, found.subject, found.correct, found.logprobs) == ("medqa", "surgery", False, (-2, -1))
    assert found.scores == {"acc": 0.0, "acc_bytes": 1.0}


@pytest.mark.parametrize("line", ["[1]", "{", '{"task": "t"}', '{"task": "t", "surprise": 1}'])
def test_other_lines_raise(tmp_path, line):
    (tmp_path / samples.NAME).write_text(line + "\n")
    with pytest.raises(BimedixError, match=r"samples.jsonl:1"):
        samples.read(tmp_path)


def test_not_a_number_is_not_written():
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(ONE, logprobs=(float("nan"), 0.0)).to_json()
