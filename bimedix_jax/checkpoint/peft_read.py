"""Adds the adapters of a PEFT folder to a model, one module in memory at a time; `peft` describes the formats.

The file is read twice. The first pass finds the parts that are zero, which decides how fused adapters are split and
which matrices get an adapter. The second pass fills the factors.
"""

import collections
import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from flax import nnx
from pydantic import BaseModel

from bimedix_jax.adapters import add_lora, factor_indices, has_lora, linears
from bimedix_jax.checkpoint import buffers
from bimedix_jax.checkpoint.identity import BaseJson, warn_storage
from bimedix_jax.checkpoint.identity import check_base as check_same_base
from bimedix_jax.checkpoint.peft import (
    FUSED,
    OWN_NAME,
    WEIGHTS_NAME,
    PeftSettings,
    first_match,
    read_settings,
)
from bimedix_jax.checkpoint.peft_names import FUSED_KINDS, Content, Pair, content_of
from bimedix_jax.checkpoint.safetensors_io import StoredTensor, pieces, read_header
from bimedix_jax.errors import BimedixError
from bimedix_jax.files import read_json
from bimedix_jax.models.config import LORA_TARGETS, LoraConfig, LoraOverride, Storage
from bimedix_jax.models.linear import TrainedParam
from bimedix_jax.models.mixtral import Mixtral

log = logging.getLogger(__name__)

MatrixKey = tuple[str, tuple[int, ...]]
"""One matrix: (kind, index into the leading axes of its weight)."""
GATE_UP = FUSED["gate_up"].format(layer=0)


class OwnJson(BaseModel):
    """bimedix_adapter.json."""

    format: Literal["bimedix peft 1"]
    base: BaseJson
    w1_rank: int | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of a pair that belongs to one kind: a slice of the rank axis and one of the output axis."""

    kind: str
    ranks: slice
    outputs: slice


@dataclasses.dataclass(frozen=True)
class Usage:
    """Which ranks of a pair's matrices M are not zero, bool [M, R]: in A, in the rows of B for w1, and in those for w3.
    Where w1 and w3 are not fused, the last two both refer to all rows of B."""

    index: list[tuple[int, ...]]
    a_MR: np.ndarray
    first_MR: np.ndarray
    second_MR: np.ndarray


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How the pairs of a file become adapters of the model.

    Attributes:
      parts: the parts of each pair, in order.
      present: rank and scale of every matrix that gets an adapter.
      scales: of the adapters of each kind; where a matrix has another scale, b is multiplied by the ratio.
    """

    config: LoraConfig
    parts: list[tuple[Part, ...]]
    present: dict[MatrixKey, tuple[int, float]]
    scales: dict[str, float]


def load_peft(model: Mixtral, folder: str | Path) -> Mixtral:
    """`model` with the adapters of a folder that PEFT, or `export_peft`, wrote; its base is shared, not copied.

    Fused adapters are split without loss: w1 and w3 get separate factors where B is block-diagonal, else both get the
    whole A. Factors that are all zero, which some layouts require, become no adapter.

    Raises:
      BimedixError: the folder is damaged, needs something that is not implemented, was made for another base or
        contains NaN, or the model already has adapters.
    """
    folder = Path(folder)
    if model.lora is not None or has_lora(model):
        raise BimedixError("This model already has adapters; load the base without them, or merge them first.")
    settings = read_settings(folder)
    content = content_of(read_header(weights_file(folder)), settings, model)
    check_tables(content, model)
    fused_later = any(pair.kind in ("w1", "w3") for pair in content.pairs)
    if fused_later and settings.rank_stabilised and first_match(settings.rank_pattern, GATE_UP, "") == GATE_UP:
        log.warning("w1 and w3 keep the scale of training; transformers 5 with peft 0.21 would multiply it by 1.41.")
    recorded = check_base(model, folder, settings)
    adapted = with_factors(model, content, conversion_of(content, settings, recorded, model))
    adapted.trained_over = peft_storage(folder)
    warn_storage(adapted.trained_over, model, folder)
    return adapted


