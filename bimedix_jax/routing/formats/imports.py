"""Others' recordings of routes, checked and written as one of ours."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bimedix_jax import files
from bimedix_jax.data.roles import ROLES
from bimedix_jax.errors import BimedixError, listed
from bimedix_jax.routing.formats import counts, engines, jsonl
from bimedix_jax.routing.formats.checks import Checks, layer_names
from bimedix_jax.routing.formats.jsonl import another_hash
from bimedix_jax.routing.parts import COLUMNS, UNKNOWN_ID, UNKNOWN_ROLE, PartLayout, Routes, needs_wide, token_hash
from bimedix_jax.routing.recording import LayerName, Manifest, Recording
from bimedix_jax.routing.recording_writer import finish, write_parts

Format = Literal["jsonl", "olmoe", "counts", "vllm", "megatron", "nemo"]
READERS: dict[str, Callable[[Path], engines.Read]] = {
    "jsonl": jsonl.read,
    "olmoe": engines.read_olmoe,
    "vllm": engines.read_vllm,
    "megatron": engines.read_megatron,
    "nemo": engines.read_nemo,
}
BY_POSITION = "The file does not name its layers; they are taken to be layers 0 to L-1 of the model."


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What a file of routes does not say.

    Attributes:
      experts, top_k: number of experts of a layer, and of a token (for counts only).
      layers: module paths of the layers in the order of the file; those named "-" are left out.
      first: how many first positions of each record are kept apart; where the file has roles, they are used instead.
      keep_constant: accept layers that send all tokens to the same experts.
      tokens_of: a recording of the same records, whose token hashes must be equal.
    """

    experts: int | None = None
    top_k: int | None = None
    layers: tuple[str, ...] = ()
    first: int = 0
    keep_constant: bool = False
    tokens_of: Path | None = None


def import_routes(
    paths: Sequence[Path], form: Format, out: Path, options: ImportOptions, overwrite: bool = False
) -> Manifest:
    """Writes a recording from files of a format.

    Raises:
      BimedixError: what docs/formats.md refuses.
    """
    for name, least in (("experts", 1), ("top_k", 1), ("first", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise BimedixError(f"--{name.replace('_', '-')} is {value}; give at least {least}")
    given = {name: value for name, value in dataclasses.asdict(options).items() if value not in (None, (), 0, False)}
    kept = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    made = {"format": form, "files": [path.name for path in paths], **kept}
    with files.new_folder(out, overwrite) as folder:
        if form == "counts":
            layers, experts, layout, further = counts.write_counts(
                folder, paths, options.experts, options.top_k, options.keep_constant
            )
        else:
            layers, experts, layout, further = _write(folder, paths, form, options)
        hashes = {"data": _hash_of(paths)}
        return finish(folder, layers=layers, experts=experts, layout=layout, hashes=hashes, options=made, **further)


def _hash_of(paths: Sequence[Path]) -> str:
    """SHA-256 of a file, or of the hashes of several."""
    found = [files.sha256(path) for path in paths]
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def _write(
    folder: Path, paths: Sequence[Path], form: str, options: ImportOptions
) -> tuple[tuple[LayerName, ...], int, PartLayout, dict[str, Any]]:
    if options.top_k is not None:
        raise BimedixError("--top-k belongs to counts; other formats have the experts of every token")
    source, where = CheckedRecords(paths, form, options), ", ".join(map(str, paths))
    records = iter(source)
    first = next(records, None)
    if first is None:
        raise BimedixError(f"{where} has no record; name a file with some")
    columns = tuple(name for name in COLUMNS if name in first.columns)
    _, layers, top_k = first.columns["experts"].shape
    wide = options.experts is None or needs_wide(options.experts, gaps=False)
    layout = PartLayout(layers=layers, top_k=top_k, columns=columns, wide=wide)
    write_parts(folder, layout, itertools.chain([first], records))
    experts = source.checks.finish(source.layers, where)
    notes = (BY_POSITION,) if source.layers[0].path is None else ()
    return source.layers, experts, layout, {"notes": notes}


class CheckedRecords:
    """The records of files in order, each checked."""

    def __init__(self, paths: Sequence[Path], form: str, options: ImportOptions):
        self.paths, self.form, self.options = paths, form, options
        self.checks = Checks(options.experts, options.keep_constant)
        self.layers: tuple[LayerName, ...] = ()
        self.hashes = None if options.tokens_of is None else _hashes_of(options.tokens_of)
        self.named = layer_names([x for x in options.layers if x != "-"], "--layers") if options.layers else None

    def __iter__(self) -> Iterator[Routes]:
        for path in self.paths:
            for where, found, paths in READERS[self.form](path):
                routes = self._with_layers(found, paths, where)
                self.checks.add(routes, where)
                if self.hashes is not None:
                    self._check_hash(routes, where)
                yield self._with_roles(routes)

    def _with_layers(self, routes: Routes, paths: Sequence[object] | None, where: str) -> Routes:
        """The record with the layers that --layers keeps; the layers of all records must be the same."""
        count = routes.columns["experts"].shape[1]
        if paths is not None and self.named is None:
            names = layer_names(paths, where)
        elif self.named is not None and paths is None:
            if len(self.options.layers) != count:
                raise BimedixError(
                    f"{where} has {count} layers, but --layers names {len(self.options.layers)}; name all"
                )
            kept = [place for place, name in enumerate(self.options.layers) if name != "-"]
            by_layer = {name: routes.columns[name][:, kept] for name in routes.columns if routes.columns[name].ndim > 1}
            routes, names = dataclasses.replace(routes, columns={**routes.columns, **by_layer}), self.named
        elif paths is not None:
            raise BimedixError(f"{where} names its layers itself; leave --layers out")
        else:
            names = tuple(LayerName(number=number) for number in range(count))
        if len(names) != routes.columns["experts"].shape[1]:
            raise BimedixError(f"{where} names {len(names)} layers, but has routes of {count}; name each layer")
        if self.layers and names != self.layers:
            raise BimedixError(f"{where} has other layers than the records before it; import those of each model alone")
        self.layers = names
        return routes

    def _with_roles(self, routes: Routes) -> Routes:
        if routes.roles_N is not None or self.options.first == 0:
            return routes
        roles_N = np.full(len(routes.ids_N), UNKNOWN_ROLE, np.uint8)
        roles_N[: self.options.first] = ROLES.index("first")
        return dataclasses.replace(routes, roles_N=roles_N)

    def _check_hash(self, routes: Routes, where: str) -> None:
        assert self.hashes is not None
        if routes.id not in self.hashes:
            known = listed(sorted(self.hashes))
            raise BimedixError(f"{where}: {self.options.tokens_of} has no record {routes.id!r}, but {known}")
        if (routes.ids_N != UNKNOWN_ID).any() and self.hashes[routes.id] != token_hash(routes.ids_N):
            raise another_hash(where, str(self.options.tokens_of))


def _hashes_of(folder: Path) -> dict[str, str | None]:
    records = Recording.open(folder).records
    return dict(zip(records["id"], records["token_hash"], strict=True))
