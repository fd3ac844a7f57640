"""`bimedix convert`: a checked copy of a checkpoint in another precision."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Check a Hugging Face Mixtral and write it in another precision.

    bfloat16 and float32 keep the layout of Hugging Face; nf4 writes a native checkpoint with 4-bit weights.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Hugging Face folder or hub id."""
    out: Path
    """Folder to write."""
    base: Literal["bfloat16", "float32", "nf4"] = "bfloat16"
    """Precision to write. nf4 quantises attention and experts, with double quantisation."""
    revision: str | None = None
    """Revision of a hub id; by default the main branch. The published BiMediX models have safetensors at refs/pr/1."""
    overwrite: bool = False
    """Replace --out if it is not empty."""
    ignore_config_key: tuple[str, ...] = ()
    """Keys of config.json to ignore; by default a key that is unknown or not implemented is an error."""


def run(config: Config, console: Console) -> dict[str, Any]:
    from bimedix_jax.files import check_replaceable

    check_replaceable(config.out, config.overwrite)
    if config.base == "nf4":
        from bimedix_jax.checkpoint import store
        from bimedix_jax.checkpoint.load import load

        model = load(config.source, "nf4", revision=config.revision, ignore_config_keys=config.ignore_config_key)
        store.save(model, config.out, overwrite=config.overwrite)
    else:
        from bimedix_jax.checkpoint.hub import resolve
        from bimedix_jax.checkpoint.rewrite import rewrite

        folder = resolve(config.source, config.revision)
        rewrite(folder, config.out, config.base, config.overwrite, config.ignore_config_key)
    size = sum(path.stat().st_size for path in config.out.rglob("*") if path.is_file())
    console.print(f"{config.out}: {config.base}, {size / 1e9:.2f} GB")
    return {"output": str(config.out), "base": config.base, "bytes": size}
