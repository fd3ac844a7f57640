"""`bimedix coverage`: every base tensor of a model with its bits, its adapter and whether it is trained."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from bimedix_jax.errors import BimedixError
from bimedix_jax.models.config import ARCHITECTURES, LoraConfig

if TYPE_CHECKING:
    from bimedix_jax.models.mixtral import Mixtral

RECIPE = LoraConfig(rank=128, alpha=64.0)
"""BiMediX's adapters (arXiv 2402.13253, section 4.1)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """List what a fine-tuning run stores and trains: every tensor with its shape, bits per weight and adapter.

    No weights are read. An architecture by name needs no files, and a folder needs only its configuration.
    """

    model: str
    """Architecture by name (mixtral-8x7b), or folder in Hugging Face layout or of a native checkpoint."""
    rank: int | None = None
    """Rank of the adapters, 0 for none; by default that of --adapter or the checkpoint, or else 128 as in the paper."""
    alpha: float | None = None
    """Alpha of the adapters, by default 64 as in the paper; it sets their scale alpha / rank and not their size."""
    targets: tuple[str, ...] | None = None
    """Linear layers that get an adapter: q k v o w1 w2 w3 router lm_head, or patterns such as layers\\.0\\..*\\.w2; by
    default those of the paper, which are all except o and lm_head."""
    base: Literal["bfloat16", "float32", "nf4"] | None = None
    """Storage of the base weights; by default that of --adapter or of a native checkpoint, or else nf4."""
    adapter: Path | None = None
    """Folder of trained adapters to check against the model and list; by default new adapters are listed."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Prints the coverage table and returns it with the configuration of the adapters.

    Raises:
      BimedixError: there is no such model, a target matches nothing, or an adapter does not fit.
    """
    from bimedix_jax import adapters

    model, base = base_model(config)
    asked = (config.rank, config.alpha, config.targets)
    if config.adapter is not None:
        if asked != (None, None, None):
            raise BimedixError("--adapter has its own rank, alpha and targets; leave those options out.")
        model = with_adapter(model, config.adapter)
    elif asked != (None, None, None) or not adapters.has_lora(model):
        lora = lora_of(config)
        model = model if lora is None else adapters.add_lora(model, lora)
    table = adapters.coverage(model)
    console.print(table.table())
    return {"model": config.model, "base": base, "lora": described(model), **table.to_dict()}


def base_model(config: Config) -> tuple["Mixtral", str]:
    """(the model without weights, the storage of its base)."""
    from bimedix_jax.adapters import add_lora
    from bimedix_jax.checkpoint import hf_config, store
    from bimedix_jax.experiment import parse
    from bimedix_jax.models.config import MixtralConfig
    from bimedix_jax.models.mixtral import Mixtral
    from bimedix_jax.quantise import quantise_base

    base, folder, dtype, lora = config.base or adapter_base(config.adapter) or "nf4", Path(config.model), None, None
    if config.model in ARCHITECTURES:
        architecture = ARCHITECTURES[config.model]
    elif not folder.is_dir():
        raise BimedixError(
            f"{config.model} is neither a known architecture ({', '.join(ARCHITECTURES)}) nor a folder; correct it."
        )
    elif store.is_native(folder):
        record = store.read_config(folder / store.MODEL_CONFIG, store.ModelJson, store.MODEL_FORMAT)
        architecture = parse(MixtralConfig, record.config, f"config in {folder}")
        lora = parse(LoraConfig | None, record.lora, f"lora in {folder}")
        dtype, held = record.dtype, "nf4" if record.nf4 else record.dtype
        if config.base not in (None, held):
            raise BimedixError(f"{folder} was saved with base {held}, not {config.base}; leave --base out.")
        base = held
    else:
        architecture = hf_config.read_config(folder)
    model = Mixtral(architecture, dtype or ("bfloat16" if base == "nf4" else base))
    model = quantise_base(model) if base == "nf4" else model
    return (model if lora is None else add_lora(model, lora)), base


def adapter_base(adapter: Path | None) -> str | None:
    """The storage that our adapter in a folder was trained over; None where it is unknown, or mixed."""
    from bimedix_jax.checkpoint import store
    from bimedix_jax.checkpoint.hf import BASES

    trained = store.adapter_storage(adapter) if adapter is not None and store.is_adapter(adapter) else None
    return None if trained is None or trained.base not in BASES else trained.base


def lora_of(config: Config) -> LoraConfig | None:
    """The adapters that the options describe, with the paper's values by default."""
    if config.rank == 0:
        if config.alpha is not None or config.targets is not None:
            raise BimedixError("--rank 0 means no adapters; leave --alpha and --targets out.")
        return None
    rank = RECIPE.rank if config.rank is None else config.rank
    alpha = RECIPE.alpha if config.alpha is None else config.alpha
    try:
        return LoraConfig(rank=rank, alpha=alpha, targets=RECIPE.targets if config.targets is None else config.targets)
    except ValueError as error:
        raise BimedixError(str(error)) from error


def with_adapter(model: "Mixtral", folder: Path) -> "Mixtral":
    """The model with the adapters of a folder, without weights; their file must have exactly these shapes."""
    from bimedix_jax.adapters import add_lora, is_trainable
    from bimedix_jax.checkpoint import store
    from bimedix_jax.checkpoint.identity import warn_storage
    from bimedix_jax.checkpoint.peft import is_peft
    from bimedix_jax.checkpoint.safetensors_io import read_header

    if is_peft(folder):
        raise BimedixError(
            f"{folder} is an adapter of PEFT, which needs a loaded model; call bmx.coverage(bmx.load(MODEL, "
            f"adapter={str(folder)!r}))."
        )
    warn_storage(store.adapter_storage(folder), model, folder)
    adapted = add_lora(model, store.adapter_config(model, folder))
    expected = {path: tuple(leaf.shape) for path, leaf in store.leaves_of(adapted, is_trainable(adapted)).items()}
    found = {name: tuple(tensor.shape) for name, tensor in read_header(folder / store.ADAPTER_WEIGHTS).items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise BimedixError(
            f"{folder / store.ADAPTER_WEIGHTS} does not match {store.adapter_path(folder).name} ({len(wrong)} tensors "
            f"differ, {wrong[0]} first); copy the adapter again."
        )
    return adapted


def described(model: "Mixtral") -> dict[str, Any] | None:
    """The configuration of the adapters, with the scale of those without an override."""
    if model.lora is None:
        return None
    return {**dataclasses.asdict(model.lora), "scale": model.lora.scale_of()}
