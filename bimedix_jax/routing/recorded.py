"""From a recording to the tables that the statistics read.

    tables = tables_of(Recording.open("R"), baseline=Recording.open("BASE"))
    analyse(tables, fields=("language",), unit="record")

Template tokens and first positions are left out.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from bimedix_jax import files
from bimedix_jax.errors import BimedixError, listed
from bimedix_jax.routing.parts import SUPPLIED_BY, TEXTS, TOKENS, read_table, to_numpy
from bimedix_jax.routing.recording import MANIFEST, MISSING, Recording
from bimedix_jax.routing.sums import SparseMatrix, table
from bimedix_jax.routing.tables import Interaction, Tables, TokenCounts, TokenRoutes, TokenTable

APART = ("first", "template")
"""Roles of tokens that are left out: their routes say little about the text."""
UNITS = ("cluster", "document")
"""Fields that cluster records by default, the first that there is."""
RECORD = "record"
LEAST_FLOOR = 1e-4
"""Nats per token below which shuffled routes never count as a cost, however small the numerical noise."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GappedRoutes(TokenRoutes):
    """TokenRoutes in which numbers from `experts` on mark slots without an expert."""

    def choices(self, layer: int, row_N: np.ndarray, rows: int) -> SparseMatrix:
        """[rows, E] float64: choices by row; tokens of row -1 are left out."""
        kept_N = row_N >= 0
        chosen_NK = np.asarray(self.experts_LNK[layer])[kept_N]
        row_X = np.repeat(row_N[kept_N], chosen_NK.shape[1])
        real_X = chosen_NK.ravel() < self.experts
        place = (row_X[real_X], chosen_NK.ravel()[real_X])
        return table(place, np.ones(int(real_X.sum())), (rows, self.experts))


def unit_of(recording: Recording, unit: str | None) -> str:
    """The field that clusters records: by default one of UNITS if there is one, else each record is its own.

    Raises:
      BimedixError: no record has the field.
    """
    known = recording.groups()
    if unit is None:
        return next((name for name in UNITS if name in known), RECORD)
    if unit != RECORD and unit not in known:
        raise not_available(recording, unit, [RECORD, *known])
    return unit


def split_clusters(recording: Recording, unit: str) -> list[str]:
    """A warning for each field of UNITS whose clusters the unit divides, although their records are alike."""
    groups, found = recording.groups(), []
    units_R = np.arange(recording.manifest.records).astype(str) if unit == RECORD else clusters(groups[unit])
    for name in UNITS:
        if name not in groups or name == unit:
            continue
        units_of: dict[str, set[str]] = {}
        for label, own in zip(groups[name], units_R, strict=True):
            if label != MISSING:
                units_of.setdefault(label, set()).add(own)
        divided = sum(len(units) > 1 for units in units_of.values())
        if divided:
            found.append(
                f"the unit is the {unit}, but {divided} of {len(units_of)} values of {name} that the records declare "
                f"have several: records of one {name} are alike, so p-values may be too small, intervals too short and "
                f"levels too high; without --unit, the unit is the {unit_of(recording, None)}"
            )
    return found


def not_available(recording: Recording, name: str, known: Sequence[str]) -> BimedixError:
    """The error for a field that no record has, with what supplies it."""
    supplier = f"; {SUPPLIED_BY[name]}" if name in SUPPLIED_BY else ""
    return BimedixError(
        f"the field {name} of records is not available: {recording.folder} has {', '.join(known) or 'none'}{supplier}"
    )