def weights_file(folder: Path) -> Path:
    path = folder / WEIGHTS_NAME
    if path.is_file():
        return path
    if (folder / "adapter_model.bin").exists():
        raise BimedixError(
            f"{folder} has only adapter_model.bin, pickled weights, which are never read because they can run code; "
            "save the adapter with safe_serialization=True."
        )
    parts = sorted(folder.glob("adapter_model-*-of-*.safetensors"))
    if parts:
        raise BimedixError(
            f"{folder} has its adapter in {len(parts)} parts ({parts[0].name}, ...), which are not joined here; load "
            f"and save it with peft, which writes one {WEIGHTS_NAME}."
        )
    raise BimedixError(f"{folder} contains no {WEIGHTS_NAME}; name a folder that peft saved.")


def check_base(model: Mixtral, folder: Path, settings: PeftSettings) -> int | None:
    """Compares the base with the record in bimedix_adapter.json; returns the rank of w1 in gate_up, if it is recorded.

    Raises:
      BimedixError: the adapter was trained on another base.
    """
    path = folder / OWN_NAME
    if not path.is_file():
        log.warning(
            "%s does not identify its base (it names %s): only shapes were checked.", folder, settings.base or "none"
        )
        return None
    own = read_json(path, OwnJson, "export the adapter again")
    check_same_base(own.base, model, folder)
    return own.w1_rank


def peft_storage(folder: str | Path) -> Storage | None:
    """The storage that a PEFT adapter was trained over, which only folders of `export_peft` record."""
    path = Path(folder) / OWN_NAME
    return read_json(path, OwnJson, "export the adapter again").base.storage if path.is_file() else None


def check_tables(content: Content, model: Mixtral) -> None:
    """Raises BimedixError where a saved copy of the embedding or the head differs from the base's."""
    for tensor, path in content.tables:
        head = None if path == "embed.table" else model.lm_head
        ours = model.embed.table.get_value() if head is None else head.w.get_value().T
        same = tensor.shape == ours.shape and all(
            np.array_equal(tensor.read(first, rows).astype(ours.dtype), np.asarray(ours[first : first + rows]))
            for first, rows in pieces(tensor)
        )
        if not same:
            raise BimedixError(
                f"{tensor.path} contains {tensor.name}, which differs from the base's: a trained or resized vocabulary "
                "is not supported; first merge it into the base with peft."
            )


def matrices(pair: Pair, experts: int) -> Iterator[tuple[tuple[int, ...], np.ndarray, np.ndarray]]:
    """(index, a [in, R], b [R, out]) of a pair's matrices; raises BimedixError for NaN or infinity."""
    a, b = read_finite(pair.a), read_finite(pair.b)
    if pair.kind not in FUSED_KINDS:
        yield pair.index, a.T, b.T
        return
    a_ERx, b_xRE = a.reshape(experts, pair.rank, -1), b.reshape(-1, pair.rank, experts)
    for expert in range(experts):
        index = (*pair.index, expert)
        if pair.swapped:
            yield index, b_xRE[:, :, expert], a_ERx[expert]
        else:
            yield index, a_ERx[expert].T, b_xRE[:, :, expert].T


def read_finite(tensor: StoredTensor) -> np.ndarray:
    value = tensor.read().astype(np.float32, copy=False)
    if not np.isfinite(value).all():
        raise BimedixError(f"{tensor.path} contains NaN or infinity in {tensor.name}; use an earlier checkpoint.")
    return value


def usage_of(pair: Pair, model: Mixtral) -> Usage:
    ffn = model.config.intermediate_size
    index, used = [], []
    for place, a, b in matrices(pair, model.config.router.num_experts):
        index.append(place)
        first, second = (b[:, :ffn], b[:, ffn:]) if pair.kind == "gate_up" else (b, b)
        used.append((a.any(axis=0), first.any(axis=1), second.any(axis=1)))
    a_MR, first_MR, second_MR = (np.stack(column) for column in zip(*used, strict=True))
    return Usage(index, a_MR, first_MR, second_MR)


