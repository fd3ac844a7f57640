"""The native formats of this project: a whole model (with adapters, 4-bit leaves unchanged), or its adapters only.

A model folder restores to exactly the model that was saved:

    bimedix.json           format, architecture, dtype, adapters, and how each 4-bit weight is stored
    model.safetensors      every leaf by its dotted path, or shards with an index; NF4 weights as `<path>.packed`, ...
    manifest.json          SHA-256 of every file
    tokenizer files        if the model was loaded from a folder that has them

An adapter folder contains the trained parameters and identifies their base:

    adapter.json           rank, alpha, targets, router variant and its parameters, and the identity and storage of the
                           base; older folders have it as adapter_config.json, the name of PEFT's file
    adapter.safetensors    `<linear>.lora.a` [..., in, R] and `<linear>.lora.b` [..., R, out], float32; where a target
                           matches only some matrices, their factors are in row-major order; routers that trained in
                           full; the router variant's state that is not trained by gradients, layers.moe.state
    manifest.json
"""

import dataclasses
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from pydantic import BaseModel
from safetensors.numpy import save_file

from bimedix_jax import distributed
from bimedix_jax.adapters import add_lora, is_trainable
from bimedix_jax.checkpoint import buffers, hub
from bimedix_jax.checkpoint.identity import BaseJson, base_record, check_base, warn_storage
from bimedix_jax.checkpoint.identity import base_identity as base_identity
from bimedix_jax.checkpoint.integrity import verify_manifest, write_manifest
from bimedix_jax.checkpoint.safetensors_io import StoredTensor, TensorSpec, pieces, read_folder, read_header
from bimedix_jax.checkpoint.stream import Piece, stream_to
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import parse
from bimedix_jax.files import new_folder, peek_json, read_json, validate
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.stacks import as_tensor
from bimedix_jax.models.config import LoraConfig, MixtralConfig, RouterConfig, Storage
from bimedix_jax.models.init import with_router
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.moe import RouterState

MODEL_CONFIG, MODEL_FORMAT = "bimedix.json", "bimedix model 2"
ADAPTER_CONFIG, ADAPTER_FORMAT = "adapter.json", "bimedix adapter 4"
OLDER_CONFIG = "adapter_config.json"
OLDER_ADAPTERS = ("bimedix adapter 3", "bimedix adapter 2")
"""3 has OLDER_CONFIG and does not record the storage of the base; 2 names no router either."""
ADAPTER_WEIGHTS = "adapter.safetensors"
NF4_PARTS = ("packed", "absmax", "nested_absmax", "nested_offset")


class NF4Json(BaseModel, extra="forbid"):
    """How one 4-bit weight is stored: the fields of its NF4Tensor that are not arrays."""

    unit_shape: tuple[int, ...]
    transposed: bool
    block_size: int
    dtype: str


class ModelJson(BaseModel):
    """bimedix.json."""

    config: dict[str, Any]
    dtype: str
    lora: dict[str, Any] | None
    trained_over: Storage | None = None
    nf4: dict[str, NF4Json]


class AdapterJson(BaseModel, extra="allow"):
    """adapter.json; the fields of its LoraConfig are beside these."""

    base: BaseJson
    router: dict[str, Any] = {}


Versioned = TypeVar("Versioned", bound=BaseModel)


def is_native(folder: str | Path) -> bool:
    """Whether `save` wrote this folder."""
    return (Path(folder) / MODEL_CONFIG).is_file()


def is_adapter(folder: str | Path) -> bool:
    """Whether `save_adapter` wrote this folder."""
    return peek_json(adapter_path(folder)).get("format") in (ADAPTER_FORMAT, *OLDER_ADAPTERS)


def adapter_path(folder: str | Path) -> Path:
    """adapter.json of an adapter folder, or adapter_config.json of an older one."""
    older, path = Path(folder) / OLDER_CONFIG, Path(folder) / ADAPTER_CONFIG
    return older if older.is_file() and not path.is_file() else path