def tables_of(
    recording: Recording,
    *,
    baseline: Recording | None = None,
    unit: str | None = None,
    stratum: str | None = None,
    roles: Sequence[str] | None = None,
    interactions: Sequence[Interaction] | None = None,
    correct: Mapping[str, bool] | None = None,
) -> Tables:
    """The tables of a recording: sums by record, and the routes of single tokens.

    Args:
      baseline: the base model's recording of the same records, for what was learned in fine-tuning.
      unit: field whose values are clusters; "record"; None as `unit_of`. Records without a value are clusters alone.
      stratum: field within whose values labels are exchanged.
      correct: by the id of a record, whether the model answered it right; by default the label `correct`, 0 or 1.
      roles: roles of the tokens that count, by default all but APART, and all tokens whose role is not known.

    Raises:
      BimedixError: no token is left, a field is missing, or the baseline has other tokens.
    """
    unit = unit_of(recording, unit)
    if recording.manifest.kind == "counts":
        if baseline is not None:
            raise BimedixError(
                f"{recording.folder} has counts only, which cannot be compared with a baseline token by token; leave "
                "--baseline out, or record the tokens"
            )
        found = _of_counts(recording)
    else:
        found = _of_tokens(recording, baseline, roles)
    groups = recording.groups()
    if stratum is not None and stratum not in groups:
        raise not_available(recording, stratum, list(groups))
    kept_R = found.kept_R
    groups = {name: labels[kept_R] for name, labels in groups.items()}
    return Tables(
        counts_RLE=found.counts_RLE[kept_R],
        tokens_R=found.tokens_R[kept_R],
        groups={name: labels for name, labels in groups.items() if name != "pair"},
        cluster_R=None if unit == RECORD else clusters(groups[unit]),
        pair_R=groups.get("pair"),
        stratum_R=None if stratum is None else groups[stratum],
        layer_L=np.array(recording.layer_numbers),
        weights_RLE=None if found.weights_RLE is None else found.weights_RLE[kept_R],
        routes=found.routes,
        random_RMLE=_kept(recording.random_counts(), kept_R),
        baseline_RLE=_kept(found.baseline_RLE, kept_R),
        nll_R=_kept(found.nll_R, kept_R),
        shuffled_nll_R=_kept(found.shuffled_nll_R, kept_R),
        correct_R=_kept(_correct(recording, correct), kept_R),
        nll_floor=max(LEAST_FLOOR, recording.manifest.nll_floor or 0.0),
        interactions=interactions,
    )


def _correct(recording: Recording, correct: Mapping[str, bool] | None) -> np.ndarray | None:
    """[R] 1.0, 0.0 or NaN: whether each record was answered right; None if no answer is known."""
    if correct is None:
        known = {None: np.nan, "0": 0.0, "1": 1.0}
        labels = [own.get("correct") for own in recording.records["labels"]]
        wrong = [text for text in labels if text not in known]
        if wrong:
            raise BimedixError(
                f"{recording.folder} has the label correct {wrong[0]!r}, which is neither 0 nor 1; import the routes "
                "again with 0 or 1, or name a file of answers (--answers)"
            )
        correct_R = np.array([known[text] for text in labels])
    else:
        correct_R = np.array([float(correct.get(name, np.nan)) for name in recording.records["id"]])
    return correct_R if np.isfinite(correct_R).any() else None


def _kept(values: np.ndarray | None, kept_R: np.ndarray) -> np.ndarray | None:
    """The values of the records that are kept; without a copy if all are."""
    return values if values is None or kept_R.all() else values[kept_R]


def clusters(labels_R: np.ndarray) -> np.ndarray:
    """The cluster of each record: its label, or a cluster of its own where it has none."""
    return np.array([f"{place}" if x == MISSING else f"={x}" for place, x in enumerate(labels_R)], object)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """Sums over the tokens that count of every record of a recording; `kept_R` are the records that have some."""

    counts_RLE: np.ndarray
    tokens_R: np.ndarray
    kept_R: np.ndarray
    weights_RLE: np.ndarray | None
    routes: TokenTable | None
    nll_R: np.ndarray | None
    shuffled_nll_R: np.ndarray | None
    baseline_RLE: np.ndarray | None


