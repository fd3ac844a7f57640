"""`bimedix routes replay`: how much of an adapter's gain came with the attention, the experts and the routes."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from bimedix_jax.errors import BimedixError

if TYPE_CHECKING:
    from bimedix_jax.process.terminal import FittedTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Split the gain of an adapter into what the attention, the experts and the routes brought (Shapley values).

    All eight combinations are run on held-out records: parameters of the model without or with the adapter, under the
    recorded routes of the one or the other. Most combinations are hybrids that nobody trained.
    """

    model: str
    """Model folder or hub id of the base model."""
    adapter: Path
    """Folder of the adapter whose gain is split."""
    data: Annotated[str, tyro.conf.arg(metavar="RECORDS")]
    """Held-out records: `sample`, or a JSONL file, of which records in the training split are ignored."""
    base: Literal["bfloat16", "float32", "nf4"] | None = None
    """Storage of the weights; by default the one that the adapter was trained over, that of a native checkpoint, or
    else bfloat16."""
    router: str | None = None
    """Router variant (topk, softmax_topk, sigmoid_bias); by default the one that each was trained with."""
    revision: str | None = None
    """Revision of a hub id; by default the main branch."""
    tokenizer: Path | None = None
    """Folder of the tokenizer; by default the model's."""
    template: str | None = None
    """Chat template by name (mixtral, mixtral-2023, chatml, plain); by default the model's own."""
    split_gates: bool = False
    """Split the routes into the sets of experts and their weights: four players, 16 combinations."""
    live: bool = False
    """Exchange the parameters of the router instead of recorded routes; nothing is replayed."""
    layers: Annotated[int, tyro.conf.arg(metavar="G")] = 1
    """Split each part into G groups of consecutive layers. Beyond 8 players, orders are sampled."""
    orders: int = 24
    """Number of sampled orders, where there are more than 8 players."""
    limit: int | None = None
    """Use N records, spread over the file; by default all."""
    max_length: int | None = None
    """Longest record in tokens, by default the model's context; longer ones are counted and left out."""
    batch_tokens: int = 4096
    """Tokens run at a time; it affects speed, memory and rounding only."""
    seed: int = 0
    """Seed of the intervals and of sampled orders."""
    tokens: Annotated[Path | None, tyro.conf.arg(metavar="FILE.npz")] = None
    """NumPy file to write the NLL of every token under every combination to; by default none."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON file to write the result to; by default it is only printed."""
    overwrite: bool = False
    """Replace --out and --tokens if they exist."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Loads both models, runs all combinations, prints the split.

    Raises:
      BimedixError: a model or the data cannot be used as requested.
    """
    from bimedix_jax.checkpoint.hub import resolve
    from bimedix_jax.checkpoint.load import load_pair
    from bimedix_jax.data.vocabulary import tokenizer_of_model
    from bimedix_jax.evals.heldout import heldout_records
    from bimedix_jax.evals.tables import print_left_out
    from bimedix_jax.routing.attribution import report
    from bimedix_jax.routing.coalitions import Pair
    from bimedix_jax.routing.provenance import manifest, write_result
    from bimedix_jax.routing.replay import Players, replay
    from bimedix_jax.routing.sequences import sequences_of

    check_options(config)
    records = heldout_records(config.data, config.limit)
    folder = resolve(config.model, config.revision)
    tokenizer = tokenizer_of_model(folder, config.model, config.tokenizer, config.template)
    players = Players(split_gates=config.split_gates, live=config.live, layers=config.layers)
    pair = Pair.of(*load_pair(folder, config.adapter, config.base, router=config.router))
    players.check(pair)
    context = pair.tuned.config.max_position_embeddings
    sequences = sequences_of(records, tokenizer, min(config.max_length or context, context))
    print_left_out(console, sequences)
    replayed = replay(pair, sequences, players, config.orders, config.seed, config.batch_tokens)
    result = report(replayed, sequences, config.seed)
    options = dataclasses.asdict(players) | {"orders": result["orders"]}
    options |= {"seed": config.seed, "batch_tokens": config.batch_tokens}
    result |= {
        "model": config.model,
        "adapter": config.adapter,
        "live": config.live,
        "too_long": dict(sequences.too_long),
        "manifest": manifest(pair.tuned, tokenizer, config.data, records, max_length=config.max_length, **options),
    }
    for table in (split_table(name, split) for name, split in tabled(result)):
        console.print(table)
    if config.tokens is not None:
        write_tokens(config.tokens, replayed, [source.id for source in sequences.sources])
        result["tokens_file"] = config.tokens
    if config.out is not None:
        write_result(config.out, result)
        console.print(f"The result is in {config.out}.", highlight=False)
    return result


def check_options(config: Config) -> None:
    """Raises BimedixError for options that are out of range, and for files that exist."""
    from bimedix_jax.files import check_file, peek_json
    from bimedix_jax.options import require_at_least_one

    require_at_least_one(config, "limit", "layers", "orders", "max_length", "batch_tokens")
    if config.live and config.split_gates:
        raise BimedixError("--live replays no routes, so there are no gates to split; leave out one of the two")
    if config.out is not None:
        check_file(config.out, config.overwrite, lambda path: {"shapley", "manifest"} <= set(peek_json(path)))
    if config.tokens is not None:
        if config.tokens.suffix != ".npz":
            raise BimedixError(f"--tokens is {config.tokens}; give a name that ends in .npz")
        check_file(config.tokens, config.overwrite, lambda path: path.read_bytes()[:2] == b"PK")
        if config.out is not None and config.out.resolve() == config.tokens.resolve():
            raise BimedixError(f"--out and --tokens are both {config.out}; give two names")


def tabled(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The splits to print: of all records, and of each language."""
    return [("all records", result), *((name, x) for name, x in result["groups"].items() if "/" not in name)]


def split_table(name: str, split: dict[str, Any]) -> "FittedTable":
    """The split of one group."""
    from bimedix_jax.process.terminal import FittedTable, number

    first, last = split["values"][0]["nats"], split["values"][-1]["nats"]
    doubts = f"\nThe split depends on the order: {'; '.join(split['why'])}." if split["order_dependent"] else ""
    table = FittedTable(
        title=f"{name}: {first:.4f} -> {last:.4f} nats per token",
        caption=f"{number(split['records'], 'record')} in {number(split['clusters'], 'cluster')}, "
        f"{number(split['tokens'], 'token')}{doubts}",
    )
    table.add_column("part")
    for column in ("saves", "95 % interval", "least", "most"):
        table.add_column(column, justify="right")
    for part, nats in {**split["shapley"], "gain": split["gain"]}.items():
        low, high = split["intervals"][part]
        shown = "too few clusters" if low != low else f"{low:+.4f} to {high:+.4f}"
        least, most = split["range_over_orders"].get(part, (nats, nats))
        table.add_row(part, f"{nats:+.4f}", shown, f"{least:+.4f}", f"{most:+.4f}")
    return table


def write_tokens(path: Path, replayed: Any, names: list[str]) -> None:
    """Writes the NLL of every token: nll [combinations, tokens], and what each row and column is."""
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    members = ["+".join(replayed.game.members(coalition)) for coalition in replayed.game.coalitions]
    with path.open("wb") as stream:
        np.savez_compressed(
            stream,
            nll=replayed.nll_CN,
            tuned=np.array(members),
            record=np.array(names)[replayed.record_N],
            position=replayed.position_N,
        )
