"""One `load` for every kind of model folder: the files in the folder decide how it is read."""

import dataclasses
import logging
from collections.abc import Collection
from pathlib import Path
from typing import cast

import jax
from jax.sharding import Mesh

from bimedix_jax import experiment as experiments
from bimedix_jax.checkpoint import hub, store
from bimedix_jax.checkpoint.hf import Base, load_hf, parameters
from bimedix_jax.checkpoint.peft import is_peft
from bimedix_jax.checkpoint.peft_read import load_peft, peft_storage
from bimedix_jax.data.run_folder import is_run
from bimedix_jax.errors import BimedixError, listed
from bimedix_jax.experiment import Experiment, RouterTraining
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.models.config import MIXED, RouterConfig, Storage
from bimedix_jax.models.init import init_random, with_router
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import ROUTERS, router_of
from bimedix_jax.quantise import quantise_base, storage_of
from bimedix_jax.sharding.layout import host_memory
from bimedix_jax.sharding.placement import place

log = logging.getLogger(__name__)


def load(
    path: str | Path,
    base: Base | None = None,
    adapter: str | Path | None = None,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    ignore_config_keys: Collection[str] = (),
    router: str | None = None,
) -> Mixtral:
    """A Mixtral, ready to run; it remembers the folder (`model.origin`) for exports.

    Args:
      path: folder in Hugging Face layout, hub id, native checkpoint, or the folder of a finished training run. For a
        run, its base is loaded (or initialised again) and the trained parameters are added.
      base: storage of the weights; "nf4" quantises attention and experts to 4 bits while reading. None takes the
        storage that the adapter was trained over, if it is known, or else keeps that of a native checkpoint, of one
        that bitsandbytes packed and of a run's base, and means bfloat16 for any other folder. A storage that differs
        from the adapter's changes the outputs, so a warning names both.
      adapter: folder of an adapter to add, in the native format or in PEFT's.
      mesh: devices to shard it over, see bimedix_jax/sharding. A process reads the shards of its own devices from a
        native checkpoint. From any other folder it reads its own experts and all other parameters, because the scales
        of a 4-bit matrix are quantised together.
      dtype: dtype of the computation. By default it is that of the adapter's base or of the base, and bfloat16 for
        "nf4". A native checkpoint records its dtype. In a checkpoint that bitsandbytes packed, config.json names it.
      revision: of a hub id.
      ignore_config_keys: keys of config.json to ignore although they are unknown or not implemented.
      router: name of a variant in models/routers.py; None keeps the one that the adapter, run or checkpoint was trained
        with. Another variant makes the model compute something else, so a warning names both.
    Raises:
      BimedixError: the model cannot be read as requested; the message gives the remedy.
    """
    if mesh is None:
        return read_model(path, base, adapter, None, dtype, revision, ignore_config_keys, router)
    with host_memory():
        model = read_model(path, base, adapter, mesh, dtype, revision, ignore_config_keys, router)
    return place(model, mesh)


def read_model(
    path: str | Path,
    base: Base | None,
    adapter: str | Path | None,
    mesh: Mesh | None,
    dtype: str | None = None,
    revision: str | None = None,
    ignore_config_keys: Collection[str] = (),
    router: str | None = None,
) -> Mixtral:
    """`load` before sharding: for a mesh, arrays in host memory with the parts that this process's devices need."""
    check_router_name(router)
    trained = None if adapter is None else trained_over(adapter)  # fails before the base is read
    folder = hub.resolve(path, revision)
    model = read_folder(folder, trained, base, mesh, dtype, revision, ignore_config_keys)
    if adapter is not None:
        model = with_adapter(model, adapter, trained, base)
    return finished(model, folder, router, adapter)


