"""Recipes: the sources of a training set, with the revision, licence and number of rows that each must have.

A recipe is a TOML file; those of the package are in assets/recipes. `resolve` turns it into a `ResolvedRecipe`: it
applies the options of the command line and finds the place of each source, a local copy or the hub.
"""

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bimedix_jax import files
from bimedix_jax.curation import readers
from bimedix_jax.curation.readers.hub import HubSet
from bimedix_jax.curation.readers.rows import Place
from bimedix_jax.data.records import explain
from bimedix_jax.errors import BimedixError

OWN_LICENCE = {"sample", "records"}
"""Readers of records that name their own licence."""

ROWS, RECORDS_MADE = "rows", "records"
Count = int | Annotated[tuple[int, int], Field(description="least and most")]


class Source(BaseModel):
    """A source of a recipe. It is read from `path` under the folder --data if that exists, else from the hub.

    Attributes:
      licence: licence of its records; checked for each of them.
      card: licence on the hub's card, where it differs from `licence`; checked before anything is read.
      expect: expected number of `rows`, of `records` made from them, and of rows of a part that the reader counts
        separately, such as pmc_llama/medmcqa: a number, or the least and the most.
      note: origin of the source and why it is in the recipe.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[\w./-]+$")
    reader: str
    path: str | None = None
    hub: str | None = None
    revision: str | None = None
    config: str | None = None
    split: str = "train"
    licence: str | None = None
    card: str | None = None
    options: dict[str, str] = Field(default_factory=dict)
    expect: dict[str, Count] = Field(default_factory=dict)
    note: str = ""

    @model_validator(mode="after")
    def _complete(self) -> "Source":
        if self.reader not in readers.READERS:
            raise ValueError(f"{self.name}: there is no reader {self.reader!r}")
        if self.reader != "sample" and self.path is None and self.hub is None:
            raise ValueError(f"{self.name}: a path, a hub id or both must be given")
        if (self.hub is None) != (self.revision is None):
            raise ValueError(f"{self.name}: hub and revision must be given together")
        if self.licence is None and self.reader not in OWN_LICENCE:
            raise ValueError(f"{self.name}: a licence is missing")
        if ROWS not in self.expect:
            raise ValueError(f"{self.name}: expect.rows is missing")
        return self


class Recipe(BaseModel):
    """The sources of a training set, and the evaluation sets that it must not overlap. `about` describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    about: str
    seed: int = 0
    heldout_fraction: float = Field(default=0.02, ge=0, le=1)
    sources: tuple[Source, ...]
    evaluation: tuple[Source, ...] = ()

    @model_validator(mode="after")
    def _names_are_unique(self) -> "Recipe":
        names = [source.name for source in (*self.sources, *self.evaluation)]
        if len(set(names)) < len(names):
            raise ValueError("two sources have the same name")
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedSource:
    """A source and the place it is read from. Fields as in Source; `licence` None means that none is checked."""

    name: str
    reader: str
    place: Place
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    licence: str | None = None
    card: str | None = None
    expect: Mapping[str, Count] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedRecipe:
    """A recipe whose every source has a place, with the options of the command line applied.

    Attributes:
      name: the recipe's, None for sources named on the command line.
      limit: maximum number of rows to read from each source.
      left_out: sources of the recipe that were not selected.
    """

    name: str | None
    sources: tuple[ResolvedSource, ...]
    evaluation: tuple[ResolvedSource, ...]
    seed: int
    heldout_fraction: float
    limit: int | None = None
    left_out: tuple[str, ...] = ()