def _of_tokens(recording: Recording, baseline: Recording | None, roles: Sequence[str] | None) -> Sums:
    manifest, layout = recording.manifest, recording.manifest.layout
    counting, records = counting_roles(manifest.roles, roles), manifest.records
    given = [name for name in ("weights", "nll", "shuffled_nll") if name in manifest.columns]
    counts_RLE = np.zeros((records, len(manifest.layers), manifest.experts), np.int64)
    weights_RLE = np.zeros(counts_RLE.shape) if "weights" in given else None
    nll = {name: np.zeros((2, records)) for name in given if name != "weights"}
    tokens_R = np.zeros(records, np.int64)
    single: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for name in recording.names(TOKENS):
        columns = read_table(recording.folder / name, ["record", "id", "role", "experts", *given])
        part = {column: to_numpy(columns[column], layout.shape(column)) for column in columns.column_names}
        counts_N = counting[part["role"]]
        part = {column: values[counts_N] for column, values in part.items()}
        record_N = part["record"].astype(np.int64)
        if len(record_N):
            first, last = record_N[0], record_N[-1] + 1
            add_choices(counts_RLE[first:last], record_N - first, part["experts"], None)
            if weights_RLE is not None:
                add_choices(weights_RLE[first:last], record_N - first, part["experts"], part["weights"])
        tokens_R += np.bincount(record_N, minlength=records)
        for column, sum_2R in nll.items():
            scored_N = np.isfinite(part[column])
            sum_2R[0] += np.bincount(record_N[scored_N], part[column][scored_N].astype(np.float64), records)
            sum_2R[1] += np.bincount(record_N[scored_N], minlength=records)
        single.append((record_N.astype(np.int32), part["id"], part["experts"]))
    kept_R = counts_RLE.sum(2).min(1) > 0
    nll_R, shuffled_nll_R = _both_nll(nll)
    if nll_R is not None and shuffled_nll_R is not None:
        kept_R &= np.isfinite(nll_R) & np.isfinite(shuffled_nll_R)
    if not kept_R.any():
        raise BimedixError(f"{recording.folder} has no record with tokens of the roles that count; record longer ones")
    return Sums(
        counts_RLE=counts_RLE,
        tokens_R=tokens_R,
        kept_R=kept_R,
        weights_RLE=weights_RLE,
        routes=_routes(manifest.experts, kept_R, single),
        nll_R=nll_R,
        shuffled_nll_R=shuffled_nll_R,
        baseline_RLE=None if baseline is None else _baseline(recording, baseline, roles),
    )


def counting_roles(known: Sequence[str], roles: Sequence[str] | None) -> np.ndarray:
    """bool [256]: whether tokens of a role, by its number in the files, count."""
    wanted = [name for name in known if name not in APART] if roles is None else list(roles)
    wrong = [name for name in wanted if name not in known]
    if wrong:
        raise BimedixError(f"there is no role {wrong[0]}; choose among {', '.join(known)}")
    counting = np.zeros(256, bool)
    counting[[known.index(name) for name in wanted]] = True
    counting[len(known) :] = roles is None
    return counting


def add_choices(
    sums_RLE: np.ndarray, record_N: np.ndarray, chosen_NLK: np.ndarray, weights_NLK: np.ndarray | None
) -> None:
    """Adds, by record, layer and expert, 1 or the weight for each slot that has an expert."""
    records, layers, experts = sums_RLE.shape
    for layer in range(layers):
        chosen_NK = chosen_NLK[:, layer]
        real_NK = chosen_NK < experts
        place_X = (record_N[:, None] * experts + chosen_NK)[real_NK]
        weights_X = None if weights_NLK is None else weights_NLK[:, layer][real_NK].astype(np.float64)
        found = np.bincount(place_X, weights_X, records * experts).reshape(records, experts)
        sums_RLE[:, layer] += found if weights_NLK is not None else found.astype(np.int64)