def load_pair(
    path: str | Path,
    adapter: str | Path,
    base: Base | None = None,
    revision: str | None = None,
    router: str | None = None,
) -> tuple[Mixtral, Mixtral]:
    """(the model without the adapter, the model with it). They share the weights of the base; arguments as for `load`.

    Raises:
      BimedixError: the model cannot be read as requested; the message gives the remedy.
    """
    check_router_name(router)
    trained = trained_over(adapter)
    folder = hub.resolve(path, revision)
    model = read_folder(folder, trained, base, None, None, revision, ())
    tuned = with_adapter(model, adapter, trained, base)
    return finished(model, folder, router, None), finished(tuned, folder, router, adapter)


def read_folder(
    folder: Path,
    trained: Storage | None,
    base: Base | None,
    mesh: Mesh | None,
    dtype: str | None,
    revision: str | None,
    ignore_config_keys: Collection[str],
) -> Mixtral:
    """The model of a folder of any kind, for an adapter that was trained over `trained` if it is known."""
    if is_run(folder):
        return read_run(folder, base, mesh, dtype)
    if not store.is_native(folder):
        return load_hf(folder, *storage_for(trained, base, dtype), ignore_config_keys, mesh)
    if revision is not None or ignore_config_keys:
        raise BimedixError(
            f"{folder} is a native checkpoint; leave out --revision and --ignore-config-key, which it does not use."
        )
    return restored(folder, base, dtype, mapped=mesh is not None)


def with_adapter(model: Mixtral, adapter: str | Path, trained: Storage | None, base: Base | None) -> Mixtral:
    """The model with the adapter of a folder. Warns where the storage that it was trained over is not known."""
    if trained is None and base is None and (own := storage_of(model)).base != "nf4":
        log.warning(
            "%s does not record the storage that it was trained over, so it runs over %s; pass base nf4 if it was "
            "trained over 4-bit weights.",
            adapter,
            own.base,
        )
    return load_peft(model, adapter) if is_peft(adapter) else store.load_adapter(model, adapter)


def finished(model: Mixtral, folder: Path, router: str | None, adapter: str | Path | None) -> Mixtral:
    """The model with its origin, and with the router variant that was asked for."""
    if not is_run(folder):
        model.origin = str(folder)
    return model if router is None else rerouted(model, router, str(adapter or folder))


def check_adapter(folder: Path) -> None:
    """Raises BimedixError where a folder holds no adapter; the message names subfolders that do, as peft writes for an
    adapter with a name."""
    if is_peft(folder):
        return
    found = [path for path in (sorted(folder.iterdir()) if folder.is_dir() else ()) if is_peft(path)]
    found += [path for path in (folder / "adapter",) if store.is_adapter(path)]
    if found and not store.is_adapter(folder):
        names = listed([str(path) for path in found])
        raise BimedixError(f"{folder} contains no adapter itself; name the subfolder that does: {names}.")
    store.read_adapter_config(folder)


def trained_over(adapter: str | Path) -> Storage | None:
    """The storage that an adapter was trained over; None where it is unknown."""
    check_adapter(Path(adapter))
    return peft_storage(adapter) if is_peft(adapter) else store.adapter_storage(adapter)


def storage_for(trained: Storage | None, base: Base | None, dtype: str | None) -> tuple[Base | None, str | None]:
    """(base, dtype) to load a Hugging Face folder with for an adapter that was trained over `trained`."""
    if trained is None or trained.base == MIXED or base not in (None, trained.base):
        return base, dtype
    return cast(Base, trained.base), dtype or trained.dtype


def check_router_name(router: str | None) -> None:
    """Raises BimedixError for an unknown router variant."""
    if router is not None and router not in ROUTERS:
        raise BimedixError(f"there is no router {router}; choose one of {', '.join(sorted(ROUTERS))}")


def rerouted(model: Mixtral, variant: str, source: str) -> Mixtral:
    """The model with this router variant; warns where its source has another one."""
    own = model.config.router
    if variant == own.variant:
        return model
    log.warning(
        "%s was trained with the router %s and runs with %s, so its outputs differ.", source, own.variant, variant
    )
    kept = {name: getattr(own, name) for name in ROUTERS[variant].reads}
    router = RouterConfig(num_experts=own.num_experts, top_k=own.top_k, variant=variant, **kept)
    return with_router(model, router)