def names() -> list[str]:
    """Names of the recipes of the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def load(name: str) -> Recipe:
    """A recipe of the package by name, or your own by the path of its TOML file.

    Raises:
        BimedixError: there is no such recipe, or the file is not one.
    """
    try:
        if name in names():
            text = (_folder() / f"{name}.toml").read_text("utf-8")
        else:
            text = files.read_text(Path(name).expanduser())
        return Recipe.model_validate(tomllib.loads(text))
    except OSError as error:
        raise BimedixError(
            f"there is no recipe {name}; name one of {', '.join(names())}, or the path of a TOML file"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise BimedixError(f"recipe {name} is not TOML ({error}); correct it") from error
    except ValidationError as error:
        raise BimedixError(f"{name} is not a valid recipe ({explain(error)}); correct it") from error


def resolve(
    recipe: Recipe,
    data: Path | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    local: Sequence[str] = (),
    limit: int | None = None,
) -> ResolvedRecipe:
    """Find the place of each source: first in `local` (NAME=PLACE), then in the folder `data`, then on the hub.

    Raises:
        BimedixError: a name is not in the recipe, a source has no place, or no source is left to read.
    """
    places: dict[str, str] = {}
    for name, _, place in (text.partition("=") for text in local):
        if name in places:
            raise BimedixError(f"--local {name} is given twice ({places[name]}, {place}); give it once")
        places[name] = place
    known = [source.name for source in (*recipe.sources, *recipe.evaluation)]
    unknown = sorted({*only, *skip, *places} - set(known))
    if unknown:
        raise BimedixError(f"recipe {recipe.name} has no source {unknown[0]!r}; its sources are {', '.join(known)}")
    wanted = [name for name in known if (not only or name in only) and name not in skip]
    if not any(source.name in wanted for source in recipe.sources):
        raise BimedixError(f"no source of recipe {recipe.name} is left; name some of them under --only")
    sources, evaluation = (
        tuple(_resolved(source, data, places.get(source.name)) for source in group if source.name in wanted)
        for group in (recipe.sources, recipe.evaluation)
    )
    return ResolvedRecipe(
        name=recipe.name,
        sources=sources,
        evaluation=evaluation,
        seed=recipe.seed,
        heldout_fraction=recipe.heldout_fraction,
        limit=limit,
        left_out=tuple(name for name in known if name not in wanted),
    )


def resolve_sources(
    sources: Sequence[str],
    evaluation: Sequence[str] = (),
    *,
    seed: int = 0,
    heldout_fraction: float = 0.02,
    limit: int | None = None,
) -> ResolvedRecipe:
    """A recipe without a name, of sources in the form that `readers.read` takes. No counts or licences are checked.

    Raises:
        BimedixError: a source is not of that form.
    """

    def resolved(source: str) -> ResolvedSource:
        reader, place, options = readers.parse(source)
        readers.check_options(reader, options)
        return ResolvedSource(name=source, reader=reader, place=place, options=options)

    return ResolvedRecipe(
        name=None,
        sources=tuple(map(resolved, sources)),
        evaluation=tuple(map(resolved, evaluation)),
        seed=seed,
        heldout_fraction=heldout_fraction,
        limit=limit,
    )


def describe(source: ResolvedSource) -> dict[str, Any]:
    """A source as the report and the dry run show it."""
    place = source.place
    on_hub = isinstance(place, HubSet)
    return {
        "name": source.name,
        "reader": source.reader,
        "from": f"hf:{place.name}#{'/'.join(filter(None, (place.config, place.split)))}" if on_hub else str(place),
        "revision": place.revision if on_hub else None,
        "licence": source.licence,
        "expect": dict(source.expect),
    }


def _resolved(source: Source, data: Path | None, local: str | None) -> ResolvedSource:
    options = dict(source.options)
    if source.licence is not None and "licence" in readers.options_of(source.reader):
        options["licence"] = source.licence
    readers.check_options(source.reader, options)
    return ResolvedSource(
        name=source.name,
        reader=source.reader,
        place=_place(source, data, local),
        options=options,
        licence=source.licence,
        card=source.card,
        expect=source.expect,
    )


def _place(source: Source, data: Path | None, local: str | None) -> Place:
    if local is not None:
        place = readers.place_of(local)
        if isinstance(place, Path) and not place.exists():
            raise BimedixError(f"there is no {place} to read {source.name} from; name a file or folder that exists")
        return place
    if source.reader == "sample":
        return Path()
    if data is not None and source.path is not None:
        path = files.inside(data, source.path)
        if path.exists():
            return path
    if source.hub is not None:
        return HubSet(source.hub, source.revision, source.config, source.split)
    if data is None:
        raise BimedixError(f"{source.name} needs a local copy of {source.path}; name its parent folder with --data")
    raise BimedixError(
        f"there is no {data / (source.path or '')} to read {source.name} from; name another path with "
        f"--local {source.name}=PATH"
    )


def _folder() -> Any:
    return resources.files("bimedix_jax") / "assets" / "recipes"
