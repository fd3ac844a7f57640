"""What a measurement of routes was made on: hashes of model, adapter, data, template and tokenizer, and one of all."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from bimedix_jax import __version__
from bimedix_jax.checkpoint.identity import base_identity
from bimedix_jax.data.records import Record
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.distributed import on_host
from bimedix_jax.evals.comparison import digest
from bimedix_jax.files import write_text
from bimedix_jax.models.linear import TrainedParam
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.quantise import storage_of
from bimedix_jax.routing.recorded_data import Data, template_hash


def manifest(
    model: Mixtral, tokenizer: Tokenizer, data: str, records: Sequence[Record], **options: Any
) -> dict[str, Any]:
    """The hashes and options of a measurement; `hash` is the SHA-256 of all of them.

    Args:
      data: `sample` or a file, whose hash is that of a recording of all its records. records: those that were used.
      options: what else determines the result, as JSON values.
    """
    content = {
        "hashes": {
            "model": model_hash(model),
            "adapter": adapter_hash(model),
            "data": Data.open(data, tokenizer, None).digest,
            "template": template_hash(tokenizer),
            "tokenizer": tokenizer.fingerprint,
        },
        "records": digest(records),
        "dtype": model.dtype,
        "router": model.config.router.variant,
        "options": options,
        "version": __version__,
    }
    return {"hash": hash_of(content), **content}


def hash_of(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def model_hash(model: Mixtral) -> str:
    """SHA-256 of the identity of a model's base: its configuration, and samples of its weights."""
    return hash_of({**base_identity(model), "storage": dataclasses.asdict(storage_of(model))})


def adapter_hash(model: Mixtral) -> str | None:
    """SHA-256 of a model's adapters; None without any."""
    if model.lora is None:
        return None
    found = hashlib.sha256()
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.LoRAParam, TrainedParam))):
        found.update(".".join(map(str, path)).encode())
        found.update(np.ascontiguousarray(on_host(variable.get_value())).view(np.uint8).data)
    return found.hexdigest()


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON, with null for what is not a number, and creates the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(plain(result), ensure_ascii=False, indent=2, default=str) + "\n")


def plain(value: Any) -> Any:
    """The value with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
