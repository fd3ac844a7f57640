"""Merges adapters into their base weights and writes a Hugging Face folder without adapters, piece by piece.

Adapters that were trained over a 4-bit base can be merged into two sets of weights: the original 16-bit ones, which are
closer to the base model, or the dequantised ones, which were used in training. In both cases 16-bit weights lose small
deltas by rounding, and routers may choose other experts. `Merged` and `bimedix_jax.routing.drift` measure how much.
"""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bimedix_jax.adapters import factor_indices, linears
from bimedix_jax.checkpoint import hub, table
from bimedix_jax.checkpoint.bnb_config import is_packed
from bimedix_jax.checkpoint.bnb_format import PackedTensor
from bimedix_jax.checkpoint.dtypes import COMPUTE
from bimedix_jax.checkpoint.hf import companion_folder, parameters, require_topk, stored_pieces, write_companions
from bimedix_jax.checkpoint.hf_config import CONFIG_NAME, raw_config, read_config
from bimedix_jax.checkpoint.hf_tensors import read_tensors
from bimedix_jax.checkpoint.rounding import Rounding, read_pieces
from bimedix_jax.checkpoint.safetensors_io import TensorSpec
from bimedix_jax.checkpoint.stream import MAX_SHARD_BYTES, Piece, stream_to
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.linear import ExpertLinear, Linear
from bimedix_jax.models.mixtral import Mixtral

log = logging.getLogger(__name__)

Into = Literal["original", "dequantised"]
LARGE_LOSS = 0.1
"""Share of the deltas lost by rounding above which a merge warns."""

WeightRows = tuple[table.Row, tuple[int, ...], int, np.ndarray]
"""(row of the conversion table, (layer, expert), first row, rows of the matrix as Hugging Face orients it)."""


@dataclasses.dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Attributes:
      matrices: how many matrices got a delta, by target.
      delta_norm: Frobenius norm of the deltas, by target.
      rounding_loss: norm of (written - weight in that precision - delta), divided by the norm of the deltas, by target:
        the share of the fine-tuning that is lost in the written precision.
    """

    folder: Path
    into: Into
    dtype: str
    matrices: dict[str, int]
    delta_norm: dict[str, float]
    rounding_loss: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "folder": str(self.folder)}


class Sums:
    """Squared norms by target and rounded weights, over all pieces."""

    def __init__(self) -> None:
        self.matrices: dict[str, set[tuple[int, ...]]] = {}
        self.deltas: dict[str, float] = {}
        self.losses: dict[str, float] = {}
        self.rounding = Rounding()

    def add(self, target: str, index: tuple[int, ...], delta: np.ndarray, loss: np.ndarray) -> None:
        self.matrices.setdefault(target, set()).add(index)
        self.deltas[target] = self.deltas.get(target, 0.0) + float(np.vdot(delta, delta))
        self.losses[target] = self.losses.get(target, 0.0) + float(np.vdot(loss, loss))


def export_merged(
    model: Mixtral,
    folder: str | Path,
    into: Into,
    original: str | Path | None = None,
    dtype: str = "bfloat16",
    tokenizer_from: str | Path | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Merged:
    """Writes the model with its adapters merged, in hub layout. transformers loads it as an ordinary Mixtral.

    Args:
      into: "dequantised" adds the deltas to the weights of `model`; "original" adds them to the weights in the folder
        `original`, by default the one that the model was loaded from.
      dtype: of the written weights, bfloat16 or float32.
    Raises:
      BimedixError: the model has no adapters, `original` is not its unquantised base, or a folder cannot be written.
    """
    require_topk(model, "A merged checkpoint in Hugging Face's layout")
    if model.lora is None:
        raise BimedixError("The model has no adapters to merge; load it with adapter=FOLDER.")
    layers = {".".join(path): layer for path, layer in linears(model).items()}
    entries = table.named_entries(model.config).items()
    specs = [TensorSpec(name, COMPUTE[dtype], table.unit_shape(row, model.config)) for name, (row, _) in entries]
    values = {path: variable.get_value() for path, variable in parameters(model).items()}
    source = original_folder(model, original) if into == "original" else None
    companions = companion_folder(model, tokenizer_from if tokenizer_from is not None else source)
    sums, trained_router = Sums(), model.lora.train_router

    def merged() -> Iterator[Piece]:
        for row, index, first, rows in (
            model_pieces(model, values) if source is None else original_pieces(model, source)
        ):
            # a router that was trained in full is taken from the model
            if source is not None and row.path == "layers.moe.router.w" and trained_router:
                rows = np.asarray(values[row.path][index]).T[first : first + len(rows)]
            elif source is not None and row.path not in QUANTISABLE:
                require_same(rows, values[row.path], row, index, first, source)
            layer = layers.get(row.path.removesuffix(".w"))
            yield table.named(row.name, index), first, merge_piece(layer, row, index, first, rows, dtype, sums)

    def finish(partial: Path) -> None:
        write_companions(partial, model.config, dtype, companions)

    written = stream_to(folder, specs, merged(), "merging", finish, overwrite, max_shard_bytes)
    sums.rounding.warn(f"{source or 'the base of the model'}, before the merge", "dtype float32 keeps them")
    return summary(written, into, dtype, sums)


QUANTISABLE = frozenset(
    row.path for row in table.TABLE if row.transposed and row.path not in ("layers.moe.router.w", "lm_head.w")
)
"""Weights that a 4-bit base rounds, so that they cannot be compared with the original ones."""


def original_folder(model: Mixtral, original: str | Path | None) -> Path:
    """The unquantised base of a model."""
    source = original if original is not None else model.origin
    if source is None:
        raise BimedixError("The model was not loaded from a folder with the original weights; pass original=FOLDER.")
    folder = Path(source)
    if not (folder / CONFIG_NAME).is_file():
        raise BimedixError(
            f"{folder} is not a Hugging Face folder; pass the base's folder as original, or choose dequantised."
        )
    if read_config(folder) != model.config:
        raise BimedixError(f"{folder} has another architecture than the model; pass the model's base as original.")
    hub.require_safetensors(folder)
    if is_packed(raw_config(folder), folder):
        raise BimedixError(
            f"{folder} contains 4-bit weights, not the original ones; name those, or choose dequantised."
        )
    return folder


def model_pieces(model: Mixtral, values: dict[str, Any]) -> Iterator[WeightRows]:
    """The model's own weights, 4-bit ones dequantised."""
    for row, index in table.named_entries(model.config).values():
        shape = table.unit_shape(row, model.config)
        spec = TensorSpec(row.name, np.dtype(values[row.path].dtype), shape)
        for first, rows in stored_pieces(values[row.path], index, spec, row.transposed):
            yield row, index, first, rows


