"""Data sets of the Hugging Face hub, and local folders laid out like them, through the `datasets` package.

`datasets` finds which files make a split and streams Parquet, CSV, text and Arrow. JSON files it would read whole where
they are one array (PMC-LLaMA's is 700 MB), so those are fetched into the hub's cache and read as local files. Neither
code nor pickles are ever loaded: scripts `datasets` itself refuses, and builders other than those named here we do.
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
"""Licence of a set whose card names none."""

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


@dataclasses.dataclass(frozen=True)
class HubSet:
    """One split of a set on the hub (`owner/name`) or of a local folder.

    Attributes:
      name: hub id or path of a folder.
      revision: branch, tag or commit; None is main. A local folder has none.
      config: configuration (subset); None where the set has one only.
      split: name of the split there.
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
        """What names its rows in quarantine and ids; the same at every revision and wherever a folder lies."""
        return "/".join(part for part in (Path(self.name).name, self.config, self.split) if part)


def parse(text: str) -> HubSet:
    """`owner/name` or a folder, then `@revision` and `#split` or `#config/split` as needed.

    Raises:
        BimedixError: neither a folder nor of the form of a hub id.
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
    """What the hub says of a set: the commit that is read, and the licence of its card."""

    commit: str
    licence: str


def pin(place: HubSet) -> Pinned:
    """The commit behind a set's revision and the licence its card states there.

    A revision of 7 to 39 hexadecimal digits must be the beginning of main's commit: the hub looks up whole ones only.

    Raises:
        BimedixError: the hub cannot be reached, has no such set or revision, or main has moved on.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (of httpx or httpx2)

    abbreviated = place.revision is not None and len(place.revision) < 40 and _COMMIT.fullmatch(place.revision)
    try:
        info = HfApi().dataset_info(place.name, revision=None if abbreviated else place.revision)
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BimedixError(
            f"the hub does not give {place.name} at {place.revision or 'main'} ({reason}); check name, revision and "
            "connection, or name a local copy"
        ) from error
    commit = info.sha or ""
    if abbreviated and not commit.startswith(str(place.revision)):
        raise BimedixError(
            f"main of {place.name} is {commit}, not {place.revision}; name the whole commit to read the older state"
        )
    card = info.card_data
    licence = card.get("license") if card is not None else None
    listed = licence if isinstance(licence, list) else [licence or NOT_STATED]
    return Pinned(commit, " AND ".join(map(str, listed)))


def parts(place: HubSet) -> Iterator[Path | Iterator[dict[str, Any]]]:
    """The files of a split in order: a path to read as a local file, or its rows themselves.

    Raises:
        BimedixError: there is no such set or split, it cannot be reached, or its format is not among BUILDERS.
    """
    try:
        import datasets
        from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (of httpx or httpx2)
    except ImportError as error:
        raise BimedixError("reading hub sets needs `datasets`; install it: pip install 'bimedix_jax[data]'") from error
    folder = place.folder
    if folder is not None and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        yield _saved(place, folder)
        return
    if folder is None and Path(place.name).exists():
        raise BimedixError(f"{place.name} lies here too, and `datasets` would take it for the hub's; start elsewhere")
    try:
        builder = datasets.load_dataset_builder(
            str(folder or place.name), place.config, revision=None if folder else place.revision
        )
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in BUILDERS:
            raise BimedixError(f"{place.name} is of type {kind}; only {', '.join(sorted(BUILDERS))} are read")
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
    """Rows of a folder that `save_to_disk` wrote; they are mapped, not loaded."""
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
    """`found`, with what `datasets` raises while streaming as an error of ours."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (of httpx or httpx2)

    try:
        yield from found
    except (HTTPError, OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise _failed(place, error) from error


def _inside(place: HubSet, folder: Path | None, name: str) -> str:
    """`name` of a data file, checked: a card may list files anywhere, ours must lie within the set."""
    if folder is not None:
        relative = Path(name).resolve()
        if not relative.is_relative_to(folder.resolve()):
            raise BimedixError(f"{folder} refers to {name}, outside of it; do not trust its README.md")
        return str(files.inside(folder, str(relative.relative_to(folder.resolve()))))
    if not name.startswith(f"hf://datasets/{place.name}@"):
        raise BimedixError(f"{place.name} refers to {name}, outside of it; do not trust its card")
    return name


def _fetched(place: HubSet, name: str) -> Path:
    """A file of the hub in the local cache."""
    from huggingface_hub import hf_hub_download

    at, _, path = name.removeprefix(f"hf://datasets/{place.name}@").partition("/")
    return Path(hf_hub_download(place.name, path, repo_type="dataset", revision=at))


def _failed(place: HubSet, error: Exception) -> BimedixError:
    reason = " ".join(str(error).split())[:300]
    return BimedixError(f"cannot read {place.name} ({reason}); check name, revision, configuration and connection")
