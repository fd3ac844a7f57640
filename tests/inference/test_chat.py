"""Chat: whole characters only, history, a full context, the keyboard loop and the command line."""

import dataclasses
import io
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from tiny import tiny
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Engine

from bimedix_jax import cli
from bimedix_jax.bidi import reorders_nothing, visual
from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.commands import chat as command
from bimedix_jax.data.encoding import encode_chat
from bimedix_jax.data.records import conversation
from bimedix_jax.data.tokenizer import Tokenizer, byte_tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.inference.chat import Chat, ChatOptions, Detokenizer, fit, pieces_of, reply
from bimedix_jax.models.init import init_random
from bimedix_jax.notice import NOTICE_AR, NOTICE_EN

CONFIG = tiny(hidden_size=304, intermediate_size=8, num_layers=1, experts=2, top_k=1, max_position_embeddings=256)
GREEDY = ChatOptions(max_new_tokens=16, temperature=0.0)
ANSWER = "شok <b>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def model(tokenizer):
    """Answers everything with ANSWER: each token determines the next, from the line break that ends every prompt."""
    model = init_random(CONFIG, seed=0)
    for variable in (model.layers.attention.o.w, model.layers.moe.w2.w):
        variable.set_value(jnp.zeros_like(variable.get_value()))
    model.embed.table.set_value(jnp.eye(304))
    chain = [*tokenizer.encode("\n" + ANSWER), tokenizer.eos_id]
    head = np.zeros((304, 304), np.float32)
    head[chain[:-1], chain[1:]] = 1.0
    assert model.lm_head is not None
    model.lm_head.w.set_value(jnp.asarray(head))
    return model


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    return export_hf(model, tmp_path_factory.mktemp("model") / "hf", tokenizer_from=tokenizer.folder)


def pieces_byte_fallback():
    """A tokenizer like SentencePiece's: a mark for the space before a word, and unknown characters as bytes."""
    words = ["▁the", "▁ربو", "▁", "ربو", "a"]
    vocabulary = {f"<0x{value:02X}>": value for value in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    engine = Engine(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    engine.add_special_tokens([AddedToken("</s>", normalized=False, special=True)])
    return Tokenizer(Path(), engine, {"eos": "</s>"}, (261,), "none", "plain")


FALLBACK = pieces_byte_fallback()


@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("سعال شديد ًٌ😀é")), max_size=60))
def test_streamed_bytes_are_whole_characters(tokenizer, text):
    ids = tokenizer.encode_with_offsets(text, literal=True).ids
    pieces = list(pieces_of(tokenizer, ids))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 303), max_size=40))
def test_streaming_any_bytes_equals_decoding(tokenizer, ids):
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special=True)


@given(st.lists(st.sampled_from(["▁the", "▁ربو", "▁", "ربو", "a", "</s>", "س", "😀", "é"]), max_size=30))
def test_streaming_words_and_byte_pieces_equals_decoding(words):
    ids = []
    for word in words:
        known = FALLBACK.token_id(word)
        ids += list(word.encode()) if known is None else [known]
    pieces = list(pieces_of(FALLBACK, ids))
    assert "".join(pieces) == FALLBACK.decode(ids, skip_special=True)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_is_returned_with_its_last_byte(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(token) for token in tokenizer.encode("aس")] == ["a", "", "س"]
    assert detokenizer.flush() == ""
    assert [detokenizer.push(token) for token in tokenizer.encode("س")[:1]] == [""]
    assert detokenizer.flush() == "\ufffd"


def test_a_reply_ends_at_the_stop_token_and_joins_the_history(model, tokenizer):
    chat = Chat(model, tokenizer, "Be brief.", GREEDY)
    assert list(chat.stream("hello"))[:3] == ["ش", "o", "k"]
    answer = chat.ask("مرحبا")
    assert (answer.text, answer.finished, answer.dropped_turns) == (ANSWER, True, 0)
    assert answer.tokens == len(ANSWER.encode())
    assert [turn.speaker for turn in chat.turns] == ["system", "human", "gpt", "human", "gpt"]
    assert chat.turns[-1].value == ANSWER
    assert reply(model, tokenizer, "hello", options=GREEDY) == ANSWER
    text, routing = reply(model, tokenizer, "hello", options=GREEDY, record="choices")
    assert text == ANSWER
    assert routing.experts_LBTK.shape[1] == 1


def test_a_reply_that_is_cut_off_is_not_finished(model, tokenizer):
    chat = Chat(model, tokenizer, options=dataclasses.replace(GREEDY, max_new_tokens=3))
    answer = chat.ask("hello")
    assert (answer.text, answer.finished) == ("شo", False)


