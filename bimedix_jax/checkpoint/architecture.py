"""The architecture of a model folder of any kind, from its configuration alone, without JAX."""

from pathlib import Path

from bimedix_jax import files
from bimedix_jax.data.run_folder import base_of, is_run
from bimedix_jax.experiment import parse
from bimedix_jax.models.config import MixtralConfig


def known_config(folder: str | Path) -> MixtralConfig | None:
    """The architecture of a native checkpoint, of a Hugging Face folder, or of the base of a training run.

    None for any other folder, and for a run whose base is on the hub. The router's variant is that of the base.

    Raises:
      BimedixError: the configuration is not one of a Mixtral that can be loaded.
    """
    folder = Path(folder).expanduser()
    if is_run(folder):
        base = base_of(folder)
        if (folder / "model").is_dir():
            return known_config(folder / "model")
        if isinstance(base, dict):
            return parse(MixtralConfig, base, f"model.random in {folder / 'config.json'}")
        return None if base is None else known_config(base)
    native = files.peek_json(folder / "bimedix.json").get("config")
    if native is not None:
        return parse(MixtralConfig, native, f"config in {folder}")
    if files.peek_json(folder / "config.json").get("model_type") != "mixtral":
        return None
    from bimedix_jax.checkpoint.hf_config import read_config

    return read_config(folder)
