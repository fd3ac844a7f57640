"""`bimedix export`: any loadable checkpoint, or its adapters -> a folder for transformers, peft, vLLM and others."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from bimedix_jax.errors import BimedixError

if TYPE_CHECKING:
    from bimedix_jax.models.mixtral import Mixtral


WHICH = (
    "The model has adapters: add --merge original or --merge dequantised for a merged model, or --format peft for the "
    "adapters alone."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Write a checkpoint that other libraries can load.

    With --format hf, the model is written in Hugging Face's hub layout, with tokenizer, chat template and generation
    config; --merge merges the adapters into it. --format bitsandbytes writes 4-bit weights, and --format peft writes
    only the adapters.

    A merge ends with a report: how much of the fine-tuning was lost to rounding, and on how many tokens the logits and
    routes of the merged model differ from those of the model with adapters.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Checkpoint folder (native or Hugging Face) or hub id."""
    out: Path
    """Folder to write."""
    format: Literal["hf", "peft", "bitsandbytes"] = "hf"
    """hf: the whole model in 16 or 32 bits. peft: the adapters. bitsandbytes: the model in 4 bits."""
    adapter: Path | None = None
    """Folder of adapters (native or PEFT) to merge or to export; by default those of the checkpoint, if any."""
    merge: Literal["original", "dequantised"] | None = None
    """Merge the adapters into the original 16-bit weights or into the dequantised 4-bit ones; by default no merge."""
    base: Literal["bfloat16", "float32", "nf4"] | None = None
    """Storage of the loaded weights; by default the one that the adapters were trained over, that of a native
    checkpoint, nf4 for bitsandbytes, or else bfloat16."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Precision of the merged weights, by default bfloat16; float32 keeps changes that bfloat16 would round away."""
    layout: Literal["per_expert", "fused", "attention"] = "per_expert"
    """Layout of experts for peft and bitsandbytes: per_expert as on the hub; fused as in memory in transformers 5; or,
    for bitsandbytes only, attention: 4-bit attention and 16-bit experts, which transformers 5 loads as it is."""
    probe: str = "sample"
    """Text on which the merged model is compared with the adapters: `sample`, or a JSONL file of records."""
    probe_records: int = 24
    """Number of its records to use; 0 skips the comparison."""
    tokenizer_from: Path | None = None
    """Folder whose tokenizer files are copied; by default the source."""
    revision: str | None = None
    """Revision of a hub id; by default the main branch."""
    max_shard_gb: float = 5.0
    """Largest safetensors file in GB (10^9 bytes); a larger model is split into several files with an index."""
    overwrite: bool = False
    """Replace --out if it is not empty."""
    router: str | None = None
    """Router variant (topk, softmax_topk, sigmoid_bias); by default the one that the model was trained with."""
    ignore_config_key: tuple[str, ...] = ()
    """Keys of config.json to ignore; by default a key that is unknown or not implemented is an error."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Writes the folder. Returns its files, and the report of a merge."""
    from bimedix_jax.checkpoint.load import load
    from bimedix_jax.files import check_replaceable
    from bimedix_jax.process.folders import WRITTEN

    check(config)
    check_replaceable(config.out, config.overwrite)
    check_tokenizer(config)
    base = config.base or ("nf4" if config.format == "bitsandbytes" else None)
    model = load(
        config.source,
        base,
        config.adapter,
        revision=config.revision,
        ignore_config_keys=config.ignore_config_key,
        router=config.router,
    )
    result = write(config, model, console)
    files = sorted(path.name for path in config.out.iterdir() if path.name != WRITTEN)
    console.print(f"{config.out}: {len(files)} files", highlight=False)
    return {"output": str(config.out), "files": files, **result}


def check(config: Config) -> None:
    """Raises BimedixError for options that contradict each other."""
    if config.max_shard_gb <= 0:
        raise BimedixError(f"--max-shard-gb must be positive, got {config.max_shard_gb}.")
    if config.probe_records < 0:
        raise BimedixError(f"--probe-records cannot be negative, got {config.probe_records}.")
    if config.merge is not None and config.format != "hf":
        raise BimedixError("--merge gives a whole model; leave out --merge or --format.")
    if config.dtype is not None and config.merge is None:
        raise BimedixError("--dtype is the precision of a merge; pass --merge too, or --base instead.")
    if config.adapter is not None and config.format == "hf" and config.merge is None:
        raise BimedixError(WHICH)
    if config.merge is not None and config.probe != "sample" and not Path(config.probe).is_file():
        raise BimedixError(f"there is no file {config.probe} to compare on; name a JSONL file of records with --probe.")
    if config.layout == "attention" and config.format != "bitsandbytes":
        raise BimedixError("--layout attention is for --format bitsandbytes; choose per_expert or fused.")
    if config.format == "bitsandbytes" and (config.adapter is not None or config.base not in (None, "nf4")):
        raise BimedixError(
            "--format bitsandbytes writes a 4-bit model without adapters; leave --adapter and --base out."
        )


