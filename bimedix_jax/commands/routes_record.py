"""`bimedix routes record`: record which experts every token of a data set uses."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

if TYPE_CHECKING:
    from bimedix_jax.models.mixtral import Mixtral
    from bimedix_jax.routing.interventions import Interventions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Record the routes of a model on data: experts, weights, margins, entropies and losses of every token.

    A recording that was killed resumes if the same command is started again. Texts are not recorded.
    `bimedix routes report` analyses the result.
    """

    model: str
    """Model folder or hub id."""
    data: Annotated[str, tyro.conf.arg(metavar="sample|FILE|DIR")]
    """`sample`, a JSONL file of records, or a folder that `bimedix data pack` wrote."""
    out: Path
    """Folder to write."""
    adapter: Path | None = None
    """Folder of adapters to apply; by default none."""
    tokenizer: Path | None = None
    """Folder of the tokenizer; by default the model's."""
    template: str | None = None
    """Chat template by name (mixtral, mixtral-2023, chatml, plain); by default the model's own."""
    base: Literal["bfloat16", "float32", "nf4"] | None = None
    """Storage of the weights; by default the one that the adapter was trained over, that of a native checkpoint, or
    else bfloat16."""
    router: str | None = None
    """Router variant (topk, softmax_topk, sigmoid_bias); by default the one that the model was trained with."""
    revision: str | None = None
    """Revision of a hub id; by default the main branch."""
    record: Literal["choices", "full"] = "full"
    """choices: experts, weights and losses. full: margins and entropies too."""
    norms: bool = False
    """Record the norm of the output of every chosen expert. This computes the experts twice."""
    gate: bool = False
    """Record the loss of every token if it gets the experts and weights of another token of its record, which shows
    whether the experts differ at all. This takes a second forward pass."""
    random_routers: int = 0
    """Number of random routers that read the same hidden states, at least 100 to test what geometry explains; their
    loads are recorded for each record and layer."""
    intervene: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON file of rules that tell the routers what to do (docs/routing.md); by default none."""
    exact: bool = False
    """Record real numbers as float32 instead of float16, and compute in float32."""
    generate: bool = False
    """Record the model's own answers to the last turn, generated without sampling, instead of those of the data."""
    max_new_tokens: int = 64
    """Longest answer with --generate."""
    limit: int | None = None
    """Number of records, spread over the data; by default all."""
    max_length: int | None = None
    """Longest record in tokens, by default the model's context; longer ones are listed and not recorded."""
    batch_tokens: int = 4096
    """Tokens run at a time; it affects speed, memory and rounding only."""
    seed: int = 0
    """Seed of the random routers and of the shuffled routes."""
    overwrite: bool = False
    """Replace --out if it is not empty."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Loads the model, records, prints the sizes, and returns them.

    Raises:
      BimedixError: the model, the data or the rules cannot be used, or there is no record that fits.
    """
    import time

    from bimedix_jax.checkpoint.hub import resolve
    from bimedix_jax.data.tokenizer import load_tokenizer
    from bimedix_jax.data.vocabulary import require_fit, vocab_size_of
    from bimedix_jax.files import check_replaceable
    from bimedix_jax.process import signals
    from bimedix_jax.routing.interventions import check_fit, report, rules_of
    from bimedix_jax.routing.provenance import adapter_hash, model_hash
    from bimedix_jax.routing.recorded_data import Data
    from bimedix_jax.routing.recorder import record_routes

    check_replaceable(config.out, config.overwrite)
    rules = rules_of(config.intervene, config.adapter)
    settings = settings_of(config, rules)  # wrong ones are an error before anything is read
    folder = resolve(config.model, config.revision)
    check_fit(rules, folder)
    tokenizer = load_tokenizer(config.tokenizer or folder, config.template)
    require_fit(tokenizer, vocab_size_of(folder), config.model)
    data = Data.open(config.data, tokenizer, config.limit)
    model = loaded(config, folder)
    if rules is not None and rules.needs_base:
        settings = settings_of(config, dataclasses.replace(rules, base=loaded(config, folder, adapter=False)))
    hashes = {"model": model_hash(model), "adapter": adapter_hash(model)}
    options = {"model": config.model, "data": config.data, "dtype": model.dtype, "template": tokenizer.template.name}
    started = time.monotonic()
    with signals.hint("resume with the same command"):
        manifest = record_routes(model, data, config.out, settings, hashes, options, config.overwrite)
    seconds = time.monotonic() - started
    size = sum(part.bytes for part in manifest.parts)
    console.print(
        f"{config.out}: {manifest.records:,} records, {manifest.tokens:,} tokens, {manifest.rows:,} rows of "
        f"{len(manifest.layers)} layers, {size / manifest.rows:.1f} bytes a row",
        highlight=False,
    )
    if manifest.too_long:
        console.print(f"[bold yellow]{len(manifest.too_long):,} records were too long and are not recorded[/]")
    return {
        "output": str(config.out),
        "records": manifest.records,
        "tokens": manifest.tokens,
        "rows": manifest.rows,
        "layers": len(manifest.layers),
        "experts": manifest.experts,
        "top_k": manifest.top_k,
        "columns": list(manifest.columns),
        "random_routers": manifest.random_routers,
        "bytes": size,
        "bytes_per_row": size / manifest.rows,
        "too_long": len(manifest.too_long),
        "hashes": manifest.hashes,
        "seconds": seconds,
        **report(settings.rules, console),
    }


def settings_of(config: Config, rules: "Interventions | None") -> Any:
    """The recorder's settings."""
    from bimedix_jax.routing.recorder import RecordSettings

    return RecordSettings(
        record=config.record,
        norms=config.norms,
        gate=config.gate,
        random_routers=config.random_routers,
        exact=config.exact,
        rules=rules,
        new_tokens=config.max_new_tokens if config.generate else None,
        max_length=config.max_length,
        batch_tokens=config.batch_tokens,
        seed=config.seed,
    )


def loaded(config: Config, folder: Path, adapter: bool = True) -> "Mixtral":
    """The model, with or without its adapter; over the same storage."""
    from bimedix_jax.checkpoint.load import load, trained_over

    base: Any = config.base
    dtype = "float32" if config.exact else None
    if not adapter and base is None and config.adapter is not None:
        trained = trained_over(config.adapter)
        base = None if trained is None else trained.base
    if config.exact and base is None and config.adapter is None:
        base = "float32"
    return load(folder, base=base, adapter=config.adapter if adapter else None, router=config.router, dtype=dtype)
