"""Hugging Face folders -> model, and back: streaming, without torch, byte-identical in bfloat16.

Loading needs the memory of the finished model and a few megabytes: every leaf is allocated once and filled in the
order of the file. NF4 leaves are filled matrix by matrix, so that no stacked tensor exists in floating point. The
4-bit bytes of a folder that bitsandbytes packed are copied unchanged.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from bimedix_jax.checkpoint import bnb_read, buffers, hub, table
from bimedix_jax.checkpoint.bnb_config import KEY, is_packed, stated_dtypes
from bimedix_jax.checkpoint.bnb_format import PackedTensor
from bimedix_jax.checkpoint.dtypes import COMPUTE
from bimedix_jax.checkpoint.hf_config import CONFIG_NAME, raw_config, read_config, write_config
from bimedix_jax.checkpoint.hf_tensors import read_tensors
from bimedix_jax.checkpoint.hub import resolve
from bimedix_jax.checkpoint.rounding import Rounding
from bimedix_jax.checkpoint.safetensors_io import TensorSpec, pieces
from bimedix_jax.checkpoint.stream import MAX_SHARD_BYTES, Piece, progress, stream_to
from bimedix_jax.errors import BimedixError
from bimedix_jax.kernels.nf4 import NF4Tensor, dequantize
from bimedix_jax.kernels.nf4.api import quantized_shapes
from bimedix_jax.kernels.nf4.rows import RowMajor
from bimedix_jax.kernels.stacks import as_tensor
from bimedix_jax.models.config import MixtralConfig, RouterConfig
from bimedix_jax.models.init import reset_router_state
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.sharding.rules import own_experts

__all__ = ["export_hf", "load_hf", "read_config", "resolve"]

_dequantize = jax.jit(dequantize)  # fused, it needs no float32 temporaries

log = logging.getLogger(__name__)

Base = Literal["bfloat16", "float32", "nf4"]
BASES = ("bfloat16", "float32", "nf4")
QUANTISED = frozenset(
    f"layers.{name}.w"
    for name in ("attention.q", "attention.k", "attention.v", "attention.o", "moe.w1", "moe.w2", "moe.w3")
)
"""Packed by base "nf4": attention and experts. Router, norms, embeddings and head keep the compute dtype."""

QUANTISED_AHEAD = 2
"""Matrices that are quantised while the next one is read."""


def load_hf(
    folder: Path,
    base: Base | None = None,
    dtype: str | None = None,
    ignore_config_keys: Collection[str] = (),
    mesh: Mesh | None = None,
) -> Mixtral:
    """A Mixtral from a folder in Hugging Face layout, hub (per expert) or transformers 5 (fused), packed or not.

    Args:
      base: storage of the weights; "nf4" casts to `dtype`, quantises attention and experts with double quantisation as
        bitsandbytes does, and keeps the rest in `dtype`. For a folder that bitsandbytes packed, None and "nf4" keep the
        4-bit bytes ("nf4" also quantises attention and experts that are in 16 bits), and the others dequantise exactly.
        For any other folder None means bfloat16.
      dtype: of the computation; by default that of the base. For "nf4" the default is bfloat16, and for a packed
        folder the dtype that its config.json names.
      mesh: the mesh that the model will be sharded over. The model then has NumPy arrays, and lacks the experts of
        other processes.
    Raises:
      BimedixError: the folder is damaged or incomplete, needs something that is not implemented, or has weights that
        are not finite.
    """
    compute_dtype(base or "nf4", dtype)
    config = read_config(folder, ignore_config_keys)
    hub.require_safetensors(folder)
    units = table.units(read_tensors(folder, config), config, str(folder))
    packed = check_packed(units, folder, ignore_config_keys)
    kept = bnb_read.kept_formats(units, base, QUANTISED)
    if packed and base in (None, "nf4"):
        compute = dtype or packed_dtype(folder)
    else:
        base = base or "bfloat16"
        compute = compute_dtype(base, dtype)
    model = Mixtral(config, compute)
    leaves = {
        row.path: buffers.allocate(abstract_leaf(row, config, base, compute, kept.get(row.path)))
        for row in table.rows_of(config)
    }
    if mesh is not None:
        own = own_experts(mesh, config.router.num_experts)
        units = [unit for unit in units if len(unit.index) < 2 or unit.index[1] in own]
    fill_leaves(leaves, units, base, folder)
    for path, variable in parameters(model).items():
        leaf = leaves.pop(path)
        variable.set_value(jax.device_put(leaf) if mesh is None else leaf)
    reset_router_state(model)
    return model


def fill_leaves(leaves: Mapping[str, Any], units: Sequence[table.Unit], base: Base | None, folder: Path) -> None:
    """Reads every unit into its leaf. Warns of weights that became zeros, and of values that a cast changed."""
    total = sum(unit.tensor.row_bytes * unit.shape[0] for unit in units)
    flushed, rounding = 0, Rounding()
    unfinished: deque[Callable[[], int]] = deque()
    with progress(total, f"loading {folder.name}") as bar:
        for unit in units:
            leaf = leaves[unit.row.path]
            if isinstance(leaf, NF4Tensor) and isinstance(unit.tensor, PackedTensor):
                bnb_read.fill_kept(leaf, unit.index, unit.tensor, unit.first_row, bar.update)
            elif isinstance(leaf, NF4Tensor):
                unfinished.append(buffers.fill_nf4(leaf, unit.index, unit.tensor, unit.first_row, bar.update))
                if len(unfinished) > QUANTISED_AHEAD:
                    flushed += unfinished.popleft()()
            else:
                target = leaf[unit.index]
                buffers.fill_array(target, unit.tensor, unit.first_row, unit.row.transposed, rounding, bar.update)
        flushed += sum(finish() for finish in unfinished)
    if flushed:
        log.warning("%d 4-bit blocks contain denormal weights, which became zeros.", flushed)
    in_part = 'base="float32" keeps them, and dtype="float32" of `bmx.load` those that are not packed'
    rounding.warn(str(folder), in_part if base in (None, "nf4") else "base float32 keeps them")


def check_packed(units: Sequence[table.Unit], folder: Path, ignore_config_keys: Collection[str]) -> bool:
    """Whether the folder has 4-bit tensors. Raises BimedixError where config.json declares them and there are none."""
    packed = any(isinstance(unit.tensor, PackedTensor) for unit in units)
    if not packed and KEY not in ignore_config_keys and is_packed(raw_config(folder), folder):
        raise BimedixError(
            f"{folder / CONFIG_NAME} declares 4-bit weights ({KEY}), but every tensor is unpacked; pass "
            f"--ignore-config-key {KEY} to load it anyway."
        )
    return packed


def packed_dtype(folder: Path) -> str:
    """The first dtype in the config.json of a packed folder that a model can compute in here."""
    stated = stated_dtypes(raw_config(folder))
    chosen = next((name for name in stated if name in COMPUTE), "bfloat16")
    if stated and stated[0] != chosen:
        log.warning(
            "%s computes in %s, which is not available here; %s is used (pass dtype to choose float32).",
            folder,
            stated[0],
            chosen,
        )
    return chosen


def compute_dtype(base: str, dtype: str | None) -> str:
    """The dtype of the computation for a base. Raises BimedixError for an unknown name."""
    for what, value, known in (("base", base, BASES), ("dtype", dtype, (*COMPUTE, None))):
        if value not in known:
            raise BimedixError(f"{what} {value!r} is unknown; choose {', '.join(name for name in known if name)}.")
    return dtype or ("bfloat16" if base == "nf4" else base)


def abstract_leaf(
    row: table.Row, config: MixtralConfig, base: str | None, compute: str, kept: bnb_read.PackedFormat | None = None
) -> Any:
    """The stacked parameter of a row as jax.ShapeDtypeStruct, or an NF4Tensor of them in the format `kept`."""
    counts = {"{layer}": config.num_layers, "{expert}": config.router.num_experts}
    batch = tuple(count for field, count in counts.items() if field in row.name)
    shape = table.unit_shape(row, config)
    if kept is not None or (base == "nf4" and row.path in QUANTISED):
        packed = kept or bnb_read.PackedFormat(64, compute, True)
        how = (packed.dtype, packed.block_size, packed.double_quantised)
        return quantized_shapes((*batch, *shape), *how, batch_dims=len(batch)).mT
    plain = COMPUTE[compute if base in (None, "nf4") else base]
    return jax.ShapeDtypeStruct((*batch, *(reversed(shape) if row.transposed else shape)), plain)


def parameters(model: Mixtral) -> dict[str, nnx.Variable]:
    """Every base weight by path; raises ValueError where the model and the conversion table differ."""
    rows = table.rows_of(model.config)
    found = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    found = {path: variable for path, variable in found.items() if ".lora." not in path}
    if set(found) != {row.path for row in rows}:
        raise ValueError(f"the conversion table does not cover {sorted(set(found) ^ {row.path for row in rows})}")
    for row in rows:
        leaf = abstract_leaf(row, model.config, "float32", "float32")
        if found[row.path].get_value().shape != leaf.shape:
            raise ValueError(f"{row.path} has shape {found[row.path].get_value().shape}, the table has {leaf.shape}")
        if isinstance(found[row.path].get_value(), RowMajor):
            found[row.path] = found[row.path].replace(as_tensor(found[row.path].get_value()))
    return found


def require_topk(model: Mixtral, what: str) -> None:
    """Raises BimedixError for a router variant that the format `what` cannot record: readers would run topk."""
    if (router := model.config.router) != RouterConfig(num_experts=router.num_experts, top_k=router.top_k):
        raise BimedixError(
            f"{what} always has the router topk, but this model's router is {router.variant}. Save it in our own "
            'format (bmx.save), or load the model with router="topk" to export its weights only.'
        )


def export_hf(
    model: Mixtral,
    folder: str | Path,
    tokenizer_from: str | Path | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes the hub layout: safetensors (sharded beyond max_shard_bytes), config.json, tokenizer and licence.

    Args:
      tokenizer_from: folder whose tokenizer, chat template, generation config, licence and neutral config.json keys are
        copied; None takes the folder the model was loaded from.
    Raises:
      BimedixError: the model has adapters, or a folder cannot be read or written.
    """
    require_topk(model, "A Hugging Face checkpoint of a Mixtral")
    adapters = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    if adapters:
        raise BimedixError(
            f"the model has {len(adapters)} adapter tensors, which do not fit in a Hugging Face checkpoint of the "
            "base; export the base without adapters, and save the adapters separately."
        )
    values = {path: variable.get_value() for path, variable in parameters(model).items()}
    packed = [path for path, value in values.items() if isinstance(value, NF4Tensor)]
    if packed:
        log.warning("%d of %d parameters are NF4 and are written dequantised.", len(packed), len(values))
    source = companion_folder(model, tokenizer_from)
    names = table.named_entries(model.config)
    specs = [
        TensorSpec(name, np.dtype(values[row.path].dtype), table.unit_shape(row, model.config))
        for name, (row, index) in names.items()
    ]

    def exported() -> Iterator[Piece]:
        for spec in specs:
            row, index = names[spec.name]
            for first, rows in stored_pieces(values[row.path], index, spec, row.transposed):
                yield spec.name, first, rows

    def finish(partial: Path) -> None:
        write_companions(partial, model.config, str(np.dtype(values["embed.table"].dtype)), source)

    return stream_to(folder, specs, exported(), "exporting", finish, overwrite, max_shard_bytes)


