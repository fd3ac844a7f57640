"""Recipes: which sources make a set, at which revision, under which licence, and how many rows each must have.

A recipe is a TOML file; those of the package lie in assets/recipes. With command line and local copies it becomes a
`Plan`, in which every source has its place and nothing is left to decide.
"""

import dataclasses
import hashlib
import json
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
"""Readers of records that say their licence themselves."""

ROWS, RECORDS_MADE = "rows", "records"
Count = int | Annotated[tuple[int, int], Field(description="least and most")]


class Source(BaseModel):
    """A source of a recipe. It lies in `path` under the folder given as --data, or on the hub, or in either.

    Attributes:
      licence: of its records; asserted for each of them.
      card: licence that the hub's card states, where it differs; asserted before anything is read.
      expect: how many `rows` are read, how many `records` they make, and how many rows there are under a name that
        the reader counts by, such as pmc_llama/medmcqa: a number, or the least and the most.
      note: where this is from and why it is here.
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
            raise ValueError(f"{self.name}: name a path, a hub id or both")
        if (self.hub is None) != (self.revision is None):
            raise ValueError(f"{self.name}: hub and revision come together")
        if self.licence is None and self.reader not in OWN_LICENCE:
            raise ValueError(f"{self.name}: a licence is missing")
        if ROWS not in self.expect:
            raise ValueError(f"{self.name}: expect.rows is missing")
        return self


class Recipe(BaseModel):
    """The sources of a set, and the evaluation sets that it must not overlap. `about` says what it stands for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    about: str
    seed: int = 0
    heldout_fraction: float = Field(default=0.02, ge=0, le=1)
    sources: tuple[Source, ...]
    evaluation: tuple[Source, ...] = ()

    @model_validator(mode="after")
    def _names_differ(self) -> "Recipe":
        names = [source.name for source in (*self.sources, *self.evaluation)]
        if len(set(names)) < len(names):
            raise ValueError("two sources have one name")
        return self


@dataclasses.dataclass(frozen=True)
class Part:
    """A source with its place. Fields as in Source; `licence` None asserts nothing."""

    name: str
    reader: str
    place: Place
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    licence: str | None = None
    card: str | None = None
    expect: Mapping[str, Count] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is read, down to the place of every source.

    Attributes:
      recipe: its name, None for sources named on the command line.
      left_out: sources of the recipe that were not asked for.
    """

    recipe: str | None
    parts: tuple[Part, ...]
    evaluation: tuple[Part, ...]
    seed: int
    heldout_fraction: float
    limit: int | None = None
    left_out: tuple[str, ...] = ()

    def digest(self) -> str:
        """Tells plans apart: shards of different ones cannot be merged."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), default=str, sort_keys=True).encode()).hexdigest()


def names() -> list[str]:
    """Names of the recipes of the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def load(name: str) -> Recipe:
    """A recipe of the package by name, or one's own by the path of its TOML file.

    Raises:
        BimedixError: there is none, or the file is not a recipe.
    """
    try:
        if name in names():
            text = (_folder() / f"{name}.toml").read_text("utf-8")
        else:
            text = Path(name).expanduser().read_text("utf-8")
        return Recipe.model_validate(tomllib.loads(text))
    except OSError as error:
        raise BimedixError(
            f"there is no recipe {name}; name one of {', '.join(names())}, or the path of a TOML file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BimedixError(f"recipe {name} is not TOML ({error}); correct it") from error
    except ValidationError as error:
        raise BimedixError(f"recipe {name} is not one ({explain(error)}); correct it") from error


def plan(
    recipe: Recipe,
    data: Path | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    local: Sequence[str] = (),
    limit: int | None = None,
) -> Plan:
    """A recipe with places: `local` (NAME=PLACE) first, then what lies under `data`, then the hub.

    Raises:
        BimedixError: a name is not in the recipe, a source has no place, or nothing is left to read.
    """
    places: dict[str, str] = {name: place for name, _, place in (text.partition("=") for text in local)}
    known = [source.name for source in (*recipe.sources, *recipe.evaluation)]
    unknown = sorted({*only, *skip, *places} - set(known))
    if unknown:
        raise BimedixError(f"recipe {recipe.name} has no source {unknown[0]!r}; its sources are {', '.join(known)}")
    wanted = [name for name in known if (not only or name in only) and name not in skip]
    if not any(source.name in wanted for source in recipe.sources):
        raise BimedixError(f"no source of recipe {recipe.name} is left; name some of them under --only")
    parts, evaluation = (
        tuple(_part(source, data, places.get(source.name)) for source in group if source.name in wanted)
        for group in (recipe.sources, recipe.evaluation)
    )
    left_out = tuple(name for name in known if name not in wanted)
    return Plan(recipe.name, parts, evaluation, recipe.seed, recipe.heldout_fraction, limit, left_out)


def plan_of(
    sources: Sequence[str],
    evaluation: Sequence[str] = (),
    seed: int = 0,
    heldout_fraction: float = 0.02,
    limit: int | None = None,
) -> Plan:
    """A plan of sources as `readers.read` takes them, without expectations.

    Raises:
        BimedixError: a source is not of that form.
    """

    def part(source: str) -> Part:
        reader, place, options = readers.parse(source)
        readers.check_options(reader, options)
        return Part(source, reader, place, options)

    parts, others = (tuple(map(part, group)) for group in (sources, evaluation))
    return Plan(None, parts, others, seed, heldout_fraction, limit)


def describe(part: Part) -> dict[str, Any]:
    """A part as the report and the dry run show it."""
    place = part.place
    on_hub = isinstance(place, HubSet)
    return {
        "name": part.name,
        "reader": part.reader,
        "from": f"hf:{place.name}#{'/'.join(filter(None, (place.config, place.split)))}" if on_hub else str(place),
        "revision": place.revision if on_hub else None,
        "licence": part.licence,
        "expect": dict(part.expect),
    }


def _part(source: Source, data: Path | None, local: str | None) -> Part:
    options = dict(source.options)
    if source.licence is not None and "licence" in readers.options_of(source.reader):
        options["licence"] = source.licence
    readers.check_options(source.reader, options)
    place = _place(source, data, local)
    return Part(source.name, source.reader, place, options, source.licence, source.card, source.expect)


def _place(source: Source, data: Path | None, local: str | None) -> Place:
    if local is not None:
        place = readers.place_of(local)
        if isinstance(place, Path) and not place.exists():
            raise BimedixError(f"there is no {place} to read {source.name} from; name a file or folder")
        return place
    if source.reader == "sample":
        return Path()
    if data is not None and source.path is not None:
        path = files.inside(data, source.path)
        if path.exists():
            return path
    if source.hub is not None:
        return HubSet(source.hub, source.revision, source.config, source.split)
    where = (
        "give --data the folder that holds it"
        if data is None
        else f"put it there, or name it: --local {source.name}=PATH"
    )
    raise BimedixError(f"{source.name} is read from {source.path} under {data or 'a folder'}; {where}")


def _folder() -> Any:
    return resources.files("bimedix_jax") / "assets" / "recipes"
