import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bimedix_jax.data.encoding import encode_chat
from bimedix_jax.data.records import Turn, conversation
from bimedix_jax.data.templates import TEMPLATES
from bimedix_jax.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from bimedix_jax.errors import BimedixError

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}

# SmolLM2-Instruct's template: ChatML with a default system prompt
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Mixtral-8x7B-Instruct-v0.1's, which accepts no system prompt in its first form
MIXTRAL_2023 = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

fixtures = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
said = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30) | st.lists(
    st.sampled_from(["</s>", "<|im_end|>", "<|im_start|>", "[/INST]", "\n", " ", ")", "asthma", "الربو", "😀"]),
    min_size=1,
).map("".join)
# "▁" is how SentencePiece writes a space: the model cannot tell the two apart, and neither can Hugging Face's
values = said.filter(lambda text: text.strip() != "" and "▁" not in text)
dialogues = st.builds(
    lambda pairs, system: conversation(*(text for pair in pairs for text in pair), system=system),
    st.lists(st.tuples(values, values), min_size=1, max_size=3),
    st.none() | values,
)


def test_the_mask_marks_the_assistants_words_with_bytes(bytes_tokenizer: Tokenizer) -> None:
    _check_mask(bytes_tokenizer)


def test_the_mask_marks_the_assistants_words_with_sentencepiece(mixtral_tokenizer: Tokenizer) -> None:
    _check_mask(mixtral_tokenizer)


def _check_mask(tokenizer: Tokenizer) -> None:
    """Each learned run of tokens decodes to one answer with its end token, and nothing else is learned."""

    @fixtures
    @given(turns=dialogues)
    def check(turns: Sequence[Turn]) -> None:
        ids, mask = encode_chat(tokenizer, turns)
        # after another token: at the start, decoding takes off a space for the word-start mark of SentencePiece
        before = tokenizer.encode("x")
        learned = [tokenizer.decode([*before, *stretch]).removeprefix("x") for stretch in _stretches(ids, mask)]
        answers = [turn.value for turn in turns if turn.speaker == "gpt"]
        lead = " " if tokenizer.template.answer.startswith(" ") else ""
        assert learned == [lead + text + tokenizer.special["eos"] for text in answers]
        assert all(stretch[-1] == tokenizer.eos_id for stretch in _stretches(ids, mask))
        assert not mask[0]
        specials = sum(token in tokenizer.special_ids for token in ids)
        plain = conversation(*("x" for turn in turns if turn.speaker != "system"))
        system = [Turn(speaker="system", value="x")] if turns[0].speaker == "system" else []
        expected, _ = encode_chat(tokenizer, [*system, *plain])
        assert specials == sum(token in tokenizer.special_ids for token in expected)

    check()


def test_a_prompt_is_a_prefix_of_the_conversation(mixtral_tokenizer: Tokenizer, bytes_tokenizer: Tokenizer) -> None:
    for tokenizer in (mixtral_tokenizer, bytes_tokenizer):
        for answer in ("Yes.", ") is", "\n\nYes", " 7", "نعم"):
            turns = conversation("Is it?", answer)
            prompt, unlearned = encode_chat(tokenizer, turns[:1], add_generation_prompt=True)
            ids, mask = encode_chat(tokenizer, turns)
            assert not any(unlearned)
            assert ids[: len(prompt)] == prompt
            assert not any(mask[: len(prompt)])
            assert mask[len(prompt)]


@pytest.mark.parametrize("system", [None, "Be brief. أجب بإيجاز."])
def test_text_and_ids_are_those_of_transformers(
    mixtral_tokenizer: Tokenizer, bytes_tokenizer: Tokenizer, system: str | None
) -> None:
    turns = conversation("What is asthma?", "A disease.", "وما أعراضه؟", "الصفير والسعال.", system=system)
    for tokenizer in (mixtral_tokenizer, bytes_tokenizer):
        _same_as_transformers(tokenizer, AutoTokenizer.from_pretrained(tokenizer.folder), turns)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_is_recognised_from_its_jinja(name: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name].jinja)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.template == TEMPLATES[name]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for turns in (conversation("a", "b"), conversation("a", "b", "c", "d", system="s")):
        _same_as_transformers(tokenizer, theirs, turns)


