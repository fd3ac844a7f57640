"""A server that stands in for a language model."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


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
