"""Which questions a model answered right, for `--answers`, and the section of the page about answers and routes."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from bimedix_jax import files
from bimedix_jax.errors import BimedixError
from bimedix_jax.routing.answers import CLAIM, DIFFERENT, SAME
from bimedix_jax.routing.formats.jsonl import lines_of
from bimedix_jax.routing.recording import Recording
from bimedix_jax.routing.report import figures
from bimedix_jax.routing.report.contents import Contents
from bimedix_jax.routing.report.figures import Mark
from bimedix_jax.routing.report.sheets import interval, number, table, words

PREDICTIONS = ".predictions.jsonl"
"""The end of the name of what `bimedix eval run --out` writes beside its result."""
REMEDY = "name a file that `bimedix eval run --out` wrote, or JSON lines with an id and correct"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenAnswers:
    """Whether a question was answered right, by the id of its record; `path` is the file that says so."""

    path: Path
    correct: Mapping[str, bool]
    warnings: tuple[str, ...] = ()


def read_answers(path: Path, recording: Recording) -> GivenAnswers:
    """The answers in NAME.predictions.jsonl, or in the one of a result NAME.json; or JSON lines of `id` and `correct`.

    Raises:
      BimedixError: a line is not an answer, an id has two, none is of a record, or they are of another tokenizer.
    """
    result = path if "predictions" in files.peek_json(path) else None
    if result is not None:
        path = files.inside(path.parent, str(files.peek_json(path)["predictions"]["file"]))
    elif path.name.endswith(PREDICTIONS):
        result = path.with_name(f"{path.name.removesuffix(PREDICTIONS)}.json")
    correct: dict[str, bool] = {}
    for where, line in lines_of(path):
        name, value = line.get("id"), line.get("correct")
        if not isinstance(name, str) or value not in (0, 1):
            raise BimedixError(f"{where} has no id and correct (true or false); {REMEDY}")
        if correct.setdefault(name, bool(value)) != bool(value):
            raise BimedixError(f"{where} has another answer to {name!r} than a line before; give one task at a time")
    if not set(correct) & set(recording.records["id"]):
        raise BimedixError(f"{path} answers no record of {recording.folder}; record and evaluate the same file")
    return GivenAnswers(path=path, correct=correct, warnings=_checked(result, path, recording))


def _checked(result: Path | None, path: Path, recording: Recording) -> tuple[str, ...]:
    """What does not tell that answers and routes are of the same model. Raises BimedixError for another tokenizer."""
    known = {} if result is None else files.peek_json(result)
    manifest = recording.manifest
    tokenizers = known.get("tokenizer"), manifest.hashes.get("tokenizer")
    if None not in tokenizers and tokenizers[0] != tokenizers[1]:
        raise BimedixError(f"{path} was made with another tokenizer than {recording.folder}; evaluate the same model")
    models = known.get("model"), manifest.options.get("model")
    if None in models:
        return (f"nothing tells whether the answers in {path.name} are of the model whose routes were recorded",)
    if models[0] != models[1]:
        return (f"the answers in {path.name} are of the model {models[0]}, but the routes are of {models[1]}",)
    return ()


def answers_sentence(contents: Contents, row: int) -> str:
    """The verdict on the question of answers and routes, as HTML."""
    sheet = contents.questions
    level, what = sheet.value(row, "level"), "the routes of its two languages are further apart or closer together"
    asked = f"Whether a question has {DIFFERENT} where {what}"
    if level is None:
        [at] = contents.refused.where(claim=CLAIM)
        return f"{asked}: {words(contents.refused, at, 'why')}."
    if level == "none":
        power = contents.settings.shown("power", ".0f", 100)
        least, most = (number(sheet, row, end, ".2g") for end in ("mde80_least", "mde80_most"))
        return (
            f"{asked} is <b>not resolved</b>: no layer differs significantly. A difference in squared distance of "
            f"{least} to {most}, depending on the layer, would have been found with a probability of {power} %."
        )
    largest = interval(sheet, row, ("largest", "largest_low", "largest_high"), "+.2g")
    return (
        f"<b>Association</b>: in {number(sheet, row, 'different', 'd')} of {number(sheet, row, 'family', 'd')} layers, "
        f"the squared distance of the routes differs between pairs with {DIFFERENT} and pairs with {SAME}. The largest "
        f"difference is {largest}, in layer {words(sheet, row, 'largest_layer')}. This does not say why."
    )


def answers_table(contents: Contents, places: list[int]) -> str:
    """The difference in each layer."""
    sheet, means = contents.cells, contents.answers
    head = ("layer", f"pairs with {DIFFERENT}", SAME, "difference", "p adjusted", "detectable", "verdict")
    rows = []
    for at in places:
        [mean] = means.where(layer=sheet.value(at, "layer"))
        rows.append(
            (
                words(sheet, at, "layer"),
                number(means, mean, "differ", ".2g"),
                number(means, mean, "agree", ".2g"),
                interval(sheet, at, ("estimate", "low", "high"), "+.2g"),
                number(sheet, at, "p_adjusted", ".3g"),
                number(sheet, at, "mde80", ".2g"),
                words(sheet, at, "verdict"),
            )
        )
    return table(head, rows)


def answers_plot(contents: Contents, places: list[int], figure: int) -> str:
    """The difference in each layer, as SVG."""
    sheet = contents.cells
    marks = []
    for at in places:
        estimate, low, high = (sheet.value(at, name) for name in ("estimate", "low", "high"))
        marks.append(Mark(value=estimate, low=low, high=high, at=f"{sheet.name} {at} estimate"))
    names = [words(sheet, at, "layer") for at in places]
    title = "difference in squared distance of the routes by layer"
    return figures.columns_plot(contents.axes, figure, names, [("difference", marks)], title)
