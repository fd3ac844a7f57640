"""Data sets on the Hugging Face hub, and local folders with the same layout, read with the `datasets` package.

`datasets` finds the files of a split and streams Parquet, CSV, text and Arrow. It would load a JSON file that is one
array completely (PMC-LLaMA's has 700 MB), so JSON files are downloaded to the hub's cache and read as local files. Code
and pickles are never loaded: `datasets` refuses scripts, and this module refuses builders other than those listed here.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bimedix_jax import files
from bimedix_jax.errors import BimedixError

BUILDERS = {"parquet", "json", "csv", "text", "arrow"}
PREFIX = "hf:"
NOT_STATED = "not stated"
"""Licence of a data set whose card names none."""

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


@dataclasses.dataclass(frozen=True)
class HubSet:
    """One split of a data set on the hub (`owner/name`) or in a local folder.

    Attributes:
      name: hub id, or path of a folder.
      revision: branch, tag or commit; None means main. Must be None for a local folder.
      config: configuration (subset); None if the data set has only one.
      split: name of the split in the data set.
      local: whether `name` is a folder.
    """

    name: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"
    local: bool = False

    @property
    def folder(self) -> Path | None:
        """The local folder, None for a set on the hub."""
        return Path(self.name).expanduser() if self.local else None

    @property
    def label(self) -> str:
        """Its name in the quarantine and in record ids. Does not depend on the revision or the parent folder."""
        return "/".join(part for part in (Path(self.name).name, self.config, self.split) if part)


def parse(text: str) -> HubSet:
    """Parse `owner/name` or a folder, optionally followed by `@revision` and `#split` or `#config/split`.

    Raises:
        BimedixError: `text` is neither a folder nor a hub id.
    """
    where, _, part = text.partition("#")
    name, _, revision = where.partition("@")
    config, _, split = part.rpartition("/")
    local = bool(name) and Path(name).expanduser().is_dir()
    if not local and not _NAME.fullmatch(name):
        raise BimedixError(f"{name!r} is neither a folder nor a hub id; write hf:owner/name@revision#config/split")
    if local and revision:
        raise BimedixError(f"{name} is a folder and has no revision; leave @{revision} out")
    return HubSet(name, revision or None, config or None, split or "train", local)


@dataclasses.dataclass(frozen=True)
class Pinned:
    """The commit of a data set on the hub, and the licence on its card."""

    commit: str
    licence: str


def pin(place: HubSet) -> Pinned:
    """The commit of a data set's revision, and the licence on its card at that revision.

    A revision of 7 to 39 hexadecimal digits must be a prefix of main's commit, since the hub accepts full hashes only.

    Raises:
        BimedixError: the hub cannot be reached, has no such data set or revision, or main is at another commit.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (of httpx or httpx2)

    abbreviated = place.revision is not None and len(place.revision) < 40 and _COMMIT.fullmatch(place.revision)
    try:
        info = HfApi().dataset_info(place.name, revision=None if abbreviated else place.revision)
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BimedixError(
            f"cannot get {place.name} at {place.revision or 'main'} from the hub ({reason}); check name, revision and "
            "connection, or name a local copy"
        ) from error
    commit = info.sha or ""
    if abbreviated and not commit.startswith(str(place.revision)):
        raise BimedixError(
            f"main of {place.name} is {commit}, not {place.revision}; give the full hash to read an older version"
        )
    card = info.card_data
    licence = card.get("license") if card is not None else None
    listed = licence if isinstance(licence, list) else [licence or NOT_STATED]
    return Pinned(commit, " AND ".join(map(str, listed)))


def parts(place: HubSet) -> Iterator[Path | Iterator[dict[str, Any]]]:
    """The parts of a split in order: each is the path of a local file, or an iterator of rows.

    Raises:
        BimedixError: there is no such data set or split, it cannot be reached, or its format is not in BUILDERS.
    """
    try:
        import datasets
        from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (of httpx or httpx2)
    except ImportError as error:
        raise BimedixError(
            "data sets on the hub need the package `datasets`; install it: pip install 'bimedix_jax[data]'"
        ) from error
    folder = place.folder
    if folder is not None and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        yield _saved(place, folder)
        return
    if folder is None and Path(place.name).exists():
        raise BimedixError(
            f"`datasets` would read the local folder {place.name} instead of the hub; run in another folder"
        )
    try:
        builder = datasets.load_dataset_builder(
            str(folder or place.name), place.config, revision=None if folder else place.revision
        )
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in BUILDERS:
            raise BimedixError(f"{place.name} has format {kind}; only {', '.join(sorted(BUILDERS))} can be read")
        listed = [str(name) for name in (builder.config.data_files or {}).get(place.split, [])]
        if not listed:
            known = ", ".join(builder.config.data_files or {})
            raise BimedixError(f"{place.name} has no split {place.split!r}; its splits are {known}")
        paths = [_inside(place, folder, name) for name in listed]
        if kind == "json":
            yield from (Path(path) if folder else _fetched(place, path) for path in paths)
        else:
            yield _guarded(place, iter(builder.as_streaming_dataset(split=place.split)))
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise _failed(place, error) from error


def _saved(place: HubSet, folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of a folder written by `save_to_disk`. The files are memory-mapped."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, RuntimeError) as error:
        raise _failed(place, error) from error
    if isinstance(found, datasets.DatasetDict):
        if place.split not in found:
            raise BimedixError(f"{folder} has no split {place.split!r}; its splits are {', '.join(map(str, found))}")
        found = found[place.split]
    return _guarded(place, iter(found))


def _guarded(place: HubSet, found: Iterator[Any]) -> Iterator[dict[str, Any]]:
    """`found`, with exceptions that `datasets` raises while streaming converted to BimedixError."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (of httpx or httpx2)

    try:
        yield from found
    except (HTTPError, OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise _failed(place, error) from error


def _inside(place: HubSet, folder: Path | None, name: str) -> str:
    """`name`, after checking that the file is inside the data set. A card could refer to any file."""
    if folder is not None:
        relative = Path(name).resolve()
        if not relative.is_relative_to(folder.resolve()):
            raise BimedixError(f"{folder} refers to {name}, which is outside of it; do not trust its README.md")
        return str(files.inside(folder, str(relative.relative_to(folder.resolve()))))
    if not name.startswith(f"hf://datasets/{place.name}@"):
        raise BimedixError(f"{place.name} refers to {name}, which is outside of it; do not trust its card")
    return name


def _fetched(place: HubSet, name: str) -> Path:
    """Download a file of the hub to the local cache."""
    from huggingface_hub import hf_hub_download

    at, _, path = name.removeprefix(f"hf://datasets/{place.name}@").partition("/")
    return Path(hf_hub_download(place.name, path, repo_type="dataset", revision=at))


def _failed(place: HubSet, error: Exception) -> BimedixError:
    reason = " ".join(str(error).split())[:300]
    return BimedixError(f"cannot read {place.name} ({reason}); check name, revision, configuration and connection")
