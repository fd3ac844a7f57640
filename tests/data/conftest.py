"""A small tokenizer like Mixtral's: a SentencePiece BPE model trained on a few sentences."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece

from bimedix_jax.data.templates import TEMPLATES
from bimedix_jax.data.tokenizer import Tokenizer, load_tokenizer

SENTENCES = [
    "The patient takes two tablets of metformin every morning with food.",
    "What are the symptoms of asthma? Wheezing, cough and shortness of breath.",
    "ما هي أعراض الربو؟ الصفير والسعال وضيق التنفس.",
    "يتناول المريض قرصين من الميتفورمين كل صباح مع الطعام.",
    "[INST] question [/INST] answer User: Assistant:",
]


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session", params=["mixtral", "mixtral-2023", "mixtral-legacy"])
def mixtral_tokenizer(
    request: pytest.FixtureRequest, sentencepiece_model: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    """With the files that Mixtral publishes: tokenizer.model and tokenizer_config.json."""
    folder = tmp_path_factory.mktemp(request.param)
    name = request.param.removesuffix("-legacy")
    return write_mixtral(folder, sentencepiece_model, name, legacy=request.param.endswith("legacy"))


def write_mixtral(folder: Path, model: bytes, template: str, legacy: bool) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(model)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": legacy,
        "chat_template": TEMPLATES[template].jinja,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)
