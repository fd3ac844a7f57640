"""Tables of counts as OLMoE's analysis sums them: model, domain, layer, expert, token id, count."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from bimedix_jax.errors import BimedixError, listed
from bimedix_jax.routing.formats.checks import FEWEST_CHOICES, constant
from bimedix_jax.routing.parts import COUNT_SCHEMA, COUNTS, TEXTS, PartLayout, part_name, write_records, write_table
from bimedix_jax.routing.recording import LayerName

COLUMNS = ("model", "domain", "layer", "expert", "token_id", "count")
TYPES = {name: pa.string() if name in ("model", "domain") else pa.int64() for name in COLUMNS}


def read(path: Path) -> pa.Table:
    """The table of a CSV file, which may be compressed.

    Raises:
      BimedixError: it cannot be read, or has other columns.
    """
    if not path.is_file():
        raise BimedixError(f"there is no file {path}; correct the path")
    try:
        with pa.input_stream(path, compression="detect") as stream:
            options = pyarrow.csv.ConvertOptions(column_types=TYPES, strings_can_be_null=False)
            table = pyarrow.csv.read_csv(stream, convert_options=options)
    except (pa.ArrowException, OSError) as error:
        raise BimedixError(f"{path} cannot be read as CSV ({' '.join(str(error).split())}); correct it") from None
    if sorted(table.column_names) != sorted(COLUMNS):
        raise BimedixError(f"{path} has the columns {', '.join(table.column_names)}, not {', '.join(COLUMNS)}")
    empty = [name for name in COLUMNS if table[name].null_count]
    if empty:
        raise BimedixError(f"{path} has a row without {empty[0]}; correct it")
    return table.select(COLUMNS)


def write_counts(
    folder: Path, paths: Sequence[Path], experts: int | None, top_k: int | None, keep_constant: bool
) -> tuple[tuple[LayerName, ...], int, PartLayout, dict[str, Any]]:
    """Writes the parts of a recording of counts. A record is a domain of a model.

    Returns: the layers, the number of experts, the layout, and further fields of the manifest.

    Raises:
      BimedixError: what docs/formats.md refuses.
    """
    table, where = pa.concat_tables([read(path) for path in paths]), ", ".join(map(str, paths))
    names = [f"{model}/{domain}" for model, domain in zip(*(table[x].to_pylist() for x in COLUMNS[:2]), strict=True)]
    models = sorted(set(table["model"].to_pylist()))
    if len(models) > 1:
        raise BimedixError(f"{where} has {len(models)} models: {listed(models)}; import those of each model alone")
    found, record_X = np.unique(names, return_inverse=True)
    layer_X, expert_X, id_X, count_X = (table[name].to_numpy() for name in COLUMNS[2:])
    layers, layer_X = np.unique(layer_X, return_inverse=True)
    _check_ranges(where, layers, expert_X, id_X, count_X, experts)
    key = np.lexsort((id_X, expert_X, layer_X, record_X))
    record_X, layer_X, expert_X, id_X, count_X = (x[key] for x in (record_X, layer_X, expert_X, id_X, count_X))
    rows = np.stack([record_X, layer_X, expert_X, id_X])
    if (rows[:, 1:] == rows[:, :-1]).all(0).any():
        raise BimedixError(
            f"{where} has duplicates: the same domain, layer, expert and token id twice; add up the counts"
        )
    experts = int(expert_X.max()) + 1 if experts is None else experts
    if not keep_constant:
        _refuse_constant(where, layers, layer_X, expert_X, count_X, top_k or 1, experts)
    tokens_R, top_k = _tokens(where, record_X, layer_X, id_X, count_X, top_k)
    if not keep_constant:
        _refuse_constant(where, layers, layer_X, expert_X, count_X, top_k, experts)
    columns = {"record": record_X, "layer": layer_X, "expert": expert_X, "id": id_X, "count": count_X}
    write_table(folder / part_name(COUNTS, 0), COUNT_SCHEMA, columns)
    records = []
    for name, tokens in zip(found.tolist(), tokens_R.tolist(), strict=True):
        model, _, domain = name.rpartition("/")
        labels = sorted({"domain": domain, "model": model}.items())
        records.append({**dict.fromkeys(TEXTS), "id": name, "labels": labels, "tokens": tokens, "token_hash": None})
    write_records(folder, 0, records)
    layout = PartLayout(layers=len(layers), top_k=top_k, columns=(), wide=False)
    notes = ("The table names layers by number; single tokens and their order were not kept.",)
    return tuple(LayerName(number=int(layer)) for layer in layers), experts, layout, {"kind": "counts", "notes": notes}


def _refuse_constant(
    where: str,
    layers: np.ndarray,
    layer_X: np.ndarray,
    expert_X: np.ndarray,
    count_X: np.ndarray,
    top_k: int,
    experts: int,
) -> None:
    for place, layer in enumerate(layers):
        chosen = np.unique(expert_X[layer_X == place])
        if len(chosen) <= top_k < experts:
            raise constant(where, int(layer), chosen.tolist(), int(count_X[layer_X == place].sum()) // top_k)


def _check_ranges(
    where: str, layers: np.ndarray, expert_X: np.ndarray, id_X: np.ndarray, count_X: np.ndarray, experts: int | None
) -> None:
    if len(count_X) == 0:
        raise BimedixError(f"{where} has no rows; name a file with some")
    for what, values in (("layer", layers), ("expert", expert_X), ("token id", id_X)):
        if values.min() < 0:
            raise BimedixError(f"{where} has a {what} out of range: {values.min()}; numbers count from 0")
    if experts is not None and expert_X.max() >= experts:
        raise BimedixError(f"{where} has an expert out of range: {expert_X.max()}, with --experts {experts}")
    if count_X.min() < 1:
        raise BimedixError(f"{where} has the count {count_X.min()}; give counts from 1")


def _tokens(
    where: str, record_X: np.ndarray, layer_X: np.ndarray, id_X: np.ndarray, count_X: np.ndarray, top_k: int | None
) -> tuple[np.ndarray, int]:
    """Number of tokens of each record, and k.

    Every token has k choices in a layer, so k divides the sum of each token id, and no expert is chosen more often than
    there are tokens. Without `top_k` it is the only number of which both are true, or the largest if a smaller one
    would need an accident: that the numbers of tokens of many ids are all multiples of the same number.
    """
    rows = np.stack([record_X, layer_X, id_X])
    _, cell_X = np.unique(rows, axis=1, return_inverse=True)
    cell_X = cell_X.ravel()
    sums = np.bincount(cell_X, count_X).astype(np.int64)
    largest = np.zeros(len(sums), np.int64)
    np.maximum.at(largest, cell_X, count_X)
    divisor = math.gcd(*sums.tolist())
    most = int((sums // largest).min())
    fitting = [number for number in range(1, most + 1) if divisor % number == 0]
    ids = len(sums) // (int(layer_X.max()) + 1)  # of each record and token id; those of its layers are equal
    if top_k is not None and top_k not in fitting:
        raise BimedixError(
            f"{where} does not fit --top-k {top_k}: the sums by token id have the common divisor {divisor}, and leave "
            f"room for at most {most}; correct it, and give a table from which no rows were dropped"
        )
    told = fitting[-1] if top_k is None else top_k
    by_chance = told != divisor or sums.min() == sums.max() or ids < FEWEST_CHOICES
    if top_k is None and len(fitting) > 1 and by_chance:
        raise BimedixError(
            f"{where} does not say how many experts a token has: its counts fit {', '.join(map(str, fitting))}; give "
            "--top-k"
        )
    totals = np.zeros((record_X.max() + 1, layer_X.max() + 1), np.int64)
    np.add.at(totals, (record_X, layer_X), count_X)
    if (totals != totals[:, :1]).any():
        raise BimedixError(f"{where} has layers with different numbers of tokens; give all layers of the same tokens")
    return totals[:, 0] // told, told
