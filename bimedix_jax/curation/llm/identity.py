"""What outcomes depend on besides records and replies: a new version of any of it works every record out anew."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bimedix_jax.curation
from bimedix_jax.curation.llm.config import LlmConfig

_LLM = ("outcomes.py", "scores.py", "request.py")


def of_model(config: LlmConfig) -> dict[str, Any]:
    """What of a model's configuration can change its replies."""
    names = ("model", "response_format", "token_limit_field", "extra", "reasks")
    return {name: getattr(config, name) for name in names}


def of_code(packages: Iterable[str]) -> str:
    """Hash of the code that turns replies into outcomes: packages of `curation`, records, how replies are read."""
    root = Path(bimedix_jax.curation.__path__[0])
    names = [path for package in packages for path in sorted((root / package).glob("*.py"))]
    names += [root.parent / "data/records.py", *(root / "llm" / name for name in _LLM)]
    total = hashlib.sha256()
    for path in names:
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()