def write_companions(
    folder: Path, config: MixtralConfig, dtype: str, source: Path | None, quantisation: Mapping[str, Any] | None = None
) -> None:
    """Writes config.json, and copies the tokenizer and neutral config.json keys of the folder `source`, if any."""
    neutral = {}
    if source is not None:
        hub.copy_companions(source, folder)
        neutral = raw_config(source) if (source / CONFIG_NAME).exists() else {}
    write_config(folder, config, dtype, neutral, quantisation)


def companion_folder(model: Mixtral, tokenizer_from: str | Path | None) -> Path | None:
    """The folder to copy tokenizer and generation config from; None, with a warning, for a model without a folder."""
    origin = tokenizer_from if tokenizer_from is not None else getattr(model, "origin", None)
    if origin is None:
        log.warning(
            "no tokenizer is written, because the model was not loaded from a folder; pass tokenizer_from to copy one."
        )
        return None
    if not Path(origin).is_dir():
        raise BimedixError(f"{origin}, the folder to copy the tokenizer from, does not exist; pass tokenizer_from.")
    return Path(origin)


def stored_pieces(
    value: Any, index: tuple[int, ...], spec: TensorSpec, transposed: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows in Hugging Face orientation) of entry `index` of a stacked parameter."""
    if isinstance(value, NF4Tensor):
        unit = value[index] if index else value
        matrix = np.asarray(_dequantize(unit.mT if transposed else unit))
        transposed = False
    else:
        # on CPU np.asarray is a view of the whole leaf; elsewhere one entry at a time is fetched
        on_host = isinstance(value, np.ndarray) or next(iter(value.devices())).platform == "cpu"
        matrix = np.asarray(value)[index] if on_host else np.asarray(value[index])
    for first, count in pieces(spec):
        if not transposed:
            yield first, matrix[first : first + count]
            continue
        piece = np.empty((count, *spec.shape[1:]), spec.dtype)
        buffers.copy_transposed(piece, matrix[:, first : first + count])
        yield first, piece
