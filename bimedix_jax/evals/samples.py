"""The result of every question, as JSON Lines: what `bimedix eval harness` writes and comparisons of models read.

One line is one question of one task under one filter. A line is written as soon as its question is scored, so a file
that a killed run leaves behind is complete up to its last line, which may be cut off; `read` leaves such a line out.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bimedix_jax.errors import BimedixError

NAME = "samples.jsonl"
"""The file in a folder of results."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One question of a task.

    Attributes:
      task: name of the task, such as "bimedix_medmcqa_ar".
      id: of the question in its data set; equal in the English and the Arabic version of a question.
      language: "en" or "ar", the language of the question.
      filter: what was done to the model's output: "none", or the name of the answer extraction of a generative task.
      target: index of the right option, or the expected text.
      logprobs: log p of each option in nats; None if the answer was generated.
      logprobs_per_byte: the same divided by the UTF-8 bytes of each option's text.
      chosen: index of the option that the task's primary metric chooses, or the extracted answer.
      correct: whether that is right.
      scores: every metric of the task for this question, such as {"acc": 1.0, "acc_bytes": 0.0}.
      subject: subject or specialty, if it is known.
      flags: problems of the question's text, such as those of its translation; empty for a sound question.
      prompt_sha256: hash of the prompt's text.
      answer: the generated text.
      asked_bytes: UTF-8 bytes of the question as it is asked.
      pair: id that a question has in common with its translation; None: its id.
    """

    task: str
    id: str
    language: str
    filter: str = "none"
    target: int | str
    logprobs: tuple[float, ...] | None = None
    logprobs_per_byte: tuple[float, ...] | None = None
    chosen: int | str | None = None
    correct: bool
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    subject: str | None = None
    flags: tuple[str, ...] = ()
    prompt_sha256: str | None = None
    answer: str | None = None
    asked_bytes: int | None = None
    pair: str | None = None

    def to_json(self) -> str:
        """One line of JSON without its newline; fields that are None are left out."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return json.dumps(fields, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any], where: str) -> "Sample":
        """The sample in one line, as `to_json` wrote it.

        Raises:
          BimedixError: it has other fields; the message begins with `where`.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        required = {"task", "id", "language", "target", "correct"}
        if set(row) - known or required - set(row):
            wrong = sorted(set(row) - known) + sorted(f"no {name}" for name in required - set(row))
            raise BimedixError(f"{where} is not a result of a question ({', '.join(wrong)}); name a {NAME}")
        lists = {name: tuple(row[name]) for name in ("logprobs", "logprobs_per_byte", "flags") if name in row}
        return cls(**{**row, **lists})


def of_prediction(row: Mapping[str, Any]) -> Sample:
    """A line of NAME.predictions.jsonl, which `bimedix eval run` writes, as a sample. Its primary metric is by letter
    where the options have letters, else by the log-likelihood of the option's text."""
    letters, texts = row.get("letter_logprobs"), row["text_logprobs"]
    subject = next((group.split("/", 1)[1] for group in row["groups"] if "/" in group), None)
    return Sample(
        task=row["set"],
        id=row["id"],
        language=row["language"],
        target=row["answer"],
        logprobs=tuple(texts if letters is None else letters),
        chosen=row["chosen"],
        correct=bool(row["correct"]),
        scores={"acc": float(row["correct"]), "acc_bytes": float(row["chosen_by_text"] == row["answer"])},
        subject=subject,
        asked_bytes=row.get("asked_bytes"),
        pair=row.get("pair"),
    )


@contextmanager
def writer(path: str | os.PathLike[str], append: bool = False) -> Iterator["Writer"]:
    """Opens a file of samples, new or to continue; a line that a kill cut off is removed first."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if append and target.exists():
        whole = target.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            os.truncate(target, end)
    with target.open("a" if append else "w", encoding="utf-8", newline="\n") as file:
        yield Writer(file)


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writes samples; each call reaches the disk before it returns."""

    file: IO[str]

    def write(self, samples: Iterable[Sample]) -> None:
        """Appends samples, in order."""
        self.file.write("".join(sample.to_json() + "\n" for sample in samples))
        self.file.flush()
        os.fsync(self.file.fileno())


def read(path: str | os.PathLike[str]) -> list[Sample]:
    """The samples of a file, or of the file NAME in a folder. Reads NAME.predictions.jsonl of `bimedix eval run` too.

    Raises:
      BimedixError: there is no such file, or a line is something else; a last line without its newline is left out.
    """
    source = Path(path) / NAME if Path(path).is_dir() else Path(path)
    if not source.is_file():
        raise BimedixError(f"there is no {source}; name a {NAME}, which `bimedix eval harness --out` writes")
    lines = source.read_text("utf-8").split("\n")[:-1]
    return [_parsed(line, f"{source}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _parsed(line: str, where: str) -> Sample:
    try:
        row = json.loads(line, parse_constant=_refused)
    except ValueError as error:
        raise BimedixError(f"{where} is not valid JSON ({error}); name a {NAME}") from None
    if not isinstance(row, dict):
        raise BimedixError(f"{where} is not a JSON object; name a {NAME}")
    if not {"set", "chosen_by_text"} <= set(row):
        return Sample.from_dict(row, where)
    try:
        return of_prediction(row)
    except (KeyError, TypeError, ValueError) as error:
        raise BimedixError(f"{where} is not a prediction of `bimedix eval run` ({error}); evaluate again") from None


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def per_byte(logprobs: Sequence[float], texts: Sequence[str]) -> tuple[float, ...]:
    """log p of each option divided by the UTF-8 bytes of its text."""
    return tuple(value / len(text.encode()) for value, text in zip(logprobs, texts, strict=True))