def original_pieces(model: Mixtral, folder: Path) -> Iterator[WeightRows]:
    """The weights of a Hugging Face folder; raises BimedixError for those that are packed or not finite."""
    for unit in table.units(read_tensors(folder, model.config), model.config, str(folder)):
        if isinstance(unit.tensor, PackedTensor):
            raise BimedixError(f"{folder} is packed in 4 bits; name the unquantised base, or merge into dequantised.")
        for first, rows in read_pieces(unit.tensor, unit.first_row, unit.shape):
            yield unit.row, unit.index, first, rows


def require_same(rows: np.ndarray, held: Any, row: table.Row, index: tuple[int, ...], first: int, source: Path) -> None:
    """Raises BimedixError where a weight that is never rounded differs, so that `source` is another base."""
    own = np.asarray(held[index])
    own = (own.T if row.transposed else own)[first : first + len(rows)]
    if not np.array_equal(rows.astype(own.dtype), own):
        raise BimedixError(
            f"{table.named(row.name, index)} in {source} differs from the model's; pass the base that the adapters "
            "were trained on as original, or merge into dequantised."
        )


def factors_of(layer: Linear | ExpertLinear, index: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, float] | None:
    """(a [in, R], b [R, out], scale) of one matrix of a layer; None where it has no adapter."""
    if layer.lora is None:
        return None
    place = factor_indices(layer).get(index)
    if place is None:
        return None
    a, b = layer.lora.a.get_value(), layer.lora.b.get_value()
    return np.asarray(a[place]), np.asarray(b[place]), layer.lora.scale


def merge_piece(
    layer: Linear | ExpertLinear | None,
    row: table.Row,
    index: tuple[int, ...],
    first: int,
    rows: np.ndarray,
    dtype: str,
    sums: Sums,
) -> np.ndarray:
    """Rows of one matrix plus their delta, in the written dtype. Adds the loss by rounding to `sums`."""
    found = None if layer is None else factors_of(layer, index)
    if found is None:
        return sums.rounding.cast(rows, COMPUTE[dtype], table.named(row.name, index))
    a, b, scale = found
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise BimedixError(f"The adapter of {table.named(row.name, index)} contains NaN or infinity; use another one.")
    delta = np.float32(scale) * (b[:, first : first + len(rows)].T @ a.T)
    written = (rows.astype(np.float32) + delta).astype(COMPUTE[dtype])
    # the rounding of the weight itself is no loss of the delta
    unmerged = sums.rounding.cast(rows, COMPUTE[dtype], table.named(row.name, index)).astype(np.float32)
    sums.add(row.path.split(".")[-2], index, delta, written.astype(np.float32) - unmerged - delta)
    return written


def summary(folder: Path, into: Into, dtype: str, sums: Sums) -> Merged:
    """The report; warns where rounding lost a large share."""
    norms = {target: value**0.5 for target, value in sums.deltas.items()}
    losses = {target: sums.losses[target] ** 0.5 / norm if norm else 0.0 for target, norm in norms.items()}
    large = [f"{target} {share:.0%}" for target, share in losses.items() if share > LARGE_LOSS]
    if large:
        log.warning(
            "%s weights lose a part of the fine-tuning: rounding loses %s of the deltas' norm; float32 keeps it.",
            dtype,
            ", ".join(large),
        )
    if norms and not any(norms.values()):
        log.warning("every delta is zero: the adapters have not been trained, and the merged model is the base.")
    counts = {target: len(indices) for target, indices in sums.matrices.items()}
    return Merged(folder, into, dtype, counts, norms, losses)