def splits_of(pairs: list[Pair], usages: list[Usage], recorded: int | None) -> dict[int, int | None]:
    """By the rank of gate_up: how many of its first ranks belong to w1; the others belong to w3. None where w1 and w3
    share all ranks. Without a record, halves are tried first, because peft fuses separate adapters so."""
    splits: dict[int, int | None] = {}
    for rank in {pair.rank for pair in pairs if pair.kind == "gate_up"}:
        alike = [u for pair, u in zip(pairs, usages, strict=True) if pair.kind == "gate_up" and pair.rank == rank]
        first = np.flatnonzero(np.any([u.first_MR.any(axis=0) for u in alike], axis=0))
        second = np.flatnonzero(np.any([u.second_MR.any(axis=0) for u in alike], axis=0))
        least, most = (int(first[-1]) + 1 if first.size else 0), (int(second[0]) if second.size else rank)
        wanted = [*([] if recorded is None else [recorded]), *([] if rank % 2 else [rank // 2]), least]
        untrained = not first.size and not second.size and recorded is None
        fitting = [] if untrained else [split for split in wanted if least <= split <= most]
        splits[rank] = fitting[0] if fitting else None
    return splits


def parts_of(pair: Pair, splits: dict[int, int | None], ffn: int) -> tuple[Part, ...]:
    if pair.kind != "gate_up":
        return (Part("w2" if pair.kind == "down" else pair.kind, slice(None), slice(None)),)
    split = splits[pair.rank]
    w1, w3 = (slice(None), slice(None)) if split is None else (slice(split), slice(split, None))
    both = (Part("w1", w1, slice(ffn)), Part("w3", w3, slice(ffn, None)))
    return tuple(part for part in both if len(range(*part.ranks.indices(pair.rank))))


def conversion_of(content: Content, settings: PeftSettings, recorded: int | None, model: Mixtral) -> Conversion:
    """Reads every factor once and decides which adapters it becomes."""
    pairs = content.pairs
    usages = [usage_of(pair, model) for pair in pairs]
    splits = splits_of(pairs, usages, recorded)
    parts = [parts_of(pair, splits, model.config.intermediate_size) for pair in pairs]
    present: dict[MatrixKey, tuple[int, float]] = {}
    zero = 0
    for pair, usage, ours in zip(pairs, usages, parts, strict=True):
        for part, (place, index) in itertools.product(ours, enumerate(usage.index)):
            b_MR = usage.second_MR if part.kind == "w3" else usage.first_MR
            used_R = (usage.a_MR[place] | b_MR[place])[part.ranks]
            if (part.kind, index) in present:
                raise BimedixError(f"{settings.source} has two adapters for {part.kind} at {index}; remove one.")
            if used_R.any():
                present[part.kind, index] = (used_R.size, pair.scale)
            zero += not used_R.any()
    if zero:
        log.warning("%d matrices have factors that are all zero; they get no adapter.", zero)
    if not present and not content.routers:
        raise BimedixError(f"The adapter of {settings.source} is zero everywhere and changes nothing; use another one.")
    scales = {
        kind: collections.Counter(scale for (k, _), (_, scale) in present.items() if k == kind).most_common(1)[0][0]
        for kind in LORA_TARGETS
        if any(k == kind for k, _ in present)
    }
    return Conversion(config_of(present, scales, settings, bool(content.routers), model), parts, present, scales)


def config_of(
    present: Mapping[MatrixKey, tuple[int, float]],
    scales: Mapping[str, float],
    settings: PeftSettings,
    train_router: bool,
    model: Mixtral,
) -> LoraConfig:
    """The configuration of these adapters: one rank and scale for each kind, and targets that match only the adapted
    matrices."""
    ranks = {kind: max(rank for (k, _), (rank, _) in present.items() if k == kind) for kind in scales}
    for kind, rank in ranks.items():
        other = [
            (r, scale) for (k, _), (r, scale) in present.items() if k == kind and (r, scale) != (rank, scales[kind])
        ]
        if other:
            log.warning(
                "%d adapters of %s have another rank or scale than %d and %g; they are padded with zeros and rescaled.",
                len(other),
                kind,
                rank,
                scales[kind],
            )
    alphas = {
        kind: without_rounding_error(scales[kind] * (rank**0.5 if settings.rank_stabilised else rank))
        for kind, rank in ranks.items()
    }
    usual = collections.Counter((ranks[kind], alphas[kind]) for kind in scales).most_common(1)
    rank, alpha = usual[0][0] if usual else (settings.rank, settings.alpha)
    overrides = [
        LoraOverride(
            target=kind,
            rank=None if ranks[kind] == rank else ranks[kind],
            alpha=None if alphas[kind] == alpha else alphas[kind],
        )
        for kind in scales
        if (ranks[kind], alphas[kind]) != (rank, alpha)
    ]
    targets = [target for kind in scales for target in targets_of(kind, [i for k, i in present if k == kind], model)]
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        targets=tuple(targets),
        rank_stabilised=settings.rank_stabilised,
        dropout=settings.dropout,
        overrides=tuple(overrides),
        train_router=train_router,
    )


def without_rounding_error(value: float) -> float:
    """`value` without the rounding error of a division: a short decimal, if `value` is within 1e-12 of one."""
    short = round(value, 6)
    return short if math.isclose(short, value, rel_tol=1e-12) else value


def targets_of(kind: str, indices: list[tuple[int, ...]], model: Mixtral) -> list[str]:
    """The name of a kind, or patterns that match only these of its matrices."""
    path, layer = next((path, layer) for path, layer in linears(model).items() if path[-1] == kind)
    lead = layer.w.get_value().shape[:-2]
    if len(indices) == math.prod(lead):
        return [kind]
    stack, *middle, _ = path
    by_layer = collections.defaultdict[int, list[int]](list)
    for index in sorted(indices):
        by_layer[index[0]] += index[1:]
    groups = collections.defaultdict[tuple[int, ...], list[int]](list)
    for number, experts in by_layer.items():
        groups[tuple(experts)].append(number)
    patterns = []
    for experts, layers in groups.items():
        inner = ["experts", number_pattern(experts, lead[1])] if len(lead) == 2 else []
        patterns.append(r"\.".join([stack, number_pattern(layers, lead[0]), *middle, *inner, kind]))
    return patterns


def number_pattern(numbers: Sequence[int], total: int) -> str:
    """A pattern that matches these numbers of range(total)."""
    if len(numbers) == total:
        return r"\d+"
    return str(numbers[0]) if len(numbers) == 1 else f"({'|'.join(map(str, numbers))})"


def with_factors(model: Mixtral, content: Content, conversion: Conversion) -> Mixtral:
    """The model with adapters, whose factors are read from the file."""
    skeleton = add_lora(Mixtral(model.config), conversion.config)
    bare = {path: layer for path, layer in linears(skeleton).items() if layer.lora is not None}
    factors = {}
    for path, layer in bare.items():
        assert layer.lora is not None
        pair = [buffers.aligned_empty(f.get_value().shape, np.float32) for f in (layer.lora.a, layer.lora.b)]
        for factor in pair:
            factor[...] = 0
        factors[path[-1]] = (*pair, factor_indices(layer))
    for pair, parts in zip(content.pairs, conversion.parts, strict=True):
        for index, a, b in matrices(pair, model.config.router.num_experts):
            for part in parts:
                if (part.kind, index) in conversion.present:
                    all_a, all_b, place = factors[part.kind]
                    rank, scale = conversion.present[part.kind, index]
                    all_a[place[index]][:, :rank] = a[:, part.ranks]
                    all_b[place[index]][:rank] = b[part.ranks, part.outputs]
                    if scale != conversion.scales[part.kind]:
                        all_b[place[index]] *= np.float32(scale / conversion.scales[part.kind])
    adapted = nnx.merge(*nnx.split(model), copy=True)
    layers = linears(adapted)
    for path, layer in bare.items():
        assert layer.lora is not None
        a, b, _ = factors.pop(path[-1])
        layer.lora.a.set_value(jax.device_put(a))
        layer.lora.b.set_value(jax.device_put(b))
        layers[path].lora = layer.lora
    if content.routers:
        router = layers["layers", "moe", "router"]
        weights = np.stack([router_of(content.routers[i]).T for i in range(model.config.num_layers)])
        router.w = TrainedParam(jax.device_put(weights), axes=router.w.get_metadata("axes"))
    adapted.lora = conversion.config
    return adapted


def router_of(copies: list[StoredTensor]) -> np.ndarray:
    """The router of a layer; raises BimedixError where two names have two values."""
    value = read_finite(copies[0])
    if any(not np.array_equal(value, read_finite(copy)) for copy in copies[1:]):
        raise BimedixError(f"{copies[0].path}: {copies[0].name} and {copies[1].name} differ; save the adapter again.")
    return value
