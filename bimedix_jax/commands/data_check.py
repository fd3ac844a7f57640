"""`bimedix data check`: find wrong translations among pairs that one already has."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console


@dataclass(frozen=True)
class Config:
    """Check English-Arabic translations by rules: lost numbers, other doses, an unrelated text, English left, and more.

        bimedix data check pairs.jsonl --out checked.jsonl

    A line of the file is {"en": ..., "ar": ...}, with an `id` if you like. Both sides are texts, or objects with
    `question` and `choices` (a list, or letters and texts), or records of this project. Question, choices and turns
    are checked one by one. No model is needed. From 200 pairs on, the file itself teaches which words go together.
    """

    pairs: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PAIRS")]
    """JSONL file with the fields en and ar."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File to write: a line of JSON for each pair, with its line, id and flags."""

    limit: int | None = None
    """Check only the first LIMIT pairs."""

    overwrite: bool = False
    """Replace --out if it exists."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} leaves nothing to check; give 1 or more")


def run(config: Config, console: Console) -> dict[str, Any]:
    """Check and report."""
    from bimedix_jax import files
    from bimedix_jax.curation.checks import pairs

    if config.out is not None:
        files.check_file(config.out, config.overwrite, pairs.is_checked)
    checked = pairs.check_file(config.pairs, config.limit)
    result = pairs.summary(checked)
    if config.out is not None:
        files.write_text(config.out, "".join(f"{row.to_json()}\n" for row in checked))
    share = result["flagged"] / result["n"]
    console.print(f"{result['flagged']:,} of {result['n']:,} pairs are flagged ({share:.1%})", highlight=False)
    for name, number in sorted(result["flags"].items(), key=lambda item: -item[1]):
        console.print(f"  {number:,} {name}", highlight=False)
    for row in [row for row in checked if row.flags][:12]:
        console.print(f"  line {row.line}: {'; '.join(map(str, row.flags))}", highlight=False, markup=False)
    if config.out is not None:
        console.print(f"all pairs with their flags: {config.out}", highlight=False)
    return {"output": None if config.out is None else str(config.out), **result}
