"""`bimedix data check`: pairs that one already has, as texts or records, and what a file of pairs teaches."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from bimedix_jax.cli import main
from bimedix_jax.curation.checks import alignment, pairs
from bimedix_jax.curation.checks.related import Corpus
from bimedix_jax.curation.checks.segments import Segments, of_objects
from bimedix_jax.data import records
from bimedix_jax.errors import BimedixError

QUESTION = {"en": "Which of the following drugs lowers blood pressure?", "ar": "أي من الأدوية التالية يخفض ضغط الدم؟"}
CHOICES = {
    "en": ["Captopril", "Aspirin 5 mg", "Insulin", "None of the above"],
    "ar": ["كابتوبريل", "أسبرين 5 ملغ", "الأنسولين", "لا شيء مما سبق"],
}


def exam(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        side: {"question": QUESTION[side], "choices": list(CHOICES[side]), "answer": 0} for side in ("en", "ar")
    }
    row["ar"] |= changes
    return row


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


SOUND = [
    {"en": "He is 45 years old.", "ar": "عمره 45 عاما."},
    exam(),
    {side: {"question": QUESTION[side], "options": dict(zip("ABCD", CHOICES[side], strict=True))}
     for side in QUESTION},
    {side: {"question": QUESTION[side], "choices": [{"text": t, "label": "A"} for t in CHOICES[side]]}
     for side in QUESTION},
    {side: {"question": QUESTION[side], "choices": {"text": CHOICES[side], "label": list("ABCD")}}
     for side in QUESTION},
    {"en": {"choices": [1, 2.5]}, "ar": {"choices": ["١", "٢٫٥"]}},
]  # fmt: skip


def test_sound_pairs_of_every_shape_raise_no_flag(tmp_path):
    checked = pairs.check_file(write(tmp_path / "p.jsonl", SOUND))
    assert [(row.line, row.flags) for row in checked] == [(line, ()) for line in range(1, len(SOUND) + 1)]


@pytest.mark.parametrize(
    ("name", "place", "row"),
    [
        ("latin_words", "question", exam(question="كيف يتم ضبط إعدادات HTTP؟")),
        ("unrelated", "question", exam(question="أي المدن التي تقع على الساحل أكبر؟")),
        ("options", None, exam(choices=CHOICES["ar"][:3])),
        ("options", "choice B", exam(choices=["كابتوبريل", " ", "الأنسولين", "لا شيء مما سبق"])),
        ("options", None, exam(choices=["كابتوبريل", "أسبرين 5 ملغ", "كابتوبريل", "لا شيء مما سبق"])),
        ("answer_key", None, exam(answer=1)),
        ("doses", "choice B", exam(choices=["كابتوبريل", "أسبرين 5 غرام", "الأنسولين", "لا شيء مما سبق"])),
        ("negations", "choice D", exam(choices=["كابتوبريل", "أسبرين 5 ملغ", "الأنسولين", "كل ما سبق"])),
        ("choice_order", None, exam(choices=["الأنسولين", "أسبرين 5 ملغ", "كابتوبريل", "لا شيء مما سبق"])),
        ("length", "question", exam(question="")),
        ("repetition", "question", exam(question=f"{QUESTION['ar']} {QUESTION['ar']}")),
        ("arabic_share", "question", exam(question=QUESTION["en"])),
    ],
)
def test_each_damage_of_a_record_is_flagged_at_its_place(tmp_path, name, place, row):
    (checked,) = pairs.check_file(write(tmp_path / "p.jsonl", [row]))
    assert (name, place) in {(flag.name, flag.place) for flag in checked.flags}


def test_records_of_the_project_are_pairs(tmp_path):
    one = next(record for record in records.sample() if record.language == "en" and record.choices)
    same = one.model_copy(update={"language": "ar"})
    row = {side: json.loads(record.to_json()) for side, record in (("en", one), ("ar", same))}
    (checked,) = pairs.check_file(write(tmp_path / "p.jsonl", [row]))
    assert {"arabic_share", "untranslated"} <= {flag.name for flag in checked.flags}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"en": "a"}, "p.jsonl:1: a pair has the fields en and ar"),
        ({"en": "a", "ar": {"question": "b"}}, "must both be texts"),
        ({"en": {"question": "a"}, "ar": {"choices": ["b"]}}, "en has the text 'question', and ar has not"),
        ({"en": {"choices": "a"}, "ar": {"choices": "b"}}, "choices must be a list"),
        ({"en": {"choices": [["a"]]}, "ar": {"choices": ["b"]}}, "a choice is neither a text nor"),
        ({"en": {"answer": 1}, "ar": {"answer": 1}}, "needs a text"),
        ({"en": {"conversations": []}, "ar": {"conversations": []}}, "id: Field required"),
        ([], "a pair has the fields"),
    ],
)
def test_other_lines_are_errors_that_name_the_line(tmp_path, row, message):
    with pytest.raises(pairs.BimedixError, match=message):
        pairs.check_file(write(tmp_path / "p.jsonl", [row]))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "en,ar\na,b\n", "p.csv is CSV; write JSONL"),
        ("p.txt", "en,ar\na,b\n", "p.txt:1 is not JSON .*; write JSONL"),
        ("p.json", '[{"en": "a", "ar": "b"}]', "the line is a JSON array; write JSONL"),
        ("p.json", '[\n{"en": "a", "ar": "b"}\n]', "p.json is one JSON document over several lines; write JSONL"),
        ("p.json", '[{"en": "a",\n"ar": "b"}]', "one JSON document over several lines"),
        ("p.jsonl", '{"english": "a", "ar": "b"}', "the line is an object with 'english', 'ar'"),
    ],
)
def test_files_of_another_format_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(BimedixError, match=message):
        pairs.check_file(tmp_path / name)


def test_the_command_counts_and_writes_a_line_for_each_pair(tmp_path, capfd):
    file, out = write(tmp_path / "p.jsonl", [*SOUND, {"id": 7, **exam(question="ما هو بروتوكول SSH؟")}]), tmp_path / "o"
    assert main(["data", "check", str(file), "--out", str(out), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert (result["n"], result["flagged"], result["flags"]["latin_words"]) == (len(SOUND) + 1, 1, 1)
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [row["line"] for row in rows] == list(range(1, len(SOUND) + 2))
    assert [row["flagged"] for row in rows] == [False] * len(SOUND) + [True]
    assert (rows[-1]["id"], rows[-1]["flags"][0]["place"]) == ("7", "question")
    assert main(["data", "check", str(file), "--out", str(out)]) == 1
    assert "--overwrite" in capfd.readouterr().err
    assert main(["data", "check", str(file), "--out", str(out), "--overwrite", "--limit", "2", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["n"] == len(out.read_text("utf-8").splitlines()) == 2
    assert main(["data", "check", str(file), "--out", str(file), "--overwrite"]) == 1
    assert "bimedix did not write it" in capfd.readouterr().err
    assert main(["data", "check", str(write(tmp_path / "empty.jsonl", []))]) == 1
    assert "has no pair" in capfd.readouterr().err


# --- what a file teaches


def invented(number: int, seed: int = 0) -> list[tuple[str, str]]:
    """Pairs of an invented language in two scripts, with 400 words; no rule but co-occurrence can tell them apart."""
    random_ = random.Random(seed)

    def word(letters: str) -> str:
        return "".join(random_.choice(letters) for _ in range(5))

    vocabulary = [(word("bdkmnrsvz"), word("بدكمنرسشص")) for _ in range(400)]
    said = [random_.sample(vocabulary, random_.randint(6, 10)) for _ in range(number)]
    return [
        (" ".join(e for e, _ in words), " ".join(a for _, a in random_.sample(words, len(words)))) for words in said
    ]


def unrelated(found: list[tuple[str, str]]) -> set[tuple[str, str]]:
    return Corpus([Segments((("question", pair),)) for pair in found]).unrelated()


def test_translations_of_other_texts_are_found_by_the_words_of_the_file():
    good = invented(400)
    wrong = [(one, other) for (one, _), (_, other) in zip(good[:80], good[1:81], strict=True)]
    found = unrelated([*wrong, *good[80:]])
    assert len(found & set(wrong)) >= 0.85 * len(wrong)
    assert len(found - set(wrong)) <= 0.02 * len(good)


def test_a_few_pairs_teach_nothing():
    assert unrelated(invented(alignment.MIN_PAIRS - 1)) == set()


def test_choices_in_another_order_are_found_by_the_words_of_the_file(tmp_path):
    good = invented(800)
    groups = [good[start : start + 4] for start in range(0, 800, 4)]
    rows = [
        {
            "en": {"question": f"{one[0][0]} {one[1][0]}", "choices": [pair[0] for pair in one]},
            "ar": {"question": f"{one[0][1]} {one[1][1]}", "choices": [pair[1] for pair in one]},
        }
        for one in groups
    ]
    for row in rows[:20]:
        row["ar"]["choices"][1:3] = reversed(row["ar"]["choices"][1:3])
    checked = pairs.check_file(write(tmp_path / "p.jsonl", rows))
    flagged = [any(flag.name == "choice_order" for flag in row.flags) for row in checked]
    assert sum(flagged[:20]) >= 18
    assert sum(flagged[20:]) <= 2


def test_the_model_learns_which_words_go_together():
    pairs_ = [([one, two], [one.upper(), two.upper()]) for one in "abcde" for two in "fghij"]
    model = alignment.learn(pairs_)
    good, bad = model.score(["a", "f"], ["A", "F"]), model.score(["a", "f"], ["B", "G"])
    assert good[0] > 2 > 0 > bad[0]
    assert model.score(["unknown"], ["A"]) == (0.0, 0)
    assert alignment.learn([]).score(["a"], ["A"]) == (0.0, 0)


def test_segments_of_objects_keep_the_names_of_texts():
    found = of_objects({"context": "a", "question": "b", "id": "c"}, {"context": "x", "question": "y"})
    assert found == Segments((("context", ("a", "x")), ("question", ("b", "y"))))
