"""The Parquet files of a recording of routes, in parts of whole records. A file gets its name when it is complete.

    tokens-00000.parquet    a row a token: record, position, id, role, and lists over layers (`PartLayout.columns`)
    records-00000.parquet   a row a record: what is known of it, and the hash of its tokens
    random-00000.parquet    a row a record and layer: how often each of N random routers chose each expert

Letters as in models/axes.py; N tokens, R random routers.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bimedix_jax.errors import BimedixError

TOKENS, RECORDS, RANDOM, COUNTS = "tokens", "records", "random", "counts"
PART_ROWS = 1 << 20
"""Rows (a token in a layer) from which on a part is full."""
UNKNOWN_ID = -1
"""Token id where the source of a recording does not tell it."""
UNKNOWN_ROLE = 255
TEXTS = ("language", "kind", "specialty", "source", "split", "pair", "document", "cluster")
"""What may be known of a record besides its id."""
SUPPLIED_BY = {
    "language": "a file of records has it",
    "kind": "a file of records has it",
    "role": "records have it, packed rows only tell answers from the rest",
    "pair": "the reader `tico19` supplies it, and `records` takes it from `provenance.pair` of each line",
    "document": "the reader `tico19` supplies it, and `records` takes it from `provenance.document` of each line",
}
"""What supplies a field that the data lack."""
COLUMNS = ("nll", "shuffled_nll", "experts", "weights", "norms", "margin", "entropy", "done")
"""Columns of tokens that a recording may have, besides record, position, id and role."""
PAIRS, LAYERS = ("experts", "weights", "norms"), ("margin", "entropy")
"""Columns with a value for each expert of each layer, and with a value for each layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartLayout:
    """How the files store a recording.

    Attributes:
      layers, top_k: number of layers, and of slots a token.
      columns: those of COLUMNS that there are.
      wide: experts as uint16 instead of uint8.
      gaps: there may be slots without an expert, which the largest value of `experts` marks.
      exact: weights, margins, entropies and norms as float32 instead of float16.
      routers: number of random routers.
    """

    layers: int
    top_k: int
    columns: tuple[str, ...]
    wide: bool
    gaps: bool = False
    exact: bool = False
    routers: int = 0

    @property
    def no_expert(self) -> int:
        """The value of `experts` in a slot without an expert, if there are gaps."""
        return 0xFFFF if self.wide else 0xFF

    @cached_property
    def tokens(self) -> pa.Schema:
        """The schema of the tokens."""
        real, expert = (pa.float32() if self.exact else pa.float16()), (pa.uint16() if self.wide else pa.uint8())
        types: dict[str, pa.DataType] = {
            "record": pa.uint32(),
            "position": pa.uint32(),
            "id": pa.int32(),
            "role": pa.uint8(),
            "nll": pa.float32(),
            "shuffled_nll": pa.float32(),
            "experts": fixed_list(expert, self.layers * self.top_k),
            "weights": fixed_list(real, self.layers * self.top_k),
            "norms": fixed_list(real, self.layers * self.top_k),
            "margin": fixed_list(real, self.layers),
            "entropy": fixed_list(real, self.layers),
            "done": pa.uint32(),
        }
        names = ["record", "position", "id", "role", *(name for name in COLUMNS if name in self.columns)]
        return pa.schema([pa.field(name, types[name], nullable=False) for name in names])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the values of one token."""
        if name in PAIRS:
            return (self.layers, self.top_k)
        return (self.layers,) if name in LAYERS else ()


def needs_wide(experts: int, gaps: bool) -> bool:
    """Whether the numbers of so many experts, and with gaps a mark, need more than 8 bits."""
    return experts + gaps > 256


def fixed_list(item: pa.DataType, size: int) -> pa.DataType:
    return pa.list_(pa.field("element", item, nullable=False), size)


RECORD_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        *(pa.field(name, pa.string()) for name in TEXTS),
        pa.field("labels", pa.map_(pa.string(), pa.string())),
        pa.field("tokens", pa.uint32(), nullable=False),
        pa.field("token_hash", pa.string()),
    ]
)
COUNT_SCHEMA = pa.schema(
    [
        pa.field("record", pa.uint32(), nullable=False),
        pa.field("layer", pa.uint32(), nullable=False),
        pa.field("expert", pa.uint32(), nullable=False),
        pa.field("id", pa.int32(), nullable=False),
        pa.field("count", pa.uint64(), nullable=False),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Routes:
    """The routes of one record.

    Attributes:
      id: of the record. about: what is known of it, by the names in TEXTS. labels: further groups that it belongs to.
      ids_N: int, UNKNOWN_ID where not known. roles_N: index in data.roles.ROLES; None if not known.
      columns: the columns of the layout; experts [N, L, K] has -1 in a slot without an expert, nll NaN where there is
        none.
      random_RLE: how often each random router chose each expert.
      experts: number of experts of a layer, where the source tells it.
    """

    id: str
    ids_N: np.ndarray
    columns: Mapping[str, np.ndarray]
    about: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    roles_N: np.ndarray | None = None
    random_RLE: np.ndarray | None = None
    experts: int | None = None


def token_hash(ids_N: np.ndarray) -> str | None:
    """SHA-256 of token ids as little-endian int32; None where an id is not known."""
    if len(ids_N) == 0 or ids_N.min() < 0:
        return None
    return hashlib.sha256(np.ascontiguousarray(ids_N, "<i4").tobytes()).hexdigest()


def write_part(folder: Path, number: int, first: int, layout: PartLayout, found: Sequence[Routes]) -> None:
    """Writes a part. The file of the records gets its name last: where it exists, the part is complete.

    Args:
      first: index of the first record in the recording.
    """
    write_table(folder / part_name(TOKENS, number), layout.tokens, _token_columns(first, layout, found))
    if layout.routers:
        experts = _random(found[0]).shape[2]
        list_type = fixed_list(pa.uint32(), layout.routers * experts)
        fields = {"record": pa.uint32(), "layer": pa.uint32(), "counts": list_type}
        schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields.items()])
        counts = np.stack([_random(routes).swapaxes(0, 1) for routes in found])
        columns = {
            "record": np.repeat(first + np.arange(len(found)), layout.layers),
            "layer": np.tile(np.arange(layout.layers), len(found)),
            "counts": counts,
        }
        write_table(folder / part_name(RANDOM, number), schema, columns)
    write_records(folder, number, [record_row(routes) for routes in found])


def record_row(routes: Routes) -> dict[str, Any]:
    """The row of a record in its table."""
    texts = {name: routes.about.get(name) for name in TEXTS}
    labels, tokens = sorted(routes.labels.items()), len(routes.ids_N)
    return {"id": routes.id, **texts, "labels": labels, "tokens": tokens, "token_hash": token_hash(routes.ids_N)}


def write_records(folder: Path, number: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the table of the records of a part."""
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in RECORD_SCHEMA.names}
    columns["tokens"] = np.array(columns["tokens"], np.int64)
    write_table(folder / part_name(RECORDS, number), RECORD_SCHEMA, columns)


