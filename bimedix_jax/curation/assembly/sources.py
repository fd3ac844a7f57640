"""The records of one source, from the pinned revision and under the licence that the recipe states."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from bimedix_jax.curation import readers
from bimedix_jax.curation.assembly.recipe import RECORDS_MADE, ROWS, ResolvedSource
from bimedix_jax.curation.quarantine import Quarantine
from bimedix_jax.curation.readers import hub
from bimedix_jax.curation.readers.hub import HubSet
from bimedix_jax.data.records import Record
from bimedix_jax.errors import BimedixError


def read_source(source: ResolvedSource, place: readers.Place, quarantine: Quarantine) -> Iterator[Record]:
    """Records of a source, read from `place` (see `pinned`), with a progress bar that counts rows.

    Raises:
        BimedixError: the source cannot be read, or a record has another licence than the recipe states.
    """
    expected = source.expect.get(ROWS)
    total = expected[1] if isinstance(expected, tuple) else expected
    if quarantine.limit is not None:
        total = min(total or quarantine.limit, quarantine.limit)
    with tqdm(desc=source.name, unit=" rows", total=total, disable=None) as bar:
        for record in readers.read_place(source.reader, place, source.options, quarantine):
            if source.licence is not None and record.licence != source.licence:
                raise BimedixError(
                    f"{record.id} of {source.name} has licence {record.licence!r}, but the recipe states "
                    f"{source.licence!r}; correct one of them"
                )
            yield record
            bar.update(quarantine.row + 1 - bar.n)


def pinned(source: ResolvedSource) -> readers.Place:
    """The place of a source. A data set on the hub is pinned to its commit, and the licence on its card is checked.

    Raises:
        BimedixError: see hub.pin; or the card states another licence.
    """
    place = source.place
    if not isinstance(place, HubSet) or place.folder is not None:
        return place
    found = hub.pin(place)
    stated = source.card or source.licence
    if stated is not None and stated.casefold() != found.licence.casefold():
        raise BimedixError(
            f"{place.name} has licence {found.licence!r} on the hub, but the recipe states {stated!r}; read the data "
            "set's card and correct the recipe"
        )
    return dataclasses.replace(place, revision=found.commit)


def unexpected(source: ResolvedSource, counts: dict[str, Any]) -> list[str]:
    """A sentence for each count that differs from what the recipe expects. `counts` has `read` and `records`."""
    found = {**counts["read"], ROWS: sum(counts["read"].values()), RECORDS_MADE: sum(counts["records"].values())}
    wrong = []
    for name, expected in source.expect.items():
        least, most = expected if isinstance(expected, tuple) else (expected, expected)
        if not least <= found.get(name, 0) <= most:
            wanted = f"{least:,}" if least == most else f"{least:,} to {most:,}"
            what = name if name in (ROWS, RECORDS_MADE) else f"rows of {name}"
            wrong.append(f"{source.name} has {found.get(name, 0):,} {what}, expected {wanted}")
    return wrong
