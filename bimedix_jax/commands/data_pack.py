"""`bimedix data pack`: tokenise records and pack them into rows for training."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

if TYPE_CHECKING:
    from bimedix_jax.data.encoding import Example


@dataclass(frozen=True)
class Config:
    """Tokenise records with a checkpoint's tokenizer and chat template, and pack them into rows of equal length."""

    records: str
    """JSONL file of records, as `bimedix data assemble` writes them, or `sample` for the sample of the package."""

    tokenizer: Path
    """Checkpoint folder with tokenizer.json or tokenizer.model."""

    out: Path
    """Folder to write: rows.array_record and index.json."""

    sequence_length: int = 2048
    """Tokens per row."""

    split: Literal["train", "heldout", "all"] = "all"
    """Which records to pack."""

    template: str | None = None
    """Chat template by name (mixtral, mixtral-2023, chatml, plain) instead of the checkpoint's."""

    packing: Literal["best_fit", "none"] = "best_fit"
    """`none` puts every record into its own row."""

    too_long: Literal["truncate", "drop"] = "truncate"
    """Whether to truncate or drop records that are longer than a row. Both are counted."""

    window: int = 256
    """Number of rows that are open for more records while packing."""

    seed: int = 0
    """Seed of the order of the records."""

    limit: int | None = None
    """Maximum number of records to pack."""

    workers: int | None = None
    """Number of worker processes, by default one per core; 0 uses none. The rows do not depend on it."""

    overwrite: bool = False
    """Replace --out if it exists."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Pack and report."""
    from bimedix_jax import files
    from bimedix_jax.data import pack
    from bimedix_jax.data.parallel import workers_of
    from bimedix_jax.data.tokenizer import load_tokenizer
    from bimedix_jax.data.vocabulary import require_fit, vocab_size_of
    from bimedix_jax.errors import BimedixError

    if config.sequence_length < 2 or config.window < 1:
        raise BimedixError(
            "rows need at least 2 tokens and a window of at least 1; raise --sequence-length or --window"
        )
    files.check_replaceable(config.out, config.overwrite)
    workers = workers_of(config.workers)
    tokenizer = load_tokenizer(config.tokenizer, config.template)
    require_fit(tokenizer, vocab_size_of(config.tokenizer), "the model in the same folder")
    facts = {
        "tokenizer": tokenizer.fingerprint,
        "template": tokenizer.template.name,
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id,
        "packing": config.packing,
        "too_long": config.too_long,
        "window": config.window,
        "seed": config.seed,
        "split": config.split,
        "limit": config.limit,
        "records": "sample" if config.records == "sample" else files.sha256(_existing(config.records)),
    }
    report = pack.PackReport()
    started = time.monotonic()
    with files.new_folder(config.out, config.overwrite) as folder:
        rows = pack.pack(
            _examples(config, workers),
            config.sequence_length,
            tokenizer.pad_id,
            config.packing,
            config.too_long,
            config.window,
            report,
        )
        index = pack.write(folder, rows, report, config.sequence_length, facts)
    seconds = time.monotonic() - started
    _print(index, config, console)
    console.print(f"{index['tokens'] / seconds:,.0f} tokens a second with {max(workers, 1)} processes")
    return {"output": str(config.out), **index, "seconds": seconds, "tokens_per_s": index["tokens"] / seconds}


def _examples(config: Config, workers: int) -> "Iterator[Example]":
    """The tokenised records in their final order, tokenised by `workers` processes."""
    import itertools

    from tqdm import tqdm

    from bimedix_jax.data.encoding import EncodeLines
    from bimedix_jax.data.parallel import batched, ordered_map

    split = None if config.split == "all" else config.split
    task = EncodeLines(str(config.tokenizer), config.template, config.records, split)
    batches = ordered_map(task, batched(_lines(config)), 0 if config.records == "sample" else workers)
    examples = itertools.islice(itertools.chain.from_iterable(batch.examples() for batch in batches), config.limit)
    return iter(tqdm(examples, desc="packing", unit=" records", disable=None))


def _lines(config: Config) -> "Iterator[tuple[int, bytes]]":
    import numpy as np

    from bimedix_jax.data import pack
    from bimedix_jax.data.records import sample

    if config.records != "sample":
        return pack.shuffled_lines(config.records, config.seed)
    ordered = [record.to_json().encode() for record in sample()]
    return ((int(i), ordered[i]) for i in np.random.default_rng(config.seed).permutation(len(ordered)))


def _existing(path: str) -> Path:
    from bimedix_jax.errors import BimedixError

    if not Path(path).is_file():
        raise BimedixError(f"there is no file {path}; name a JSONL file of records, or `sample`")
    return Path(path)


def _print(index: dict[str, Any], config: Config, console: Console) -> None:
    from bimedix_jax.process.terminal import FittedTable

    table = FittedTable("language", "kind", "source", title=f"packed into {config.out}")
    for name in ("records", "tokens", "supervised tokens"):
        table.add_column(name, justify="right")
    for group in index["groups"]:
        counts = (f"{group[name]:,}" for name in ("examples", "tokens", "learned_tokens"))
        table.add_row(group["language"], group["kind"], group["source"], *counts)
    table.add_row(
        "all", "", "", f"{index['examples']:,}", f"{index['tokens']:,}", f"{index['learned_tokens']:,}", style="bold"
    )
    console.print(table)
    console.print(
        f"{index['rows']:,} rows of {index['sequence_length']:,} tokens, {index['efficiency']:.1%} full, "
        f"template {index['template']}"
    )
    losses = {
        "records were truncated": index["truncated"],
        "tokens were truncated": index["truncated_tokens"],
        "records were longer than a row and left out": index["dropped_too_long"],
        "records had no supervised token in their first row and were left out": index["dropped_nothing_learned"],
    }
    for text, count in losses.items():
        if count:
            console.print(f"[bold yellow]{count:,} {text}[/]")
