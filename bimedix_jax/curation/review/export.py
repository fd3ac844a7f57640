"""Writes items for reviewers: assigns them, orders them, and writes them in the requested format."""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

from bimedix_jax.curation.review import label_studio, tables
from bimedix_jax.curation.review.items import ReviewItem
from bimedix_jax.errors import BimedixError

Form = Literal["label-studio", "csv", "jsonl"]
ENDINGS: dict[Form, str] = {"label-studio": ".json", "csv": ".csv", "jsonl": ".jsonl"}
GUIDELINES = "guidelines.md"


def in_order(items: Sequence[ReviewItem], seed: int) -> list[ReviewItem]:
    """Items ordered by a hash of their ids, so that the order does not reveal the reason for review."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed}:{item.id}".encode()).digest())


def shares(items: Sequence[ReviewItem], reviewers: Sequence[str], overlap: float) -> dict[str, list[ReviewItem]]:
    """Assign items to reviewers in turn; the first share `overlap` of them also to the next reviewer, for agreement.

    Raises:
        BimedixError: two names are equal or give the same file name, or a name gives none.
    """
    names = [_file_name(name) for name in reviewers]
    if len(set(names)) != len(names) or not all(names):
        raise BimedixError(f"reviewers {', '.join(reviewers)}: each needs a different name with letters or digits")
    given: dict[str, list[ReviewItem]] = {name: [] for name in reviewers}
    twice = round(overlap * len(items)) if len(reviewers) > 1 else 0
    for number, item in enumerate(items):
        given[reviewers[number % len(reviewers)]].append(item)
        if number < twice:
            given[reviewers[(number + 1) % len(reviewers)]].append(item)
    return given


def write(
    folder: Path, items: Sequence[ReviewItem], form: Form, blind: bool, reviewers: Sequence[str], overlap: float
) -> dict[str, int]:
    """Write the files into an existing folder, with guidelines and the configuration for Label Studio.

    Returns the number of items in each file. Without reviewers there is one file, `review`; the reviewer's name is then
    filled in by hand, or the name of the file is used.
    """
    given = shares(items, reviewers, overlap) if reviewers else {"": list(items)}
    counts = {}
    for reviewer, own in given.items():
        name = (_file_name(reviewer) or "review") + ENDINGS[form]
        if form == "label-studio":
            text = json.dumps(label_studio.tasks(own, blind), ensure_ascii=False, indent=1)
        else:
            text = (tables.to_csv if form == "csv" else tables.to_jsonl)(own, reviewer or None, blind)
        (folder / name).write_text(text, encoding="utf-8", newline="")
        counts[name] = len(own)
    assets = resources.files("bimedix_jax") / "assets" / "review"
    for asset in (GUIDELINES, *([label_studio.CONFIG] if form == "label-studio" else [])):
        with resources.as_file(assets / asset) as path:
            shutil.copyfile(path, folder / asset)
    return counts


def _file_name(reviewer: str) -> str:
    return re.sub(r"[^\w\-]+", "_", reviewer).strip("_").lower()
