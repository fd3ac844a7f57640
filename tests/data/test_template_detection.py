"""A checkpoint's Jinja template is recognised if it renders every probe like one of ours, and never otherwise."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bimedix_jax.data.encoding import ChatEncoder, encode_chat
from bimedix_jax.data.records import Turn, conversation
from bimedix_jax.data.templates import TEMPLATES
from bimedix_jax.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from bimedix_jax.errors import BimedixError

CHATML = TEMPLATES["chatml"].jinja
MESSAGE = "'<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>\\n'"
GENERATION = (
    "{% for turn in messages %}{% if turn.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ turn.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ " + MESSAGE + " }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BREAK = CHATML.replace("{% endfor %}", "{% if loop.last %}{% break %}{% endif %}{% endfor %}")
CONTINUE = CHATML.replace(
    "{{ '<|im_start|>' +", "{% if not turn['content'] %}{% continue %}{% endif %}{{ '<|im_start|>' +"
)
DATED = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nToday is {{ strftime_now('%Y') }}.<|im_end|>\n{% endif %}"
    + CHATML
)
CONVERSATIONS = (
    conversation("q"),
    conversation(" a\n", "\tb ", " c"),
    conversation("a & <b>", "é", "c", "d", system=" s "),
    conversation("الربو؟", "مرض."),
)


def folder(path: Path, jinja: Any, **keys: Any) -> Path:
    byte_tokenizer(path)
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": jinja} | keys
    (path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return path


def require_equal_ids(path: Path) -> Tokenizer:
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    for turns in CONVERSATIONS:
        messages = [{"role": roles[turn.speaker], "content": turn.value} for turn in turns]
        prompt = turns[-1].speaker == "human"
        expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
        assert encode_chat(ours, turns, add_generation_prompt=prompt)[0] == expected
    return ours


@pytest.mark.parametrize(
    ("jinja", "changes"),
    [
        (GENERATION, {}),
        (BREAK, {}),
        (CONTINUE, {}),
        ("{{ bos_token }}" + CHATML, {"start": "{bos}"}),
        ("<|endoftext|>" + CHATML, {"start": "{bos}"}),
        (CHATML.replace("turn['content']", "turn['content'] | trim"), {"trimmed": ("system", "human", "gpt")}),
        (GENERATION.replace("turn.content", "turn.content.strip()"), {"trimmed": ("gpt",)}),
        (DATED, None),
        ({"default": CHATML, "tool_use": "{{ tools }}"}, {}),
        ([{"name": "rag", "template": "x"}, {"name": "default", "template": CHATML}], {}),
    ],
)
def test_an_equivalent_template_is_recognised(jinja: Any, changes: dict[str, Any] | None, tmp_path: Path) -> None:
    template = require_equal_ids(folder(tmp_path, jinja)).template
    assert template.name == "chatml"
    if changes is not None:
        assert {key: getattr(template, key) for key in ("start", "trimmed", "default_system")} == {
            "start": "",
            "trimmed": (),
            "default_system": None,
        } | changes


def test_a_template_that_writes_the_date_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_tokenizer(folder(tmp_path, DATED)).template.default_system is not None
    assert "writes today's date" in caplog.text


def test_a_template_without_a_beginning_token_is_recognised_where_the_tokenizer_has_one(tmp_path: Path) -> None:
    jinja = TEMPLATES["mixtral"].jinja.replace("{{ bos_token }}", "")
    assert load_tokenizer(folder(tmp_path, jinja)).template.start == ""


@pytest.mark.parametrize(
    "jinja",
    [
        CHATML.replace("turn['content']", "turn['content'].split('</think>')[-1]"),
        CHATML.replace("turn['content']", "turn['content'].replace('  ', ' ')"),
        CHATML.replace("turn['content']", "turn['content'].lstrip()"),
        CHATML.replace("turn['content']", "turn['content'] | tojson"),
        CHATML.replace("<|im_end|>\\n", "<|im_end|>\\n\\n"),
        CHATML.replace("for turn in messages", "for turn in messages[-2:]"),
        CHATML.replace("{% if add_generation_prompt %}", "{% if true %}"),
        CHATML.replace("turn['role']", "(turn['role'] if loop.first else 'user')"),
        "{{ messages[0].content.no.such }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_differs_somewhere_is_unknown(jinja: str, tmp_path: Path) -> None:
    with pytest.raises(BimedixError, match="is not a known one"):
        _ = load_tokenizer(folder(tmp_path, jinja)).template


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        ("{% generation %}", r"is not valid Jinja \(line 1: .*generation"),
        ("a\n{% if %}", r"is not valid Jinja \(line 2: "),
        ({"rag": "x", "tool_use": "y"}, "rag, tool_use, but none is named default"),
        ({"default": 3}, r"has a?.*chat_template"),
        (["x"], "chat_template"),
        (7, "chat_template"),
    ],
)
def test_a_template_that_cannot_be_used_is_a_sentence(jinja: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(BimedixError, match=message):
        _ = load_tokenizer(folder(tmp_path, jinja)).template


@pytest.mark.parametrize(
    ("file", "keys", "message"),
    [
        ("generation_config.json", {"eos_token_id": ["</s>"]}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": "</s>"}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": True}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": 1.5}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": {"id": 1}}, "eos_token_id"),
        ("config.json", {"bos_token_id": "1"}, "bos_token_id"),
        ("special_tokens_map.json", {"eos_token": 3}, "eos_token"),
        ("special_tokens_map.json", {"eos_token": {"lstrip": True}}, "eos_token = "),
        ("special_tokens_map.json", [], "not a JSON object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": "a"}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"eos_token": ["</s>"]}, "eos_token"),
        ("tokenizer_config.json", {"legacy": "perhaps"}, "legacy"),
    ],
)
def test_a_value_of_another_type_is_a_sentence_with_file_and_key(
    file: str, keys: Any, message: str, tmp_path: Path
) -> None:
    folder(tmp_path, CHATML)
    (tmp_path / file).write_text(json.dumps(keys))
    with pytest.raises(BimedixError, match=rf"{file}.*{message}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_special_tokens_that_take_blanks_with_them_give_the_ids_of_transformers(
    left: bool, right: bool, tmp_path: Path
) -> None:
    folder(tmp_path, CHATML)
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text())
    for token in spec["added_tokens"]:
        if "im_" in token["content"]:
            token |= {"lstrip": left, "rstrip": right}
    path.write_text(json.dumps(spec))
    tokenizer = require_equal_ids(tmp_path)
    turns = (Turn(speaker="human", value="x <|im_end|> y"), Turn(speaker="gpt", value=" z"))
    ids, mask = encode_chat(tokenizer, turns)
    assert ids.count(tokenizer.eos_id) == 2
    assert [i for i, learned in zip(ids, mask, strict=True) if learned][-1] == tokenizer.eos_id
    assert ChatEncoder(tokenizer).encode(turns)[0].tolist() == ids


def test_a_token_of_the_template_that_is_a_single_word_raises(tmp_path: Path) -> None:
    folder(tmp_path, CHATML)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"single_word": false', '"single_word": true'))
    with pytest.raises(BimedixError, match="declares as a single_word"):
        encode_chat(load_tokenizer(tmp_path), conversation("q"))