def test_stopping_early_keeps_the_text_so_far(model, tokenizer):
    chat = Chat(model, tokenizer, options=GREEDY)
    pieces = chat.stream("hello")
    assert next(pieces) == "ش"
    pieces.close()
    assert chat.turns[-1].value == "ش"
    assert chat.last is not None
    assert not chat.last.finished


def test_a_full_context_drops_and_counts_the_oldest_turns(model, tokenizer):
    chat = Chat(model, tokenizer, "Be brief.", GREEDY)
    dropped = [chat.ask(f"question {number} " + "x" * 40).dropped_turns for number in range(5)]
    assert dropped[:2] == [0, 0]
    assert dropped == sorted(dropped)
    assert dropped[-1] >= 2
    assert len(chat.turns) == 11  # nothing is forgotten, only not shown


def test_fitting_keeps_the_system_prompt_and_the_last_question(tokenizer):
    turns = list(conversation("one", "two", "three", "four", "five", system="Be brief."))
    whole, dropped = fit(tokenizer, turns, 1000)
    assert dropped == 0
    ids, dropped = fit(tokenizer, turns, len(whole) - 1)
    assert dropped == 2
    assert ids == encode_chat(tokenizer, [turns[0], *turns[3:]], add_generation_prompt=True)[0]
    with pytest.raises(BimedixError, match="shorten it"):
        fit(tokenizer, turns, 20)


def test_empty_and_oversized_questions_raise(model, tokenizer):
    with pytest.raises(BimedixError, match="empty"):
        Chat(model, tokenizer).ask("  ")
    with pytest.raises(BimedixError, match="no room"):
        Chat(model, tokenizer, options=ChatOptions(max_new_tokens=256)).ask("hello")


def scripted(chat, lines, **options):
    """The output on the console for typed lines, and the result."""
    screen, typed = io.StringIO(), iter(lines)

    def read() -> str:
        line = next(typed, EOFError)
        if not isinstance(line, str):
            raise line
        return line

    result = command.converse(chat, Console(file=screen, width=200), read, **options)
    return screen.getvalue(), result


def test_the_keyboard_loop(model, tokenizer):
    chat = Chat(model, tokenizer, options=GREEDY)
    shown, result = scripted(chat, ["hello", "", "/what", "x" * 300, "/system Be kind.", "سؤال", "/quit", "never read"])
    assert shown.count(ANSWER) == 2  # markup in a reply is text
    assert "no command /what" in shown
    assert "error: this question has" in shown
    assert (result["turns"], chat.turns[0].value) == (2, "Be kind.")
    assert "hello" not in json.dumps(result)
    shown, result = scripted(chat, ["/reset", "/system", KeyboardInterrupt])
    assert (result["turns"], chat.turns, chat.system) == (0, [], None)


SAMPLED = ChatOptions(max_new_tokens=8, temperature=5.0, top_p=None, seed=3)


def test_each_reply_has_its_own_seed(model, tokenizer):
    words = []
    for _ in range(2):
        chat = Chat(model, tokenizer, options=SAMPLED)
        replies = []
        for _ in range(3):
            replies.append(chat.ask("hello").text)
            chat.restart(None)
        words.append(replies)
    assert len(set(words[0])) == 3
    assert words[0] == words[1]  # and the conversation can be repeated


def test_retry_replaces_the_last_reply_and_undo_forgets_it(model, tokenizer):
    chat = Chat(model, tokenizer, "Be kind.", SAMPLED)
    for attempt in (chat.undo, lambda: list(chat.retry())):
        with pytest.raises(BimedixError, match="ask something first"):
            attempt()
    chat.ask("one")
    first = chat.turns
    chat.ask("two")
    old = chat.turns
    "".join(chat.retry())
    assert [turn.value for turn in chat.turns[:-1]] == [turn.value for turn in old[:-1]]
    assert chat.turns[-1] != old[-1]
    assert chat.undo() == "two"
    assert chat.turns == first
    stopped = chat.retry()
    stopped.close()  # before the first word
    assert chat.turns == first


