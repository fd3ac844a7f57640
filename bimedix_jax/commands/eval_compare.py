"""`bimedix eval compare`: two models on the same questions, with intervals and tests."""

import dataclasses
import logging
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compare two results: which differences are larger than chance, and which could not have been found.

    A and B are files NAME.json of `bimedix eval run --out`, or folders of `bimedix eval harness --out`. Results that
    differ in their questions, prompts or program are refused. docs/comparing.md explains what the numbers show.
    """

    results: Annotated[tuple[Path, Path], tyro.conf.Positional, tyro.conf.arg(metavar="A B")]
    """The two results. Differences are B minus A."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for comparison.md, comparison.csv, comparison.json and comparison.png; by default the result is only
    printed."""
    force: bool = False
    """Compare even if the data, the prompts or the program differ."""
    overwrite: bool = False
    """Replace --out if it is not empty."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Reads both results, compares, prints tables, writes files.

    Raises:
      BimedixError: a file is not a result, or the results cannot be compared.
    """
    from bimedix_jax.errors import BimedixError
    from bimedix_jax.evals import answers, compare, compare_page
    from bimedix_jax.files import check_replaceable

    if config.out is not None:
        check_replaceable(config.out, config.overwrite)
    a, b = map(answers.read, config.results)
    differing = answers.differing(a, b)
    if differing and not config.force:
        raise BimedixError(
            f"{a.path} and {b.path} cannot be compared: {'; '.join(differing)}. Evaluate both in the same way, or pass "
            "--force to compare anyway."
        )
    if differing:
        log.warning("compared although they differ: %s.", "; ".join(differing))
    found = compare.compare(a, b)
    for table in compare_page.tables(found):
        console.print(table)
    console.print(compare_page.sentence(found), highlight=False)
    console.print(compare_page.CAUTION.replace("`", ""), highlight=False)
    if config.out is not None:
        write(config.out, found, config.overwrite)
        console.print(f"written: {config.out}", highlight=False)
    return found


def write(out: Path, found: dict[str, Any], overwrite: bool) -> None:
    """Writes the page, the rows, the numbers and the figure."""
    import json

    from bimedix_jax.evals import compare_page, compare_picture
    from bimedix_jax.files import new_folder

    with new_folder(out, overwrite) as folder:
        (folder / compare_page.MARKDOWN).write_text(compare_page.markdown(found), "utf-8")
        (folder / compare_page.CSV).write_text(compare_page.csv_text(found), "utf-8")
        text = json.dumps(found, ensure_ascii=False, indent=2, default=str, allow_nan=False)
        (folder / compare_page.JSON).write_text(text + "\n", "utf-8")
        (folder / compare_page.FIGURE).write_bytes(compare_picture.draw(found))
