"""The commands of docs/routing.md, from a question to a figure, run as they are written, on fewer records."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
from tiny import tiny

from bimedix_jax import cli
from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.data.records import (
    Language,
    Record,
    conversation,
    multiple_choice_answer,
    multiple_choice_question,
    write_jsonl,
)
from bimedix_jax.data.tokenizer import byte_tokenizer
from bimedix_jax.kernels import backends
from bimedix_jax.models.init import init_random
from bimedix_jax.routing.answers import NAME as ANSWERS
from bimedix_jax.routing.claims import LEVELS, Analysis, Cell, Claim, Exploration, Gate, Layer, Question, Refusal

PAGE = Path(__file__).resolve().parents[2] / "docs/routing.md"
CONFIG = tiny(max_position_embeddings=4096)


def section(title: str) -> str:
    text = PAGE.read_text("utf-8")
    return re.split(r"^## ", text, flags=re.MULTILINE)[re.findall(r"^## (.*)$", text, re.MULTILINE).index(title) + 1]


def commands(text: str) -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def translated(number: int, language: Language) -> Record:
    """A question with four options, which the other language has in another order."""
    asked = {"en": "Which one? Case", "ar": "أي واحد؟ الحالة"}[language]
    choices = tuple("abcd"[(number + place) % 4] * 3 for place in range(4))
    answer = (number if language == "en" else number // 4) % 4
    turns = multiple_choice_question(f"{asked} {number}", choices), multiple_choice_answer(choices, answer, language)
    return Record(
        id=f"{language}{number}",
        language=language,
        kind="mcqa",
        source="test",
        licence="none",
        split="heldout",
        conversations=conversation(*turns),
        choices=choices,
        answer=answer,
        provenance={"pair": f"q{number}"},
    )


def test_from_a_question_to_a_figure(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    for seed, name in enumerate(("noisy", "tuned")):
        model = init_random(CONFIG, seed=seed, dtype="bfloat16", std=0.2)
        export_hf(model, tmp_path / "runs" / name, tokenizer_from=tokenizer.folder)
    pairs = [translated(number, language) for number in range(40) for language in ("en", "ar")]
    write_jsonl(tmp_path / "translated.jsonl", pairs)
    monkeypatch.chdir(tmp_path)
    Path("DATA").mkdir()
    with Path("DATA/tico19_en_ar.jsonl").open("w") as file:
        for number in range(24):
            texts = {"en": f"Wash your hands {number} times.", "ar": f"اغسل يديك {number} مرات."}
            file.write(json.dumps({"id": f"wiki_{number // 2}:{number}", "source": "u", **texts}) + "\n")
    text = section("From a question to a figure")
    with backends.use(expert_mlp="composed", grouped_matmul="ragged_dot"):
        for program, *words in commands(text):
            fewer = ["--limit", "40"] if words[:2] == ["routes", "record"] and "sample" in words else []
            assert (program, cli.main([*words, *fewer])) == ("bimedix", 0), words
    claims = json.loads(Path("runs/report/claims.json").read_text())
    assert claims["gate"]["diverged"] is not None
    assert claims["hashes"]["baseline"] is not None
    assert [question["name"] for question in claims["questions"]] == ["language"]
    assert claims["questions"][0]["layers"][0]["geometry_percentile"] is not None
    theirs = json.loads(Path("runs/theirs-report/claims.json").read_text())
    assert theirs["unit"] == "record"
    answered = json.loads(Path("runs/answers/claims.json").read_text())
    assert answered["hashes"]["answers"] is not None
    assert all("with fewer than" in text for text in answered["warnings"]), "the answers are of the recorded model"
    question = answered["questions"][-1]
    assert (question["name"], question["unit"], sum(question["clusters"].values())) == (ANSWERS, "pair", 40)
    assert question["level"] in ("none", "association")
    tico = json.loads(Path("runs/pairs-report/claims.json").read_text())
    assert (tico["unit"], tico["questions"][0]["paired"]) == ("document", True)
    assert tico["questions"][0]["clusters"]["ar"] == 12
    first, second = (found["questions"][0]["cells"][0]["estimate"] for found in (claims, theirs))
    assert first == pytest.approx(second)


def test_the_levels_of_the_page_are_those_of_the_claims():
    assert tuple(re.findall(r"^\| `(\w+)` \|", section("From a question to a figure"), re.MULTILINE)) == LEVELS[1:]


def test_the_keys_of_claims_are_listed():
    def keys(kind: type, prefix: str = "") -> set[str]:
        return {f"{prefix}{field.name}" for field in dataclasses.fields(kind)}

    text = (PAGE.parent / "formats.md").read_text("utf-8")
    text = re.split(r"^## ", text.split("\n## claims.json\n")[1], flags=re.MULTILINE)[0]
    listed = [key for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for key in re.findall(r"`(.+?)`", row)]
    expected = keys(Analysis) | {"unit", "hashes", "command", "version"}  # what write_report adds
    expected |= keys(Gate, "gate.") | keys(Question, "questions[].")
    expected |= keys(Cell, "questions[].cells[].") | keys(Layer, "questions[].layers[].")
    expected |= keys(Claim, "claims[].") | keys(Refusal, "refused[].") | keys(Exploration, "exploration[].")
    expected -= {"questions", "questions[].cells", "questions[].layers", "claims", "refused", "exploration"}
    assert len(listed) == len(set(listed))
    assert set(listed) == expected


def test_the_file_of_knock_outs_is_read_as_it_is_described():
    from bimedix_jax.routing.report.knockouts import KnockoutFile

    [example] = re.findall(r"^```json\n(.*?)^```$", section("From a question to a figure"), re.MULTILINE | re.DOTALL)
    assert KnockoutFile.model_validate_json(example).interactions[0].expert == 3