def test_smollm2s_default_system_prompt_is_found(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(SMOLLM2)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.template.name == "chatml"
    prompt = tokenizer.template.default_system
    assert prompt == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for turns in (conversation("a", "b"), conversation("a", "b", system="s")):
        _same_as_transformers(tokenizer, theirs, turns)


def test_a_template_that_raises_for_system_prompts_is_recognised(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": MIXTRAL_2023})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.template.name == "mixtral-2023"
    _same_as_transformers(tokenizer, AutoTokenizer.from_pretrained(tmp_path), conversation("a", "b", "c", "d"))
    ids, _ = encode_chat(tokenizer, conversation("q", "a", system="Be brief."))
    assert tokenizer.decode(ids) == "<|endoftext|>[INST] Be brief.\n\nq [/INST]a<|im_end|>"


@pytest.mark.parametrize(
    "jinja", [None, "{{ messages[0]['content'] }}", "{% broken", SMOLLM2.replace("user", "human") + "x"]
)
def test_an_unknown_template_raises(jinja: str | None, tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": jinja}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BimedixError, match="name the template to use"):
        _ = load_tokenizer(tmp_path).template
    assert load_tokenizer(tmp_path, template="plain").template.name == "plain"
    with pytest.raises(BimedixError, match="no chat template 'x'"):
        _ = load_tokenizer(tmp_path, template="x").template


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    byte_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(escape)
    with pytest.raises(BimedixError, match="is not a known one"):
        _ = load_tokenizer(tmp_path).template


def test_a_user_cannot_write_special_tokens(mixtral_tokenizer: Tokenizer, bytes_tokenizer: Tokenizer) -> None:
    for tokenizer in (mixtral_tokenizer, bytes_tokenizer):
        eos = tokenizer.special["eos"]
        ids, mask = encode_chat(tokenizer, conversation(f"q{eos}", f"a{eos}b"))
        honest, _ = encode_chat(tokenizer, conversation("q", "ab"))
        assert ids.count(tokenizer.eos_id) == honest.count(tokenizer.eos_id)
        learned = tokenizer.decode([token for token, is_learned in zip(ids, mask, strict=True) if is_learned])
        assert learned.strip() == f"a{eos}b{eos}"


def test_a_tokenizer_without_the_templates_tokens_raises(sentencepiece_model: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    tokenizer = load_tokenizer(tmp_path, template="chatml")
    with pytest.raises(BimedixError, match=r"needs the token <\|im_start\|>"):
        encode_chat(tokenizer, conversation("q", "a"))


def test_mixtral_prompts_have_the_tokens_of_mistral_common(tmp_path: Path) -> None:
    import mistral_common
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    model = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    tokenizer = load_tokenizer(tmp_path, template="mixtral")
    texts = ("What is asthma?", "A disease (of the airways).", "وما أعراضه؟")
    messages = [UserMessage(content=texts[0]), AssistantMessage(content=texts[1]), UserMessage(content=texts[2])]
    theirs = MistralTokenizer.v1().encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
    assert encode_chat(tokenizer, conversation(*texts), add_generation_prompt=True)[0] == theirs


def _same_as_transformers(tokenizer: Tokenizer, theirs, turns: Sequence[Turn]) -> None:
    messages = [{"role": ROLES[turn.speaker], "content": turn.value} for turn in turns]
    bos, eos = tokenizer.special["bos"], tokenizer.special["eos"]
    assert tokenizer.template.text(turns, bos, eos) == theirs.apply_chat_template(messages, tokenize=False)
    assert encode_chat(tokenizer, turns)[0] == theirs.apply_chat_template(messages)["input_ids"]
    prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert encode_chat(tokenizer, turns[:-1], add_generation_prompt=True)[0] == prompt


def _stretches(ids: Sequence[int], mask: Sequence[bool]) -> list[list[int]]:
    """Runs of learned tokens."""
    found: list[list[int]] = []
    before = False
    for token, learned in zip(ids, mask, strict=True):
        if learned and not before:
            found.append([])
        if learned:
            found[-1].append(token)
        before = learned
    return found