def _random(routes: Routes) -> np.ndarray:
    assert routes.random_RLE is not None  # the layout has random routers
    return routes.random_RLE


def _token_columns(first: int, layout: PartLayout, found: Sequence[Routes]) -> dict[str, np.ndarray]:
    lengths = [len(routes.ids_N) for routes in found]
    columns = {
        "record": np.repeat(first + np.arange(len(found)), lengths),
        "position": np.concatenate([np.arange(length) for length in lengths]),
        "id": np.concatenate([routes.ids_N for routes in found]),
        "role": np.concatenate([_roles(routes) for routes in found]),
    }
    for name in layout.columns:
        values = np.concatenate([routes.columns[name] for routes in found])
        if name == "experts" and layout.gaps:
            values = np.where(values < 0, layout.no_expert, values)
        columns[name] = values
    return columns


def _roles(routes: Routes) -> np.ndarray:
    return np.full(len(routes.ids_N), UNKNOWN_ROLE) if routes.roles_N is None else routes.roles_N


def write_table(path: Path, schema: pa.Schema, columns: Mapping[str, Any]) -> None:
    """Writes a Parquet file that depends only on its values, under a temporary name first."""
    arrays = [_array(field.type, columns[field.name]) for field in schema]
    whole = [field.name for field in schema if pa.types.is_integer(field.type) and field.name != "position"]
    lists = [field.name for field in schema if pa.types.is_fixed_size_list(field.type)]
    numbers = [f"{name}.list.element" for name in lists if pa.types.is_integer(schema.field(name).type.value_type)]
    options: dict[str, Any] = {"compression": "none", "use_dictionary": [*whole, *numbers], "write_statistics": False}
    if "position" in schema.names:
        options["column_encoding"] = {"position": "DELTA_BINARY_PACKED"}
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(pa.table(arrays, schema=schema), partial, row_group_size=PART_ROWS, **options)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _array(kind: pa.DataType, values: Any) -> pa.Array:
    """pa.array without the import of pandas, which takes half a second."""
    if pa.types.is_map(kind):
        return _maps(values)
    if not isinstance(values, np.ndarray):
        return _strings(values)
    if not pa.types.is_fixed_size_list(kind):
        return _numbers(values, kind)
    return pa.FixedSizeListArray.from_arrays(_numbers(values, kind.value_type), type=kind)


def _numbers(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    flat = np.ascontiguousarray(values, kind.to_pandas_dtype()).reshape(-1)
    return pa.Array.from_buffers(kind, len(flat), [None, pa.py_buffer(flat)])


def _strings(values: Sequence[str | None]) -> pa.Array:
    encoded = [(value or "").encode() for value in values]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    known = np.packbits(np.array([value is not None for value in values], bool), bitorder="little")
    buffers = [pa.py_buffer(x) for x in (known, offsets, b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(encoded), buffers)


def _maps(pairs: Sequence[Sequence[tuple[str, str]]]) -> pa.Array:
    """A map from text to text for each row."""
    offsets = _numbers(np.cumsum([0, *map(len, pairs)]), pa.int32())
    keys, values = (_strings([pair[place] for own in pairs for pair in own]) for place in (0, 1))
    return pa.MapArray.from_arrays(offsets, keys, values)


def part_name(kind: str, number: int) -> str:
    """File of a part: tokens-00003.parquet."""
    return f"{kind}-{number:05d}.parquet"


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file.

    Raises:
      BimedixError: it is missing or damaged.
    """
    try:
        return pq.ParquetFile(path).read(columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        problem = " ".join(str(error).split())
        raise BimedixError(f"{path} cannot be read ({problem}); record or import the routes again") from None


def to_numpy(column: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    """The values of a column, [rows, *shape], without a copy where there is one chunk."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        size = array.type.list_size  # not array.flatten, which imports pyarrow.compute
        array = array.values.slice(array.offset * size, len(array) * size)
    kind, buffer = array.type.to_pandas_dtype(), array.buffers()[1]
    assert not array.null_count  # the schemas of numbers allow none
    start = array.offset * np.dtype(kind).itemsize  # not array.to_numpy, which imports pandas
    values = np.empty(0, kind) if not len(array) else np.frombuffer(buffer, kind, len(array), start)
    return values.reshape(-1, *shape)
