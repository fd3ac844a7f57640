"""`bimedix export`: any loadable checkpoint -> a Hugging Face folder."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console


@dataclasses.dataclass(frozen=True)
class Config:
    """Write a checkpoint in Hugging Face's hub layout, with tokenizer, chat template and generation config, for
    transformers, vLLM and others."""

    source: Annotated[str, tyro.conf.Positional]
    """Checkpoint folder (native or Hugging Face) or hub id."""
    destination: Annotated[Path, tyro.conf.Positional]
    """Folder to write."""
    base: Literal["bfloat16", "float32"] | None = None
    """Precision to write; by default bfloat16, and of a native checkpoint its own (4-bit weights are dequantised)."""
    tokenizer_from: Path | None = None
    """Folder whose tokenizer files are copied; the source by default."""
    revision: str | None = None
    """Revision of a hub id."""
    max_shard_gb: float = 5.0
    """Largest safetensors file in GB (10^9 bytes); a bigger model is sharded with an index."""
    overwrite: bool = False
    """Replace the destination if it is not empty."""
    ignore_config_key: tuple[str, ...] = ()
    """Keys of config.json to overlook although they are unknown or not implemented."""


def run(config: Config, console: Console) -> dict[str, Any]:
    from bimedix_jax.checkpoint.hf import export_hf
    from bimedix_jax.checkpoint.load import load
    from bimedix_jax.errors import BimedixError

    if config.max_shard_gb <= 0:
        raise BimedixError(f"--max-shard-gb must be positive, got {config.max_shard_gb}.")
    model = load(config.source, config.base, revision=config.revision, ignore_config_keys=config.ignore_config_key)
    export_hf(
        model, config.destination, config.tokenizer_from, config.overwrite, round(config.max_shard_gb * 1_000_000_000)
    )
    files = sorted(path.name for path in config.destination.iterdir())
    console.print(f"{config.destination}: {len(files)} files")
    return {"output": str(config.destination), "files": files}
