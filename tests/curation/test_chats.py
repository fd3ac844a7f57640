"""Chats from exam questions: shapes, rules, judge, refinement, languages, duplicates, and the command."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bimedix_jax.commands import data_chats
from bimedix_jax.curation.annotate import chats_output as output
from bimedix_jax.curation.annotate.chat_rules import Dialogue, Said, problems, support, unsuitable, why_no_dialogue
from bimedix_jax.curation.annotate.chat_shapes import ChatShape, ChatStyle, draw
from bimedix_jax.curation.annotate.chats import letter_of
from bimedix_jax.curation.llm.config import JudgeConfig, LlmConfig
from bimedix_jax.data.records import (
    LETTERS,
    Language,
    Record,
    conversation,
    multiple_choice_answer,
    multiple_choice_question,
    read_jsonl,
    write_jsonl,
)
from bimedix_jax.errors import BimedixError

FENCED = re.compile(r"<(\w+) ([0-9a-f]{12})>\n(.*?)\n</\1 \2>", re.DOTALL)


def question(
    name: str = "q1", language: Language = "en", choices: tuple[str, ...] = (), stem: str = "", **fields: Any
) -> Record:
    default = {
        "en": ("Inhaled corticosteroid", "Oral antibiotic", "Chest radiograph"),
        "ar": ("ستيرويد قشري مستنشق", "مضاد حيوي فموي", "صورة صدر شعاعية"),
    }[language]
    asked = {
        "en": "A woman of 30 wheezes at night. What is given first?",
        "ar": "امرأة عمرها 30 لديها أزيز. ما العلاج؟",
    }
    choices = choices or default
    return Record(
        id=name, language=language, kind="mcqa", source="exam", licence="CC0-1.0", specialty="pulmonology",
        split="train", conversations=conversation(
            multiple_choice_question(stem or asked[language], choices), multiple_choice_answer(choices, 0, language)
        ),
        choices=choices, answer=0, **fields,
    )  # fmt: skip


TEXTS: dict[tuple[str, str], str] = {
    ("en", "why"): "Hello doctor, I wheeze at night and I am {n} worried.",
    ("en", "asks"): "How long has this been going on, and is it worse in the cold ({n})?",
    ("en", "tells"): "For some weeks, doctor, that is part {n} of it.",
    ("en", "answer"): "You most likely have asthma, so I would begin with {right} ({n}).",
    ("en", "more"): "And how long must I take it, in step {n}?",
    ("en", "reply"): "For some months, then we look again ({n}).",
    ("ar", "why"): "مرحبا يا دكتور، لدي أزيز في الليل وأنا قلق {n}.",
    ("ar", "asks"): "منذ متى، وهل يزداد في البرد ({n})؟",
    ("ar", "tells"): "منذ أسابيع يا دكتور، وهذا جزء {n} منه.",
    ("ar", "answer"): "الأرجح أن لديك ربوا، لذلك نبدأ ب{right} ({n}).",
    ("ar", "more"): "وكم من الوقت أتناوله في الخطوة {n}؟",
    ("ar", "reply"): "بضعة أشهر ثم ننظر من جديد ({n}).",
}
RIGHT = {"en": "an inhaled corticosteroid", "ar": "ستيرويد قشري مستنشق"}


def good_turn(turn: dict[str, str], number: int) -> Said:
    kind = next(
        name
        for name, sign in {
            "why": "says why", "tells": "answers the doctor", "more": "asks something", "asks": "asks what",
            "answer": "gives the answer", "reply": "replies",
        }.items()
        if turn["purpose"].startswith(sign)
    )  # fmt: skip
    language = turn["language"]
    text = TEXTS[language, kind].format(n=number, right=RIGHT[language])
    return Said.model_validate({"speaker": turn["speaker"], "language": language, "text": text})


def good(shape: ChatShape) -> Dialogue:
    return Dialogue(turns=tuple(good_turn(turn, number) for number, turn in enumerate(shape.turns())))


def changed(dialogue: Dialogue, number: int, text: str) -> Dialogue:
    turns = list(dialogue.turns)
    turns[number] = turns[number].model_copy(update={"text": text})
    return Dialogue(turns=tuple(turns))


# --- shapes


def test_shapes_have_the_requested_mean():
    shapes = [draw(question(f"q{number}"), ChatStyle(mean=4.7)) for number in range(4000)]
    lengths = [shape.exchanges for shape in shapes]
    assert abs(sum(lengths) / len(lengths) - 4.7) < 0.08  # the standard error is 0.02
    assert min(lengths) == 2
    assert 8 <= max(lengths) <= 10
    assert all(2 <= shape.answer <= shape.exchanges for shape in shapes)


@pytest.mark.parametrize(("mean", "most"), [(2, 2), (2, 6), (6, 6), (3.5, 4)])
def test_the_mean_can_be_set(mean, most):
    lengths = [draw(question(f"q{n}"), ChatStyle(mean=mean, most=most)).exchanges for n in range(800)]
    assert abs(sum(lengths) / len(lengths) - mean) < 0.1
    assert max(lengths) <= most


def test_a_shape_depends_on_seed_and_question_alone():
    style = ChatStyle(switch_share=0.5)
    assert draw(question("q1"), style) == draw(question("q1"), style)
    drawn = {draw(question(f"q{n}"), style) for n in range(50)}
    assert len(drawn) > 20
    assert {draw(question(f"q{n}"), ChatStyle(switch_share=0.5, seed=1)) for n in range(50)} != drawn


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_that_switches_can_be_set(share):
    shapes = [draw(question(f"q{n}"), ChatStyle(switch_share=share)) for n in range(1500)]
    switching = [shape for shape in shapes if shape.switch is not None]
    assert abs(len(switching) / len(shapes) - share) < 0.04
    for shape in switching:
        assert shape.switch is not None
        assert shape.switch >= 2
        assert set(shape.languages[: shape.switch - 1]) == {"en"}
        assert set(shape.languages[shape.switch - 1 :]) == {"ar"}


def test_the_language_can_be_set():
    assert draw(question("q"), ChatStyle(language="ar", switch_share=0)).language == "ar"
    assert draw(question("q", "ar"), ChatStyle(switch_share=0)).language == "ar"


def test_impossible_styles_are_errors():
    with pytest.raises(ValueError, match="mean number of turns"):
        ChatStyle(mean=11)
    with pytest.raises(ValueError, match="switch_share"):
        ChatStyle(switch_share=2)


# --- rules


SHAPE = ChatShape(("en", "en", "en"), answer=2)
SWITCHING = ChatShape(("en", "en", "ar"), answer=2)


@pytest.mark.parametrize("shape", [SHAPE, SWITCHING, ChatShape(("ar",) * 4, 4), ChatShape(("en", "ar"), 2)])
@pytest.mark.parametrize("language", ["en", "ar"])
def test_a_good_chat_has_no_problem(shape, language):
    assert [str(problem) for problem in problems(question(language=language), shape, good(shape))] == []


@pytest.mark.parametrize(
    ("name", "shape", "dialogue"),
    [
        ("turns", SHAPE, Dialogue(turns=good(SHAPE).turns[:4])),
        ("language", SWITCHING, good(SHAPE)),
        ("language", SHAPE, changed(good(SHAPE), 0, "مرحبا يا دكتور كيف الحال")),
        ("no_question", SHAPE, changed(good(SHAPE), 1, "I see. Tell me more about it.")),
        ("answer_early", SHAPE, changed(good(SHAPE), 1, "Take an inhaled corticosteroid. Since when is it so?")),
        ("answer_missing", SHAPE, changed(good(SHAPE), 3, "You should rest and drink water.")),
        ("another_choice", SHAPE, changed(good(SHAPE), 3, "Inhaled things do not help; take an oral antibiotic.")),
        ("exam_talk", SHAPE, changed(good(SHAPE), 3, "An inhaled corticosteroid, so option A is the correct answer.")),
        ("exam_talk", SWITCHING, changed(good(SWITCHING), 5, "الإجابة الصحيحة هي الخيار أ يا سيدتي.")),
        ("repetition", SHAPE, changed(good(SHAPE), 4, good(SHAPE).turns[2].text)),
    ],
)
def test_each_problem_is_found(name, shape, dialogue):
    assert name in {problem.name for problem in problems(question(), shape, dialogue)}


def test_questions_may_name_the_answer_before_it_is_given():
    asked = changed(good(SHAPE), 1, "Have you ever used an inhaled corticosteroid?")
    assert problems(question(), SHAPE, asked) == []


@pytest.mark.parametrize(
    ("choice", "text", "share"),
    [
        ("Inhaled corticosteroids", "an inhaled corticosteroid", 1),
        ("Vitamin B12 deficiency", "you lack vitamin B12", 2 / 3),
        ("2.5 mg", "a dose of 2.5 mg", 1),
        ("الربو القصبي", "لديك ربو قصبي", 1),
        ("Gout", "you have asthma", 0),
    ],
)
def test_support_is_the_share_of_a_choices_words(choice, text, share):
    assert support(choice, text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("dialogue", "reason"),
    [(Dialogue(turns=()), "no turns"), (Dialogue(turns=good(SHAPE).turns[:3]), "last word"),
     (Dialogue(turns=good(SHAPE).turns[1:]), "must be the patient's"), (changed(good(SHAPE), 2, " "), "is blank")],
)  # fmt: skip
def test_replies_that_are_no_consultations_give_a_reason(dialogue, reason):
    assert reason in (why_no_dialogue(dialogue) or "")
    assert why_no_dialogue(good(SHAPE)) is None


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (question(choices=("Gout", "Asthma", "All of the above")), "refers to other choices"),
        (question(choices=("Gout", "Asthma", "Both A and B")), "refers to other choices"),
        (question(choices=("Yes", "No", "Maybe")), "only yes and no"),
        (question(stem="What is shown in the image?"), "needs a picture"),
        (question(choices=("Vitamin A and D", "Vitamin E")), None),
    ],
)
def test_unsuitable_questions_give_a_reason(record, reason):
    found = unsuitable(record)
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.parametrize(
    ("said", "letter"), [("B", "B"), ("(b).", "B"), ("None", "none"), ("E", None), ("B or C", None)]
)
def test_letters_of_the_judge_are_read(said, letter):
    assert letter_of(said, "ABC") == letter


# --- with models


class Model:
    """A writer and a judge by rule; remembers what it was asked."""

    def __init__(
        self,
        spoil: Callable[[Dialogue, int], Dialogue] = lambda dialogue, number: dialogue,
        choice: Callable[[int], str] = lambda number: "A",
        score: Callable[[int], Any] = lambda number: 95,
    ) -> None:
        self.spoil, self.choice, self.score = spoil, choice, score
        self.written: list[str] = []
        self.judged: list[str] = []

    def __call__(self, body: dict[str, Any]) -> str:
        prompt = body["messages"][-1]["content"]
        parts = {match[1]: match[3] for match in FENCED.finditer(prompt)}
        if "plan" in parts:
            self.written.append(prompt)
            turns = json.loads(parts["plan"])["turns"]
            dialogue = Dialogue(turns=tuple(good_turn(turn, number) for number, turn in enumerate(turns)))
            name = re.search(r"case (\d+)", parts["question"])
            for number, turn in enumerate(dialogue.turns if name else ()):  # so that no two cases sound alike
                assert name
                words = " ".join(letter * (int(name[1]) + 2) for letter in "abcd" if turn.language == "en")
                words += " ".join(letter * (int(name[1]) + 2) for letter in "ابتث" if turn.language == "ar")
                dialogue = changed(dialogue, number, f"{words} {turn.text}")
            return json.dumps(self.spoil(dialogue, len(self.written) - 1).model_dump())
        self.judged.append(prompt)
        number = len(self.judged) - 1
        return json.dumps({"choice": self.choice(number), "problems": ["stiff"], "score": self.score(number)})


def run(path: Path, server: Any, records: list[Record], **options: Any) -> tuple[dict[str, Any], str]:
    write_jsonl(path / "in.jsonl", records)
    config = data_chats.Config(
        sources=(str(path / "in.jsonl"),),
        out=path / "out",
        llm=LlmConfig(model="writer", base_url=server.url, api_key_env="", reasks=1),
        judge=JudgeConfig(model="judge"),
        **{"switch_share": 0.0, "overwrite": True, **options},
    )
    said = io.StringIO()
    return data_chats.run(config, Console(file=said, width=200)), said.getvalue()


def several(number: int) -> list[Record]:
    return [question(f"q{n}", stem=f"case {n}: a woman wheezes at night. What is given first?") for n in range(number)]


def test_from_questions_to_chats(serve, tmp_path):
    model = Model()
    records = several(6)
    result, said = run(tmp_path, serve(respond=model), records, switch_share=0.5)
    assert (result["chats"], result["rejected"], result["questions"]) == (6, 0, 6)
    chats = list(read_jsonl(tmp_path / "out" / output.CHATS))
    assert [chat.provenance["source_id"] for chat in chats] == [record.id for record in records]
    for record, chat in zip(records, chats, strict=True):
        shape = draw(record, ChatStyle(switch_share=0.5))
        assert (chat.kind, chat.split, chat.specialty, chat.choices) == ("chat", "train", "pulmonology", None)
        assert len(chat.conversations) == 2 * shape.exchanges
        own = [turn.language or chat.language for turn in chat.conversations]
        assert own == [language for language in shape.languages for _ in range(2)]
        assert chat.provenance["group"] == record.id
        assert (chat.provenance["generator"], chat.provenance["judge"]) == ("writer", "judge")
    assert {chat.provenance.get("switch_turn") is not None for chat in chats} == {True, False}
    assert result["mean_turns"] == sum(len(chat.conversations) // 2 for chat in chats) / 6
    assert "6 chats of 6 questions" in said
    assert {row["stage"] for row in result["ledger"]} == {"chats", "chats_judge"}


def test_the_judge_does_not_know_the_key(serve, tmp_path):
    model = Model()
    run(tmp_path, serve(respond=model), [question()])
    assert "Answer: A" in model.written[0]
    assert "Answer: A" not in model.judged[0]
    assert "A. Inhaled corticosteroid" in model.judged[0]


def test_a_revision_gets_the_problems_of_the_draft(serve, tmp_path):
    def spoil(dialogue: Dialogue, number: int) -> Dialogue:
        return changed(dialogue, 1, "I see, tell me more.") if number == 0 else dialogue

    model = Model(spoil)
    result, _ = run(tmp_path, serve(respond=model), [question()])
    assert result["written_in_round"] == {"1": 1}
    assert "no_question: the doctor asks nothing in exchange 1" in model.written[1]
    assert "stiff" in model.written[1]


def test_a_chat_that_changes_the_answer_is_rejected(serve, tmp_path):
    model = Model(choice=lambda number: "B")
    result, said = run(tmp_path, serve(respond=model), [question()], rounds=1)
    assert (result["chats"], result["rejected_for"]) == (0, {"judge_other_choice": 1})
    (row,) = [json.loads(line) for line in (tmp_path / "out" / output.REJECTED).read_text("utf-8").splitlines()]
    assert row["id"] == "q1"
    assert "reads as choice B, not as A" in row["reasons"][0]
    assert "1 questions have no chat" in said
    assert list(read_jsonl(tmp_path / "out" / output.CHATS)) == []


@pytest.mark.parametrize(("score", "kept"), [("85/100", 1), (79, 0), ("٩٠", 1), ("good", 0), (-1, 0)])
def test_a_low_or_unreadable_score_is_not_accepted(serve, tmp_path, score, kept):
    result, _ = run(tmp_path, serve(respond=Model(score=lambda number: score)), [question()], rounds=0)
    assert result["chats"] == kept


def test_nearly_the_same_chats_and_questions_are_left_out(serve, tmp_path):
    style: dict[str, Any] = {"turns": 3, "most_turns": 3}
    twins = [question("a", stem="First of two questions. What is given first?"), question("b", stem="The second one?")]
    twins += [question("c", stem="The second  one?")]
    result, _ = run(tmp_path, serve(respond=Model()), twins, **style)
    answers = {draw(record, ChatStyle(mean=3, most=3)).answer for record in twins[:2]}
    assert result["left_out"] == {"another question has the same words": 1}
    assert (result["chats"], result["duplicates"]) == ((1, 1) if len(answers) == 1 else (2, 0))
    same, _ = run(tmp_path, serve(respond=Model()), twins[:2], turns=2, most_turns=2)
    assert (same["chats"], same["duplicates"]) == (1, 1)
    assert "nearly the same as a/chat" in (tmp_path / "out" / output.REJECTED).read_text("utf-8")


def test_replies_are_not_paid_for_twice(serve, tmp_path):
    model = Model()
    server = serve(respond=model)
    first, _ = run(tmp_path, server, several(4))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    sent = len(server.bodies)
    again, said = run(tmp_path, server, several(4))
    assert len(server.bodies) == sent == 8
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert first["chats"] == again["chats"] == 4
    assert "4 of them already finished" in said


def test_faults_of_the_endpoint_are_handled(serve, tmp_path):
    """Cut, filtered and garbled replies are asked for again; what stays unusable is rejected, not lost."""
    faults = iter(["429:1", "500", "cut", "truncated_json", "content_filter", "length"])
    server = serve(respond=Model(), fault=lambda body, nth: next(faults, None))
    result, _ = run(tmp_path, server, several(3))
    assert result["chats"] + result["rejected"] == 3
    assert result["chats"] >= 2


def test_a_dry_run_sends_nothing(serve, tmp_path):
    server = serve(respond=Model())
    records = [*several(5), question("none", choices=("Gout", "None of the above"))]
    result, said = run(tmp_path, server, records, dry_run=True, prices=("writer=1/0.5/4", "judge=1/0.5/4"))
    assert server.bodies == []
    assert (result["questions"], result["left_out"]) == (5, {"a choice refers to other choices": 1})
    rows = {row["stage"]: row for row in result["estimate"]}
    assert rows["chats"]["requests"] == [5, 5]
    assert rows["chats_judge"]["requests"] == [5, 15]
    assert rows["chats"]["usd"][0] > 0
    assert "turns drawn on average" in said
    assert not (tmp_path / "out").exists()


def test_records_that_are_no_questions_are_counted(serve, tmp_path):
    chat = Record(id="c", language="en", kind="qa", source="s", licence="l", conversations=conversation("Why?", "So."))
    _, said = run(tmp_path, serve(respond=Model()), [question(), chat])
    assert "1 records of kind qa are not multiple-choice questions" in said
    with pytest.raises(BimedixError, match="no question to build a chat on"):
        run(tmp_path, serve(respond=Model()), [chat])


def test_arabic_questions_and_arabic_chats_of_english_ones(serve, tmp_path):
    result, _ = run(tmp_path, serve(respond=Model()), [question("ar1", "ar")])
    assert result["languages"] == {"ar": 1}
    result, _ = run(tmp_path, serve(respond=Model()), [question()], language="ar")
    (chat,) = read_jsonl(tmp_path / "out" / output.CHATS)
    assert (chat.id, chat.language) == ("q1/chat-ar", "ar")
    assert not any(turn.language for turn in chat.conversations)


@pytest.mark.parametrize("name", ["threshold", "rounds", "turns", "switch_share"])
def test_options_out_of_range_are_errors(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        data_chats.Config(("x",), tmp_path, LlmConfig(model="m"), **dict[str, Any]({name: -1}))


def test_letters_are_those_of_records():
    assert LETTERS.startswith("ABC")