def read_run(folder: Path, base: Base | None, mesh: Mesh | None, dtype: str | None) -> Mixtral:
    """The model of a finished training run: its base with the trained parameters.

    Raises:
      BimedixError: the run has not finished, or its base was passed in memory.
    """
    run = experiments.read(folder / "config.json")
    if store.is_native(folder / "model"):
        return restored(folder / "model", base, dtype, mapped=mesh is not None)
    if not store.is_adapter(folder / "adapter"):
        raise BimedixError(
            f"{folder} has not finished training; resume it with `bimedix train --resume --out {folder}`."
        )
    if (folder / "plan.safetensors").is_file():
        log.warning("%s was trained under a routing plan; pass plan= to use it when the model runs, too.", folder)
    base, dtype = storage_for(store.adapter_storage(folder / "adapter"), base, dtype)
    base = base or run.model.base
    try:
        dtype = dtype or (run.model.dtype if base == run.model.base else None)
        source = dataclasses.replace(run.model, base=base, dtype=dtype)
    except ValueError as error:
        raise BimedixError(str(error)) from None
    return store.load_adapter(read_base(dataclasses.replace(run, model=source), mesh), folder / "adapter")


def read_base(run: Experiment, mesh: Mesh | None) -> Mixtral:
    """The base model of an experiment, with the experiment's router.

    Raises:
      BimedixError: the experiment names no base, or the router does not fit it.
    """
    source = run.model
    check_router_name(run.router.variant)
    if source.random is not None:
        config = dataclasses.replace(source.random, router=requested_router(run.router, source.random.router))
        dtype = source.dtype or ("bfloat16" if source.base == "nf4" else source.base)
        model = init_random(config, run.seed, dtype)
        return quantise_base(model) if source.base == "nf4" else model
    if source.path is None:
        raise BimedixError("The experiment names no model; give model.path, a folder or a hub id.")
    model = read_model(source.path, source.base, None, mesh, source.dtype, source.revision)
    return with_router_of(run, model, source.path)


def requested_router(asked: RouterTraining, own: RouterConfig) -> RouterConfig:
    """A model's router configuration with the variant and parameters of an experiment.

    Raises:
      BimedixError: an unknown variant, or a parameter that is out of range or that the variant does not use.
    """
    check_router_name(asked.variant)
    fields = {name: getattr(asked, name) for name in ("variant", "scale", "bias_rate")}
    try:
        found = dataclasses.replace(own, **{name: value for name, value in fields.items() if value is not None})
        router_of(found)
        return found
    except ValueError as error:
        raise BimedixError(f"router: {error}") from error


def with_router_of(run: Experiment, model: Mixtral, source: str) -> Mixtral:
    """`model` with the router of an experiment; warns where that is another variant than the model's own."""
    check_router_name(run.router.variant)
    own, requested = model.config.router, requested_router(run.router, model.config.router)
    if requested.variant != own.variant:
        log.warning(
            "%s has the router %s and trains with %s, so its outputs differ.",
            source,
            own.variant,
            requested.variant,
        )
    try:
        return model if requested == own else with_router(model, requested)
    except ValueError as error:
        raise BimedixError(f"router: {error}") from error


def restored(folder: Path, base: Base | None, dtype: str | None, mapped: bool) -> Mixtral:
    """A native checkpoint as it was saved; raises BimedixError where another storage or dtype is requested."""
    model = store.restore(folder, mapped=mapped)
    values = [variable.get_value() for variable in parameters(model).values()]
    packed = any(isinstance(value, NF4Tensor) for value in values)
    stored = "nf4" if packed else str(jax.tree.leaves(values)[0].dtype)
    for what, requested, found in (("base", base, stored), ("dtype", dtype, model.dtype)):
        if requested is not None and requested != found:
            raise BimedixError(
                f"{folder} was saved with {what} {found}, not {requested}; leave {what} out, or start from the Hugging "
                "Face folder."
            )
    return model