def save(model: Mixtral, folder: str | Path, overwrite: bool = False) -> Path:
    """Writes the whole model, leaf by leaf, with one piece of a leaf in additional memory.

    Raises:
      BimedixError: the folder is not empty, or cannot be written.
    """
    values = leaves_of(model)
    arrays = dict(stored_arrays(values))
    specs = [TensorSpec(name, np.dtype(array.dtype), tuple(array.shape)) for name, array in arrays.items()]
    config = {
        "format": MODEL_FORMAT,
        "config": dataclasses.asdict(model.config),
        "dtype": model.dtype,
        "lora": None if model.lora is None else dataclasses.asdict(model.lora),
        "trained_over": None if model.trained_over is None else dataclasses.asdict(model.trained_over),
        "nf4": {path: nf4_layout(value) for path, value in values.items() if isinstance(value, NF4Tensor)},
    }

    def leaves() -> Iterator[Piece]:
        for spec in specs:
            for first, rows in host_pieces(arrays[spec.name], spec):
                yield spec.name, first, rows

    def finish(partial: Path) -> None:
        origin = getattr(model, "origin", None)
        if origin is not None and Path(origin).is_dir():
            hub.copy_companions(Path(origin), partial)
        (partial / MODEL_CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        write_manifest(partial)

    return stream_to(folder, specs, leaves(), "saving", finish, overwrite)


def restore(folder: str | Path, verify: bool = True, mapped: bool = False) -> Mixtral:
    """The model that `save` wrote. Needs the memory of the model and no more.

    Args:
      verify: first compare every file with the manifest, which reads the files one more time.
      mapped: return memory-mapped NumPy arrays, which are read when they are used.

    Raises:
      BimedixError: the folder is not in the native format or is damaged, or its tensors do not fit its configuration.
    """
    folder = Path(folder)
    config = read_config(folder / MODEL_CONFIG, ModelJson, MODEL_FORMAT)
    if verify:
        distributed.on_process_zero(lambda: verify_manifest(folder))
    model = Mixtral(parse(MixtralConfig, config.config, f"config in {folder}"), config.dtype)
    lora = parse(LoraConfig | None, config.lora, f"lora in {folder}")
    model = model if lora is None else add_lora(model, lora)
    fill(model, read_folder(folder), config.nf4, str(folder), mapped=mapped)
    model.origin, model.trained_over = str(folder), config.trained_over
    warn_storage(config.trained_over, model, folder)
    return model


def save_adapter(model: Mixtral, folder: str | Path, overwrite: bool = False) -> Path:
    """Writes the adapters of `model` and the identity of its base.

    Raises:
      BimedixError: the model has no adapters, or the folder cannot be written.
    """
    config = model.lora
    if config is None:
        raise BimedixError("This model has no adapters; save the whole model instead.")
    record = {
        "format": ADAPTER_FORMAT,
        **dataclasses.asdict(config),
        "router": dataclasses.asdict(model.config.router),
        "base": base_record(model),
    }
    trained = {path: np.asarray(value) for path, value in leaves_of(model, saved_with_adapters(model)).items()}
    with new_folder(folder, overwrite) as partial:
        save_file(trained, partial / ADAPTER_WEIGHTS)
        (partial / ADAPTER_CONFIG).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        write_manifest(partial)
    return Path(folder)


def load_adapter(model: Mixtral, folder: str | Path) -> Mixtral:
    """`model` with the adapters of a folder; its base is shared, not copied. Warns where that has another storage than
    the base in training.

    Raises:
      BimedixError: the folder is damaged or not in the native format, was made for another base or contains NaN, or the
        model already has adapters.
    """
    folder = Path(folder)
    config = adapter_config(model, folder)
    verify_manifest(folder)
    adapted = add_lora(with_router(model, adapter_router(model, folder)), config, seed=None)
    trained = list(leaves_of(adapted, saved_with_adapters(adapted)))
    fill(adapted, read_header(folder / ADAPTER_WEIGHTS), {}, str(folder), trained)
    found = leaves_of(adapted, saved_with_adapters(adapted))
    broken = [path for path, value in found.items() if not np.isfinite(value).all()]
    if broken:
        raise BimedixError(f"{folder} contains NaN or infinity in {', '.join(broken[:3])}; use an earlier checkpoint.")
    adapted.trained_over = adapter_storage(folder)
    warn_storage(adapted.trained_over, model, folder)
    return adapted


def adapter_config(model: Mixtral, folder: Path) -> LoraConfig:
    """The configuration of a saved adapter that belongs to `model`.

    Raises:
      BimedixError: the folder is not in the native format, or was made for another base.
    """
    record = read_adapter_config(folder)
    check_base(record.base, model, folder)
    return lora_config(record, adapter_path(folder))


def lora_config(record: AdapterJson, source: Path) -> LoraConfig:
    """The part of adapter.json that describes the adapters."""
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    fields = {name: value for name, value in (record.model_extra or {}).items() if name in names}
    missing = sorted(names - fields.keys())
    if missing:
        raise BimedixError(f"{source} lacks the key {missing[0]}; copy the folder again.")
    return parse(LoraConfig, fields, str(source))


def read_adapter_config(folder: str | Path) -> AdapterJson:
    """adapter.json of a folder that `save_adapter` wrote."""
    return read_config(adapter_path(folder), AdapterJson, ADAPTER_FORMAT, *OLDER_ADAPTERS)


def adapter_storage(folder: str | Path) -> Storage | None:
    """The storage that the adapter in a folder was trained over: the record in adapter.json, or that of the run which
    contains an older folder; None if neither is known."""
    recorded = read_adapter_config(folder).base.storage
    run = Path(folder).resolve().parent / "config.json"
    if recorded is not None or "optimiser" not in (config := peek_json(run)):
        return recorded
    match config.get("model"):
        case {"path": path, "random": random, "base": str(base), "dtype": dtype} if path or random:
            return Storage(base=base, dtype=dtype or ("bfloat16" if base == "nf4" else base))
    return None  # the base was passed in memory


def adapter_router(model: Mixtral, folder: Path) -> RouterConfig:
    """The router that an adapter was trained with; that of `model` where the folder names none."""
    record = read_adapter_config(folder)
    if "router" not in record.model_fields_set:
        return model.config.router
    return parse(RouterConfig, record.router, f"router in {adapter_path(folder)}")


def saved_with_adapters(model: Mixtral) -> Any:
    """Filter for the content of an adapter folder: trained parameters, and router state that is not trained by
    gradients."""
    return nnx.filterlib.Any(is_trainable(model), RouterState)


STORED = nnx.filterlib.Any(nnx.Param, RouterState)


def leaves_of(model: Mixtral, kind: Any = STORED) -> dict[str, Any]:
    """Every variable that matches `kind` (a filter of nnx) by its dotted path: arrays and NF4Tensors."""
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {".".join(map(str, path)): as_tensor(variable.get_value()) for path, variable in flat}


def stored_arrays(values: dict[str, Any]) -> list[tuple[str, jax.Array]]:
    """The arrays to write: the parts of every NF4Tensor, and all other leaves unchanged."""
    arrays = []
    for path, value in values.items():
        if isinstance(value, NF4Tensor):
            parts = [(part, getattr(value, part)) for part in NF4_PARTS]
            arrays += [(f"{path}.{part}", array) for part, array in parts if array is not None]
        else:
            arrays.append((path, value))
    return arrays


def host_pieces(array: jax.Array, spec: TensorSpec) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of an array: views on CPU, elsewhere one piece at a time is copied to the host."""
    if all(device.platform == "cpu" for device in array.devices()):
        view: Any = np.asarray(array)
    else:
        view = array
    for first, count in pieces(spec):
        yield first, np.asarray(view[first : first + count] if spec.shape else view)


def nf4_layout(value: NF4Tensor) -> dict[str, Any]:
    return {
        "unit_shape": list(value.unit_shape),
        "transposed": value.transposed,
        "block_size": value.block_size,
        "dtype": value.dtype,
    }


def fill(
    model: Mixtral,
    tensors: dict[str, StoredTensor],
    packed: dict[str, NF4Json],
    source: str,
    only: Collection[str] | None = None,
    mapped: bool = False,
) -> None:
    """Reads every parameter, or only those at the paths `only`, into `model`, one leaf at a time.

    Raises:
      BimedixError: a tensor is missing or unknown, or differs from the model's in shape or dtype.
    """
    left = dict(tensors)
    for path, variable in nnx.to_flat_state(nnx.state(model, STORED)):
        name = ".".join(map(str, path))
        if only is not None and name not in only:
            continue
        expected = variable.get_value()
        if name in packed:
            parts = {
                part: take(left, f"{name}.{part}", source, mapped) if f"{name}.{part}" in left else None
                for part in NF4_PARTS
            }
            if parts["packed"] is None or parts["absmax"] is None:
                raise BimedixError(f"{source} lacks parts of the 4-bit weight {name}; save the model again.")
            value = NF4Tensor(**parts, **packed[name].model_dump())
            fits = value.shape == tuple(expected.shape)
        else:
            value = take(left, name, source, mapped)
            fits = (value.shape, value.dtype) == (tuple(expected.shape), expected.dtype)
        if not fits:
            raise BimedixError(
                f"{source} has {name} with shape {list(value.shape)}, the model needs {list(expected.shape)}."
            )
        target: Any = model
        for part in path:
            target = getattr(target, str(part))
        target.set_value(value)
    if left:
        raise BimedixError(
            f"{source} contains {len(left)} tensors that the model does not have ({next(iter(left))}); save it again."
        )


def take(left: dict[str, StoredTensor], name: str, source: str, mapped: bool) -> Any:
    """Reads the tensor `name` into a jax array (memory-maps it if `mapped`), and removes it from `left`."""
    if name not in left:
        raise BimedixError(f"{source} lacks the tensor {name}; save it again.")
    tensor = left.pop(name)
    if mapped:
        return np.memmap(tensor.path, tensor.dtype, "r", tensor.start, tensor.shape)
    return jax.device_put(tensor.read(out=buffers.aligned_empty(tensor.shape, tensor.dtype)))


def read_config(path: Path, schema: type[Versioned], *formats: str) -> Versioned:
    """The JSON object at `path`, of one of these formats."""
    remedy = "name a folder that bimedix wrote, or copy the folder again"
    raw = read_json(path, dict[str, Any], remedy)
    if raw.get("format") not in formats:
        raise BimedixError(f"{path} has format {raw.get('format')!r}, expected {formats[0]!r}; {remedy}.")
    return validate(raw, schema, str(path), remedy)