def test_retry_and_undo_at_the_keyboard(model, tokenizer):
    chat = Chat(model, tokenizer, options=GREEDY)
    shown, result = scripted(chat, ["/retry", "/undo", "hello", "/retry", "again", "/undo", "/quit"])
    assert shown.count("error: there is no exchange to undo; ask something first") == 2
    assert shown.count(ANSWER) == 3
    assert "Forgotten: again" in shown
    assert (result["turns"], [turn.value for turn in chat.turns]) == (2, ["hello", ANSWER])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", "-1", "temperature is -1"),
        ("--temperature", "nan", "temperature is nan"),
        ("--top-k", "0", "top_k is 0"),
        ("--top-p", "1.5", "top_p is 1.5"),
        ("--min-p", "2", "min_p is 2"),
        ("--repetition-penalty", "0", "repetition_penalty is 0"),
        ("--max-new-tokens", "0", "max_new_tokens is 0"),
        ("--max-new-tokens", "256", "leaves no room"),
        ("--seed", "-1", "seed is -1"),
    ],
)
def test_options_are_checked_before_the_model_is_loaded(folder, monkeypatch, capsys, option, value, message):
    monkeypatch.setattr("bimedix_jax.checkpoint.load.load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert cli.main(["chat", "--model", str(folder), "--prompt", "hello", option, value]) == 1
    assert message in capsys.readouterr().err


def test_the_file_to_save_is_checked_before_the_model_is_loaded(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bimedix_jax.checkpoint.load.load", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("x")
    for target in (tmp_path, tmp_path / "file", tmp_path / "file" / "chat.jsonl", Path("/proc/chat.jsonl")):
        assert cli.main(["chat", "--model", str(folder), "--prompt", "hello", "--save", str(target)]) == 1
        error = capsys.readouterr().err
        assert "unexpected" not in error
        assert "name a" in error
    assert cli.main(["chat", "--model", str(tmp_path / "none"), "--save", str(tmp_path / "new.jsonl")]) == 1
    assert not (tmp_path / "new.jsonl").exists()


def test_arabic_is_wrapped_before_it_is_reordered_and_ends_at_the_right():
    console = Console(file=io.StringIO(), width=20)
    text = "الربو مرض مزمن يصيب الرئتين و inhaler يساعد"
    lines = command.visual_lines(text, console)
    assert len(lines) > 1
    assert all(cell_len(line) == 20 for line in lines)
    assert lines[0].endswith(visual("الربو"))  # a reader begins at the right of the first line
    assert command.visual_lines("plain\n\nربو", console) == ["plain", "", " " * 17 + "ﻮﺑﺭ"]


def test_terminals_without_bidirectional_text_are_known():
    assert reorders_nothing({"TMUX": "x"})
    assert reorders_nothing({"TERM": "xterm-kitty"})
    assert not reorders_nothing({"TERM": "xterm-256color"})
    assert not reorders_nothing({"TMUX": "x", "BIMEDIX_BIDI": "0"})
    assert reorders_nothing({"BIMEDIX_BIDI": "1"})


def test_arabic_in_visual_order_line_by_line():
    assert visual("plain text") == "plain text"
    assert visual("ربو") == "ﻮﺑﺭ"
    assert visual("رُبو") == "ﻮﺑﺭ"
    assert list(command.lines(iter(["ab", "c\nd", "\n", "e"]))) == ["abc\n", "d\n", "e"]
    assert command.shown("a\x1b[31mb\u200c\n", bidi=False) == "a[31mb\u200c\n"


def test_the_notice_is_shown_in_both_languages():
    screen = io.StringIO()
    command.show_notice(Console(file=screen, width=1000))
    assert NOTICE_EN in screen.getvalue()
    assert NOTICE_AR in screen.getvalue()


def test_prompts_on_the_command_line_give_one_json_document(folder, tmp_path, capsys):
    saved = tmp_path / "said" / "chat.jsonl"
    words = ["--json", "chat", "--model", str(folder), "--base", "float32"]
    words += ["--temperature", "0", "--max-new-tokens", "16"]
    rules = tmp_path / "rules.json"
    rules.write_text('[{"op": "ban", "experts": [0], "where": {"language": "ar", "role": ["prompt", "answer"]}}]')
    words += ["--intervene", str(rules)]
    code = cli.main([*words, "--prompt", "hello", "سؤال", "--save", str(saved)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    result = json.loads(captured.out)
    assert [answer["text"] for answer in result["replies"]] == [ANSWER, ANSWER]
    assert result["notice"]["ar"] == NOTICE_AR
    assert NOTICE_EN.split(".")[0] in captured.err
    row = json.loads(saved.read_text("utf-8"))
    assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt", "human", "gpt"]
    assert saved.stat().st_mode & 0o077 == 0
    assert cli.main([*words, "--prompt", "hello", "--save", str(saved)]) == 1  # never overwritten
    assert cli.main(words) == 1  # --json has no keyboard
    for rule, message in (({"op": "freeze"}, "name an --adapter"), ({"op": "ban", "experts": [2]}, "names expert 2")):
        rules.write_text(json.dumps([rule]))
        assert cli.main([*words, "--prompt", "hello"]) == 1
        assert message in capsys.readouterr().err


def test_nothing_is_written_without_save(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--base", "float32", "--temperature", "0", "--max-new-tokens", "16"]
    assert cli.main(["chat", "--model", str(folder), *options, "--prompt", "hello"]) == 0
    assert ANSWER in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