def _both_nll(sums: dict[str, np.ndarray]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Mean NLL per token of each record, with its own and with shuffled routes; (None, None) unless both are there."""
    if len(sums) < 2:
        return None, None
    with np.errstate(invalid="ignore"):
        return sums["nll"][0] / sums["nll"][1], sums["shuffled_nll"][0] / sums["shuffled_nll"][1]


def _routes(
    experts: int, kept_R: np.ndarray, single: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> TokenTable | None:
    """The single tokens (record, id, experts) of the records that are kept; None if the ids of some are not known."""
    record_N, id_N, chosen_NLK = (
        parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in zip(*single, strict=True)
    )
    if id_N.min(initial=0) < 0:
        return None
    number_R = np.cumsum(kept_R) - 1
    if not kept_R.all():
        kept_N = kept_R[record_N]
        record_N, id_N, chosen_NLK = record_N[kept_N], id_N[kept_N], chosen_NLK[kept_N]
    kind = GappedRoutes if (chosen_NLK >= experts).any() else TokenRoutes
    return kind(record_N=number_R[record_N], id_N=id_N, experts_LNK=chosen_NLK.swapaxes(0, 1), experts=experts)


def _of_counts(recording: Recording) -> Sums:
    manifest, found = recording.manifest, recording.counts()
    experts, layers, records = manifest.experts, len(manifest.layers), manifest.records
    counts_RLE = np.zeros((records, layers, experts), np.int64)
    np.add.at(counts_RLE, (found["record"], found["layer"], found["expert"]), found["count"].astype(np.int64))
    pairs = np.stack([found["record"].astype(np.int64), found["id"].astype(np.int64)])
    (record_P, id_P), entry_X = np.unique(pairs, axis=1, return_inverse=True)
    first_layer = found["layer"] == 0
    tokens_P = np.bincount(entry_X.ravel()[first_layer], found["count"][first_layer], len(record_P)) / manifest.top_k
    routes = TokenCounts(
        record_N=record_P,
        id_N=id_P,
        tokens_N=tokens_P,
        entry_X=entry_X.ravel(),
        layer_X=found["layer"].astype(np.int64),
        expert_X=found["expert"].astype(np.int64),
        count_X=found["count"].astype(np.float64),
        experts=experts,
    )
    return Sums(
        counts_RLE=counts_RLE,
        tokens_R=np.array(recording.records["tokens"], np.int64),
        kept_R=np.ones(records, bool),
        weights_RLE=None,
        routes=routes,
        nll_R=None,
        shuffled_nll_R=None,
        baseline_RLE=None,
    )


def _baseline(recording: Recording, baseline: Recording, roles: Sequence[str] | None) -> np.ndarray:
    """[R, L, E]: counts of the baseline in the order of the recording's records.

    Raises:
      BimedixError: it is the recording itself, has other layers or experts, lacks a record, or a record has other
        tokens or another language, kind, ... there.
    """
    ours, theirs = recording.manifest, baseline.manifest
    if files.sha256(recording.folder / MANIFEST) == files.sha256(baseline.folder / MANIFEST):
        raise BimedixError(
            f"{baseline.folder} is the recording {recording.folder} itself, or a copy of it; name the recording of the "
            "base model"
        )
    if (ours.experts, ours.kind) != (theirs.experts, theirs.kind) or recording.layer_numbers != baseline.layer_numbers:
        raise BimedixError(
            f"{baseline.folder} has other layers or experts than {recording.folder}; name its base model's"
        )
    place = {name: number for number, name in enumerate(baseline.records["id"])}
    missing = [name for name in recording.records["id"] if name not in place]
    if missing:
        raise BimedixError(f"{baseline.folder} lacks {len(missing)} records: {listed(missing)}; record the same data")
    order_R = np.array([place[name] for name in recording.records["id"]])
    hashes = baseline.records["token_hash"]
    for name, own, there in zip(recording.records["id"], recording.records["token_hash"], order_R, strict=True):
        if own is None or hashes[there] != own:
            raise BimedixError(
                f"record {name!r} has another token hash in {baseline.folder} than in {recording.folder}; record both "
                "with the same tokenizer, template and data"
            )
    for field in TEXTS:
        for row, there in enumerate(order_R):
            own, other = recording.records[field][row], baseline.records[field][there]
            if None not in (own, other) and own != other:
                raise BimedixError(
                    f"record {recording.records['id'][row]!r} has the {field} {other!r} in {baseline.folder}, but "
                    f"{own!r} in {recording.folder}; correct the labels of one of them"
                )
    return _of_tokens(baseline, None, roles).counts_RLE[order_R]
