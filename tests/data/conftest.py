"""Two small tokenizers: bytes with ChatML, and a SentencePiece BPE model trained on a few sentences."""

import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sentencepiece

from bimedix_jax.data.chat_template import TEMPLATES
from bimedix_jax.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer

SENTENCES = [
    "The patient takes two tablets of metformin every morning with food.",
    "What are the symptoms of asthma? Wheezing, cough and shortness of breath.",
    "ما هي أعراض الربو؟ الصفير والسعال وضيق التنفس.",
    "يتناول المريض قرصين من الميتفورمين كل صباح مع الطعام.",
    "[INST] question [/INST] answer User: Assistant:",
]


@pytest.fixture(scope="session")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


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
    """Laid out as Mixtral publishes it: tokenizer.model and tokenizer_config.json."""
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


@pytest.fixture(scope="session")
def loopback() -> ModuleType:
    """scripts/loopback_llm.py: an OpenAI-compatible server that answers by rule and misbehaves on demand."""
    path = Path(__file__).resolve().parents[2] / "scripts" / "loopback_llm.py"
    spec = importlib.util.spec_from_file_location("loopback_llm", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["loopback_llm"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def serve(loopback: ModuleType) -> Iterator[Callable[..., Any]]:
    """Start servers of scripts/loopback_llm.py: `server = serve(respond=..., fault=..., latency=...)`."""
    started = []

    def start(**options: Any) -> Any:
        started.append(loopback.Server(**options).start())
        return started[-1]

    yield start
    for server in started:
        server.stop()
