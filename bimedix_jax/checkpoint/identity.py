"""The base that an adapter belongs to: hashes of its weights, and the storage that the adapter was trained over."""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import BaseModel

from bimedix_jax.errors import BimedixError
from bimedix_jax.kernels.unstacked import on_one_cpu
from bimedix_jax.models.config import Storage
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.quantise import storage_of

log = logging.getLogger(__name__)

SAMPLED_ROWS = 64
"""How many embedding rows identify a base. Hashing the whole table would take seconds."""


class BaseJson(BaseModel):
    """The identity of a base: what `base_identity` computes, and the configuration for error messages."""

    architecture: str
    weights: str | None
    router: str | None
    config: dict[str, Any]
    storage: Storage | None = None  # folders of earlier versions do not record it


def base_record(model: Mixtral) -> dict[str, Any]:
    """The content of a `BaseJson` for the adapters of `model`."""
    storage = model.trained_over or storage_of(model)
    config = dataclasses.asdict(model.config)
    return {**base_identity(model), "config": config, "storage": dataclasses.asdict(storage)}


def warn_storage(trained: Storage | None, model: Mixtral, folder: str | Path) -> None:
    """Warns where the base of `model` has another storage than the one an adapter was trained over."""
    own = storage_of(model)
    if trained is not None and trained.base != own.base:
        log.warning(
            "%s was trained over %s and runs over %s here, so its outputs differ; leave base out to avoid this.",
            folder,
            trained.base,
            own.base,
        )


def check_base(theirs: BaseJson, model: Mixtral, folder: Path) -> None:
    """Compares `model` with the base that the adapter in `folder` records: its `base_identity` and configuration.

    Raises:
      BimedixError: they differ.
    """
    ours = base_identity(model)
    here, there = dataclasses.asdict(model.config), theirs.config
    differing = [f"{k} {there.get(k)!r} there, {v!r} here" for k, v in here.items() if there.get(k) != v]
    if theirs.architecture != ours["architecture"]:
        what = "; ".join(differing) or "other parameter shapes"
        raise BimedixError(f"The adapter {folder} was trained on another base ({what}); load that one.")
    recorded = {"weights": theirs.weights, "router": theirs.router}
    other = [part for part, value in recorded.items() if None not in (value, ours[part]) and value != ours[part]]
    if other:
        raise BimedixError(
            f"The adapter {folder} was trained on another base of the same architecture (its "
            f"{'norms or embeddings' if other == ['weights'] else 'routers'} differ from this model's); load that one."
        )


def base_identity(model: Mixtral) -> dict[str, str | None]:
    """Hashes (SHA-256) that identify a base, equal for all its storages (bfloat16, float32, NF4).

    `architecture`: configuration and parameter shapes. `weights`: norms and 64 embedding rows in bfloat16, which no
    storage packs. `router`: the routers in bfloat16. None where the model has shapes only, or its routers train.
    """
    values = {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if "lora" not in path
    }
    shapes = {path: list(value.shape) for path, value in values.items()}
    router = model.config.router
    # the router variant is not a part of the base
    own = {"num_experts": router.num_experts, "top_k": router.top_k, "variant": "topk"}
    config = {**dataclasses.asdict(model.config), "router": own}
    if config["rope_scaling"] is None:  # a later field, which earlier identities lack
        del config["rope_scaling"]
    text = json.dumps({"config": config, "shapes": shapes}, sort_keys=True)
    identity: dict[str, str | None] = {"architecture": hashlib.sha256(text.encode()).hexdigest()}
    table = values["embed.table"]
    if isinstance(table, jax.ShapeDtypeStruct):
        return {**identity, "weights": None, "router": None}
    rows = np.linspace(0, table.shape[0] - 1, SAMPLED_ROWS).astype(int)
    some = np.asarray(table)[rows] if on_one_cpu(table) else table[rows]  # a view there, which needs no program
    own = {"embed.table": some, **{path: value for path, value in values.items() if path.endswith(".scale")}}
    in_full = model.lora is not None and model.lora.train_router
    return {
        **identity,
        "weights": digest(own),
        "router": None if in_full else digest({"router": values["layers.moe.router.w"]}),
    }


def digest(values: dict[str, Any]) -> str:
    """SHA-256 of arrays in bfloat16, by name."""
    parts = hashlib.sha256()
    for name, value in sorted(values.items()):
        parts.update(name.encode() + np.asarray(value).astype(jnp.bfloat16).tobytes())
    return parts.hexdigest()