def check_tokenizer(config: Config) -> None:
    """Raises BimedixError if the tokenizer of --tokenizer-from does not fit this model."""
    from bimedix_jax.checkpoint.hub import resolve
    from bimedix_jax.data.tokenizer import has_tokenizer, load_tokenizer
    from bimedix_jax.data.vocabulary import require_fit, vocab_size_of

    if config.tokenizer_from is not None and has_tokenizer(config.tokenizer_from):
        vocab_size = vocab_size_of(resolve(config.source, config.revision))
        require_fit(load_tokenizer(config.tokenizer_from), vocab_size, config.source)


def write(config: Config, model: "Mixtral", console: Console) -> dict[str, Any]:
    """Writes the folder in the wanted format."""
    from bimedix_jax.checkpoint.hf import export_hf

    shard_bytes = round(config.max_shard_gb * 1_000_000_000)
    if config.merge is not None:
        return merge(config, model, shard_bytes, console)
    if config.format == "peft" and config.layout != "attention":
        from bimedix_jax.checkpoint.peft_write import export_peft

        export_peft(model, config.out, config.layout, overwrite=config.overwrite)
    elif config.format == "bitsandbytes":
        from bimedix_jax.checkpoint.bnb import export_bnb

        export_bnb(model, config.out, config.layout, config.tokenizer_from, config.overwrite, shard_bytes)
    else:
        if model.lora is not None:
            raise BimedixError(WHICH)
        export_hf(model, config.out, config.tokenizer_from, config.overwrite, shard_bytes)
    return {}


def merge(config: Config, model: "Mixtral", shard_bytes: int, console: Console) -> dict[str, Any]:
    """Writes the merged model, loads it again, and compares it with the model with adapters."""
    from bimedix_jax.checkpoint.hub import resolve
    from bimedix_jax.checkpoint.load import load
    from bimedix_jax.checkpoint.merge import export_merged
    from bimedix_jax.checkpoint.store import is_native
    from bimedix_jax.quantise import storage_of
    from bimedix_jax.routing.drift import drift, observe

    assert config.merge is not None  # checked by the caller
    texts = probe_texts(config, model)
    observed = observe(model, texts) if texts else None
    dtype = config.dtype or "bfloat16"
    merged = export_merged(
        model,
        config.out,
        config.merge,
        dtype=dtype,
        tokenizer_from=config.tokenizer_from,
        overwrite=config.overwrite,
        max_shard_bytes=shard_bytes,
    )
    report: dict[str, Any] = {"merged": merged.to_dict()}
    for target, loss in merged.rounding_loss.items():
        console.print(f"{target}: {merged.matrices[target]} matrices, {loss:.2%} of the delta lost to rounding")
    base, trained = storage_of(model).base, model.trained_over
    report |= {"base": base, "trained_over": base if trained is None else trained.base}
    if observed is None:
        return report
    ours = observe(load(config.out, dtype), texts)
    report["drift"] = drift(observed, ours)
    print_drift(base, report["drift"], console)
    if report["trained_over"] != base and not is_native(resolve(config.source, config.revision)):
        report["drift_from_training"] = drift(observe(as_trained(config, model), texts), ours)
        print_drift(f"{report['trained_over']}, as in training:", report["drift_from_training"], console)
    return report


def as_trained(config: Config, model: "Mixtral") -> "Mixtral":
    """The model with its adapters over the storage that they were trained over."""
    from bimedix_jax.checkpoint.load import load

    return load(
        config.source,
        None,
        config.adapter,
        revision=config.revision,
        ignore_config_keys=config.ignore_config_key,
        router=model.config.router.variant,
    )


def print_drift(base: str, seen: dict[str, Any], console: Console) -> None:
    """Prints how much the merged model differs from base and adapters; `base` is the storage of the base."""
    console.print(
        f"against base and adapters over {base}, {seen['tokens']} tokens: largest logit difference "
        f"{seen['max_logit_diff']:.2%} of the largest logit, KL {seen['kl']:.2e} nats; most likely token changed "
        f"on {seen['top1_changed']:.2%}, experts changed on {seen['routes_changed']:.2%} of (layer, token) pairs",
        highlight=False,
    )


def probe_texts(config: Config, model: "Mixtral") -> list[tuple[str, list[int]]]:
    """(language, token ids) of the records to compare on, without those longer than the model's context."""
    from bimedix_jax.checkpoint.hub import resolve
    from bimedix_jax.data import records
    from bimedix_jax.data.encoding import encode_chat
    from bimedix_jax.data.tokenizer import load_tokenizer
    from bimedix_jax.data.vocabulary import require_fit

    if config.probe_records == 0:
        return []
    tokenizer = load_tokenizer(config.tokenizer_from or resolve(config.source, config.revision))
    require_fit(tokenizer, model.config.vocab_size, config.source)
    found = list(records.sample("heldout") if config.probe == "sample" else records.read_jsonl(config.probe))
    # spread, because the file is sorted by language and kind
    chosen = found[:: max(1, len(found) // config.probe_records)][: config.probe_records]
    texts = [(record.language, encode_chat(tokenizer, record.conversations)[0]) for record in chosen]
    fitting = [(label, ids) for label, ids in texts if len(ids) <= model.config.max_position_embeddings]
    if not fitting:
        raise BimedixError(f"No record of {config.probe} fits the model's context; name others with --probe.")
    return fitting
