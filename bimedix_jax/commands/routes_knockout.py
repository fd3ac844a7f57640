"""`bimedix routes knockout`: what single experts do, and for which language."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from bimedix_jax.errors import BimedixError

if TYPE_CHECKING:
    from bimedix_jax.process.terminal import FittedTable

ROWS = 12
"""Rows of the table in the terminal; the JSON has all cells."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Knock out one expert at a time, and measure how the loss changes in each language.

    silence multiplies the expert's output by 0, ban removes it from the router's choice, and swap lets another expert
    compute in its place. That an expert serves one language follows only from the interaction: the change in the one
    language minus the change in the other.
    """

    model: str
    """Model folder or hub id."""
    data: Annotated[str, tyro.conf.arg(metavar="RECORDS")]
    """Held-out records: `sample`, or a JSONL file, of which records in the training split are ignored."""
    adapter: Path | None = None
    """Folder of adapters to apply; by default none."""
    base: Literal["bfloat16", "float32", "nf4"] | None = None
    """Storage of the weights; by default the one that the adapter was trained over, that of a native checkpoint, or
    else bfloat16."""
    router: str | None = None
    """Router variant (topk, softmax_topk, sigmoid_bias); by default the one that the model was trained with."""
    revision: str | None = None
    """Revision of a hub id; by default the main branch."""
    tokenizer: Path | None = None
    """Folder of the tokenizer; by default the model's."""
    template: str | None = None
    """Chat template by name (mixtral, mixtral-2023, chatml, plain); by default the model's own."""
    meanings: tuple[Literal["silence", "ban", "swap"], ...] = ("silence", "ban", "swap")
    """How an expert is knocked out."""
    screen: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Measure only the N experts with the largest gradient of a language's loss in their gain; by default all."""
    limit: int | None = None
    """Use N records, spread over the file; by default all."""
    max_length: int | None = None
    """Longest record in tokens, by default the model's context; longer ones are counted and left out."""
    batch_tokens: int = 4096
    """Tokens run at a time; it affects speed, memory and rounding only."""
    seed: int = 0
    """Seed of permutations and resamples."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON file to write the result to; by default it is only printed."""
    overwrite: bool = False
    """Replace --out if it exists."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Loads the model, runs all cells, prints the largest interactions.

    Raises:
      BimedixError: the model or the data cannot be used as requested.
    """
    from bimedix_jax.checkpoint.hub import resolve
    from bimedix_jax.checkpoint.load import load
    from bimedix_jax.data.vocabulary import tokenizer_of_model
    from bimedix_jax.evals.heldout import heldout_records
    from bimedix_jax.evals.tables import print_left_out
    from bimedix_jax.routing.knockout import MEANINGS, Meaning, cells_of, knock_out, possible, screen
    from bimedix_jax.routing.knockout_effects import report
    from bimedix_jax.routing.provenance import manifest, write_result
    from bimedix_jax.routing.sequences import sequences_of

    check_options(config)
    records = heldout_records(config.data, config.limit)
    folder = resolve(config.model, config.revision)
    tokenizer = tokenizer_of_model(folder, config.model, config.tokenizer, config.template)
    model = load(folder, base=config.base, adapter=config.adapter, router=config.router)
    context = model.config.max_position_embeddings
    sequences = sequences_of(records, tokenizer, min(config.max_length or context, context))
    print_left_out(console, sequences)
    asked: list[Meaning] = [meaning for meaning in MEANINGS if meaning in config.meanings]
    meanings, lacking = possible(asked, model.config)
    places, left_out = screen(model, sequences, config.screen, config.batch_tokens)
    left_out = dataclasses.replace(left_out, meanings=tuple(lacking))
    measured = knock_out(model, sequences, list(cells_of(places, meanings)), config.batch_tokens)
    result = report(measured, left_out, sequences, config.seed) | {
        "model": config.model,
        "adapter": config.adapter,
        "manifest": manifest(
            model,
            tokenizer,
            config.data,
            records,
            max_length=config.max_length,
            meanings=asked,
            screen=config.screen,
            seed=config.seed,
            batch_tokens=config.batch_tokens,
        ),
    }
    console.print(knockout_table(result))
    if config.out is not None:
        write_result(config.out, result)
        console.print(f"The result is in {config.out}.", highlight=False)
    return result


def check_options(config: Config) -> None:
    """Raises BimedixError for options that are out of range, and for a file that exists."""
    from bimedix_jax.files import check_file, peek_json
    from bimedix_jax.options import require_at_least_one

    require_at_least_one(config, "limit", "screen", "max_length", "batch_tokens")
    if not config.meanings:
        raise BimedixError("--meanings is empty; give silence, ban or swap")
    if config.out is not None:
        check_file(config.out, config.overwrite, lambda path: {"cells", "interaction"} <= set(peek_json(path)))


def knockout_table(result: dict[str, Any]) -> "FittedTable":
    """The cells with the largest interactions, or with the largest changes where there is only one language."""
    from bimedix_jax.process.terminal import FittedTable, number

    found = {(row["layer"], row["expert"], row["meaning"]): row for row in result["interaction"]}
    languages = [name for name in result["groups"] if "/" not in name]

    def size(cell: dict[str, Any]) -> float:
        row = found.get((cell["layer"], cell["expert"], cell["meaning"]))
        return max(map(abs, cell["delta"].values())) if row is None else abs(row["estimate"])

    cells = sorted(result["cells"], key=size, reverse=True)
    notes = [number(result["records"], "record") + "."]
    if len(cells) > ROWS:
        notes.append(f"{len(cells) - ROWS:,} more cells are in the JSON.")
    if result["left_out"]:
        notes.append(f"{len(result['left_out']):,} were left out (left_out in the JSON).")
    if not found:
        notes.append("There is no interaction: it needs records in two languages.")
    elif all(row["p_adjusted"] is None for row in found.values()):
        notes.append("There are too few clusters for intervals and p-values; 10 in each language are needed.")
    table = FittedTable(
        title="Change of the loss without an expert (layer, expert), nats per token of the answer",
        caption=" ".join(notes),
    )
    for column in ("cell", "meaning", *languages):
        table.add_column(column, justify="right")
    for column in ("ar - en" if languages == ["ar", "en"] else "interaction", "95 %", "p") if found else ():
        table.add_column(column, justify="right")
    for cell in cells[:ROWS]:
        row = found.get((cell["layer"], cell["expert"], cell["meaning"]))
        shown = [f"{cell['delta'][name]:+.4f}" for name in languages]
        if row is not None:
            known = row["p_adjusted"] is not None
            interval = f"{row['low']:+.4f}, {row['high']:+.4f}" if known else "-"
            shown += [f"{row['estimate']:+.4f}", interval, f"{row['p_adjusted']:.4f}" if known else "-"]
        table.add_row(f"{cell['layer']}, {cell['expert']}", cell["meaning"], *shown)
    return table
