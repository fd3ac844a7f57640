"""What a measurement of routes was made on: hashes of model, adapter, data, template and tokenizer, and one of all."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from bimedix_jax import __version__
from bimedix_jax.checkpoint.identity import base_identity
from bimedix_jax.data.records import Record
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.evals.comparison import digest
from bimedix_jax.files import write_text
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.quantise import storage_of


def manifest(model: Mixtral, tokenizer: Tokenizer, records: Sequence[Record], **options: Any) -> dict[str, Any]:
    """The hashes and options of a measurement; `hash` is the SHA-256 of all of them.

    Args:
      options: what else determines the result, as JSON values.
    """
    identity = base_identity(model)
    content = {
        "hashes": {
            "model": hash_of([identity["architecture"], identity["weights"], identity["router"]]),
            "adapter": adapter_hash(model),
            "data": digest(records),
            "template": hash_of(tokenizer.template.name),
            "tokenizer": tokenizer.fingerprint,
        },
        "base": storage_of(model).base,
        "dtype": model.dtype,
        "router": model.config.router.variant,
        "options": options,
        "version": __version__,
    }
    return {"hash": hash_of(content), **content}


def hash_of(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def adapter_hash(model: Mixtral) -> str | None:
    """SHA-256 of all parameters that belong to adapters, and of what trains with them; None without any."""
    found, parts = False, hashlib.sha256()
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path))
        in_full = model.lora is not None and name.startswith("layers.moe.router")
        if isinstance(variable, nnx.LoRAParam) or in_full:
            found = True
            parts.update(name.encode())
            for leaf in jax.tree.leaves(variable.get_value()):
                parts.update(np.ascontiguousarray(leaf).tobytes())
    return parts.hexdigest() if found else None


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
