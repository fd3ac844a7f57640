"""One `load` for everything that holds a model: what the folder contains decides who reads it."""

from collections.abc import Collection
from pathlib import Path

import jax
from jax.sharding import Mesh

from bimedix_jax import sharding
from bimedix_jax.checkpoint import hub, store
from bimedix_jax.checkpoint.hf import Base, load_hf, parameters
from bimedix_jax.checkpoint.peft import is_peft
from bimedix_jax.checkpoint.peft_read import load_peft
from bimedix_jax.errors import BimedixError
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.models.mixtral import Mixtral


def load(
    path: str | Path,
    base: Base | None = None,
    adapter: str | Path | None = None,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    ignore_config_keys: Collection[str] = (),
) -> Mixtral:
    """A Mixtral, ready to run; it remembers the folder (`model.origin`) for exports.

    Args:
      path: folder in Hugging Face layout, hub id, or native checkpoint.
      base: storage of the weights; "nf4" packs attention and experts to 4 bits on the way in. None: bfloat16, and of a
        native checkpoint or one that bitsandbytes packed what it holds.
      adapter: folder of an adapter to put on, ours or PEFT's.
      mesh: devices to put it on, see bimedix_jax/sharding.py. A process reads of a native checkpoint what its own
        devices hold, and of another folder its own experts and everything else (the scales of a 4-bit matrix are
        quantised together).
      dtype: of the computation; by default that of the base, and bfloat16 for "nf4". A native checkpoint has its own,
        and one that bitsandbytes packed names it in config.json.
      revision: of a hub id.
      ignore_config_keys: keys of config.json to overlook although they are unknown.
    Raises:
      BimedixError: what was asked for cannot be read, with the remedy.
    """
    if mesh is None:
        return read_model(path, base, adapter, None, dtype, revision, ignore_config_keys)
    with sharding.host_memory():
        model = read_model(path, base, adapter, mesh, dtype, revision, ignore_config_keys)
    return sharding.place(model, mesh)


def read_model(
    path: str | Path,
    base: Base | None,
    adapter: str | Path | None,
    mesh: Mesh | None,
    dtype: str | None = None,
    revision: str | None = None,
    ignore_config_keys: Collection[str] = (),
) -> Mixtral:
    """`load` without the last step: for a mesh, arrays in host memory that hold what this process's devices need."""
    if adapter is not None and not is_peft(adapter):
        store.read_config(Path(adapter) / store.ADAPTER_CONFIG, store.ADAPTER_FORMAT)  # said before the base is read
    folder = hub.resolve(path, revision)
    if store.is_native(folder):
        if revision is not None or ignore_config_keys:
            raise BimedixError(
                f"{folder} is a native checkpoint, which has no revision and no config.json to overlook."
            )
        model = restored(folder, base, dtype, mapped=mesh is not None)
    else:
        model = load_hf(folder, base, dtype, ignore_config_keys, mesh)
    if adapter is not None:
        model = load_peft(model, adapter) if is_peft(adapter) else store.load_adapter(model, adapter)
    model.origin = str(folder)
    return model


def restored(folder: Path, base: Base | None, dtype: str | None, mapped: bool) -> Mixtral:
    """A native checkpoint as it was saved; raises BimedixError where another storage or dtype is asked for."""
    model = store.restore(folder, mapped=mapped)
    values = [variable.get_value() for variable in parameters(model).values()]
    packed = any(isinstance(value, NF4Tensor) for value in values)
    held = "nf4" if packed else str(jax.tree.leaves(values)[0].dtype)
    for what, asked, found in (("base", base, held), ("dtype", dtype, model.dtype)):
        if asked is not None and asked != found:
            raise BimedixError(
                f"{folder} was saved with {what} {found}, not {asked}; leave {what} out, or start from the Hugging "
                "Face folder."
            )
    return model
