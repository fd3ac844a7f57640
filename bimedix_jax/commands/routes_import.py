"""`bimedix routes import`: check others' recordings of routes and write them as one of ours."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Turn routes that another program recorded into a recording that `bimedix routes report` analyses.

    Files that cannot be right are refused: a layer that sends every token to the same experts, duplicate records or
    experts, numbers out of range, other tokens than stated, layers bound by position instead of path. docs/formats.md
    describes the formats.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE...")]
    """Files of one format."""
    format: Literal["jsonl", "olmoe", "counts", "vllm", "megatron", "nemo"]
    """jsonl: a record a line, as `bimedix routes export` writes it. olmoe: lines of OLMoE's analysis. counts: CSV of
    counts by token id. vllm: responses with routed_experts. megatron: traces of Megatron-LM. nemo: envelopes of NeMo
    RL."""
    out: Path
    """Folder to write."""
    experts: int | None = None
    """Number of experts of a layer; by default that of the logits, or else the highest number plus one."""
    top_k: int | None = None
    """With counts, the number of experts of a token; needed where the counts fit several numbers."""
    layers: tuple[str, ...] = ()
    """Module paths of the layers in the order of the file, such as model.layers.3.mlp, with - for a layer to leave out;
    by default those of the file, or else layers 0, 1, ..."""
    first: int = 0
    """Number of first positions of each record that analyses keep apart, where the file has no roles of tokens."""
    tokens_of: Path | None = None
    """Recording of the same records; an id with another token hash is an error."""
    keep_constant: bool = False
    """Accept layers that send every token to the same experts."""
    overwrite: bool = False
    """Replace --out if it is not empty."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Imports, prints the sizes, and returns them.

    Raises:
      BimedixError: a file is refused.
    """
    from bimedix_jax.errors import UsageError
    from bimedix_jax.routing.formats.imports import ImportOptions, import_routes

    if not config.files:
        raise UsageError("name the files to import")
    names = [field.name for field in dataclasses.fields(ImportOptions)]
    options = ImportOptions(**{name: getattr(config, name) for name in names})
    manifest = import_routes(config.files, config.format, config.out, options, config.overwrite)
    console.print(
        f"{config.out}: {manifest.records:,} records, {manifest.tokens:,} tokens, {len(manifest.layers)} layers of "
        f"{manifest.experts} experts, {manifest.top_k} a token",
        highlight=False,
    )
    for note in manifest.notes:
        console.print(note, highlight=False)
    return {
        "output": str(config.out),
        "kind": manifest.kind,
        "records": manifest.records,
        "tokens": manifest.tokens,
        "rows": manifest.rows,
        "layers": [layer.number for layer in manifest.layers],
        "experts": manifest.experts,
        "top_k": manifest.top_k,
        "columns": list(manifest.columns),
        "notes": list(manifest.notes),
    }
