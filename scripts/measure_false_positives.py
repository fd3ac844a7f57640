"""False positives, coverage and power of the statistics of routes, on recordings whose truth is known.

    python scripts/measure_false_positives.py --datasets 1000 --json      # some minutes on one core
    python scripts/measure_false_positives.py --records 40 --layers 8 --experts 16 --seed 1

`fpr` counts the data sets without any effect in which a cell is significant at 0.05, after all adjustments: half of the
records are Arabic. `fpr_unequal` has three times as many Arabic records, with a fifth of the variance.
`fpr_relabelled` gives random labels to a real recording, and `fpr_per_token` permutes tokens instead of records, which
must fail if these data sets are to show anything. On the unequal groups, `fpr_plain` permutes differences that are not
studentised; `fpr_unequal_permuted` and `fpr_unequal_resampled` use one of the two p-values of which the larger counts.
`fpr_within_token` tests routes that depend on token ids only, in groups with other frequencies of ids.

`fpr_answers` is of the question whether routes of a question in two languages are further apart where one answer is
right: short questions have one right answer more often, and distances do not depend on it. `fpr_answers_plain` has the
distances of the loads as they were counted, which few tokens increase. `coverage_answers` and `detection_answers` are
of a planted difference in one layer.

`coverage` is the share of 95 % intervals that contain the true difference. `power` has the detections of a planted
difference in one cell, and `detection_at_mde80` those of the effect that the analysis states as detectable.

A record's routes are drawn around loads of its own (Dirichlet), so its tokens are alike. The real recording is
docs/results/routing_recording.csv, or `--recording FILE` with its columns; `--record MODEL` writes such a file.
"""

import argparse
import csv
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bimedix_jax.errors import BimedixError, natural, positive, run_script
from bimedix_jax.routing.answers import answers_of
from bimedix_jax.routing.clusters import Comparison, generator
from bimedix_jax.routing.contrasts import contrasts
from bimedix_jax.routing.evidence import token_evidence
from bimedix_jax.routing.information import divergence, jensen_shannon
from bimedix_jax.routing.stats import PERMUTATIONS, Test, compare, critical_value, detectable
from bimedix_jax.routing.tables import Tables, TokenRoutes, count_routes

ALPHA = 0.05
RECORDING = Path(__file__).resolve().parents[1] / "docs/results/routing_recording.csv"
SIZES = (0.25, 0.5, 0.75, 1.0, 1.5)
"""Planted differences, in units of the mean detectable effect."""
CONCENTRATION, CALM, WILD = 20.0, 40.0, 8.0
"""Of the Dirichlet distribution of a record's loads: the larger, the more alike records are."""


class Shape(argparse.Namespace):
    """The options: numbers of records, layers, experts, experts of a token, and tokens of a record."""

    datasets: int
    records: int
    layers: int
    experts: int
    top_k: int
    tokens: int
    seed: int
    permutations: int
    relabellings: int
    token_datasets: int
    recording: Path
    record: str | None
    limit: int
    json: bool


def base_load(shape: Shape) -> np.ndarray:
    """[E]: the true load, uneven."""
    load_E = np.linspace(1, 2, shape.experts)
    return load_E / load_E.sum()


def draw(
    shape: Shape,
    rng: np.random.Generator,
    first_R: np.ndarray,
    concentration_R: np.ndarray,
    planted: float = 0.0,
) -> np.ndarray:
    """counts [R, L, E]; `planted` is moved from the last to the first expert of the first layer, in the first group."""
    records = len(first_R)
    alpha_RLE = concentration_R[:, None, None] * np.tile(base_load(shape), (records, shape.layers, 1))
    alpha_RLE[first_R, 0, 0] += planted * concentration_R[first_R]
    alpha_RLE[first_R, 0, -1] -= planted * concentration_R[first_R]
    load_RLE = rng.standard_gamma(np.maximum(alpha_RLE, 1e-6))
    load_RLE /= load_RLE.sum(2, keepdims=True)
    tokens_R = np.maximum(rng.lognormal(np.log(shape.tokens), 0.5, records).astype(int), 4)
    return rng.multinomial(np.broadcast_to(shape.top_k * tokens_R[:, None], load_RLE.shape[:2]), load_RLE)


def balanced(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Labels and concentrations of two equal groups."""
    return np.arange(shape.records) % 2 == 0, np.full(shape.records, CONCENTRATION)


def unequal(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """As many more records of the first group as make three for each of the second, which vary more."""
    second = max(shape.records // 3, 10)
    first_R = np.arange(4 * second) < 3 * second
    return first_R, np.where(first_R, CALM, WILD)


def tested(shape: Shape, counts_RLE: np.ndarray, first_R: np.ndarray, rng: np.random.Generator) -> Test:
    """The test of the analysis on these counts."""
    loads_CX = (counts_RLE / counts_RLE.sum(2, keepdims=True)).reshape(len(first_R), -1)
    return compare(Comparison(values_CX=loads_CX, first_C=first_R), rng, shape.permutations)


def null_sets(shape: Shape, name: str, groups: tuple[np.ndarray, np.ndarray], plain: bool) -> dict[str, float]:
    """False positives, coverage and stated detectable effects over data sets without an effect."""
    first_R, concentration_R = groups
    positives, alone, covered, detectable_effects, plain_positives = [], [], [], [], []
    for number in range(shape.datasets):
        rng = generator(shape.seed, name, str(number))
        counts_RLE = draw(shape, rng, first_R, concentration_R)
        test = tested(shape, counts_RLE, first_R, rng)
        positives.append(test.p_X.min() <= ALPHA)
        alone.append([np.abs(test.t_X).max() > critical_value(largest_B, ALPHA) for largest_B in test.largest])
        covered.append(((test.low_X <= 0) & (test.high_X >= 0)).mean())
        detectable_effects.append(detectable(test, ALPHA)[0])
        if plain:
            plain_positives.append(plain_p(counts_RLE, first_R, rng, shape.permutations) <= ALPHA)
    return {
        "fpr": float(np.mean(positives)),
        "fpr_permuted": float(np.mean(alone, axis=0)[0]),
        "fpr_resampled": float(np.mean(alone, axis=0)[1]),
        "coverage": float(np.mean(covered)),
        "mde80": float(np.mean(detectable_effects)),
        "fpr_plain": float(np.mean(plain_positives)) if plain else float("nan"),
    }


def plain_p(counts_RLE: np.ndarray, first_R: np.ndarray, rng: np.random.Generator, permutations: int) -> float:
    """The adjusted p-value of the largest difference, if differences are not studentised."""
    loads_CX = (counts_RLE / counts_RLE.sum(2, keepdims=True)).reshape(len(first_R), -1)
    centred_CX = loads_CX - loads_CX.mean(0)
    labels_BC = rng.permuted(np.tile(first_R, (permutations, 1)), axis=1).astype(np.float64)
    largest_B = np.abs(labels_BC @ centred_CX).max(1)
    return float((1 + (largest_B >= np.abs(first_R @ centred_CX).max()).sum()) / (1 + permutations))


class Planted(NamedTuple):
    """Over data sets with a difference in one cell: detections, coverage, and the effect stated as detectable."""

    detected: float
    covered: float
    covered_jsd: float
    mde80: float


def planted_sets(shape: Shape, planted: float, name: str, datasets: int) -> Planted:
    """Data sets of two equal groups with this difference in the first cell."""
    rows = []
    first_R, concentration_R = balanced(shape)
    load_E = base_load(shape)
    moved_E = load_E + planted * (np.eye(shape.experts)[0] - np.eye(shape.experts)[-1])
    truth = jensen_shannon(moved_E, load_E)
    for number in range(datasets):
        rng = generator(shape.seed, name, str(number))
        counts_RLE = draw(shape, rng, first_R, concentration_R, planted)
        test = tested(shape, counts_RLE, first_R, rng)
        loads_RLE = counts_RLE[:, :1] / counts_RLE[:, :1].sum(2, keepdims=True)
        found = divergence(loads_RLE[first_R], loads_RLE[~first_R], False, rng, 499)
        rows.append(
            (
                test.p_X[0] <= ALPHA,
                test.low_X[0] <= planted <= test.high_X[0],
                found.low_L[0] <= truth <= found.high_L[0],
                detectable(test, ALPHA)[0],
            )
        )
    return Planted(*(float(column) for column in np.mean(rows, axis=0)))


def per_token(shape: Shape) -> float:
    """False positives if each choice of a token counts as a cluster."""
    positives = []
    first_R, concentration_R = balanced(shape)
    for number in range(shape.token_datasets):
        rng = generator(shape.seed, "per token", str(number))
        counts_RLE = draw(shape, rng, first_R, concentration_R)
        choices_R = counts_RLE[:, 0].sum(1)
        experts = [
            np.repeat(np.tile(np.arange(shape.experts), len(first_R)), counts_RLE[:, layer].ravel())
            for layer in range(shape.layers)
        ]
        values_CX = np.concatenate([np.eye(shape.experts)[chosen_C] for chosen_C in experts], axis=1)
        comparison = Comparison(values_CX=values_CX, first_C=np.repeat(first_R, choices_R))
        positives.append(compare(comparison, rng, 199).p_X.min() <= ALPHA)
    return float(np.mean(positives))


def relabelled(shape: Shape) -> float:
    """False positives over random labels of the real recording."""
    counts_RLE = read_recording(shape.recording)
    positives = []
    for number in range(shape.relabellings):
        rng = generator(shape.seed, "relabelled", str(number))
        first_R = rng.permutation(len(counts_RLE)) < len(counts_RLE) // 2
        positives.append(tested(shape, counts_RLE, first_R, rng).p_X.min() <= ALPHA)
    return float(np.mean(positives))


def within_token(shape: Shape) -> float:
    """False positives "beyond token identity", where routes depend on the token id and the record only."""
    positives, vocabulary = [], 60
    language_R = np.where(np.arange(shape.records) % 2 == 0, "ar", "en")
    for number in range(shape.token_datasets):
        rng = generator(shape.seed, "within token", str(number))
        length_R = np.maximum(rng.lognormal(np.log(shape.tokens), 0.5, shape.records).astype(int), 4)
        record_N = np.repeat(np.arange(shape.records), length_R)
        skewed_N = np.minimum(rng.exponential(15, len(record_N)).astype(int), vocabulary - 1)
        id_N = np.where(language_R[record_N] == "ar", skewed_N, vocabulary - 1 - skewed_N)
        shape_LNE = (shape.layers, len(record_N), shape.experts)
        logits_LNE = rng.standard_normal((shape.layers, vocabulary, shape.experts))[:, id_N]
        logits_LNE = logits_LNE + 0.5 * rng.standard_normal((shape.layers, shape.records, shape.experts))[:, record_N]
        experts_LNK = np.argsort(-(logits_LNE + rng.gumbel(size=shape_LNE)), axis=2)[:, :, : shape.top_k]
        routes = TokenRoutes(record_N=record_N, id_N=id_N, experts_LNK=experts_LNK, experts=shape.experts)
        counts_RLE, tokens_R = count_routes(routes, shape.records, shape.layers, shape.experts)
        tables = Tables(counts_RLE=counts_RLE, tokens_R=tokens_R, groups={"language": language_R}, routes=routes)
        found = token_evidence(tables, contrasts(tables, "language")[0], shape.permutations, shape.seed + number)
        if found is not None and found.p_X is not None:
            positives.append(found.p_X.min() <= ALPHA)
    return float(np.mean(positives)) if positives else float("nan")


def asked_twice(shape: Shape, rng: np.random.Generator, planted: float) -> tuple[Tables, float]:
    """Questions in two languages, and the true difference in squared distance of the first layer.

    The loads of a translation are those of the question, moved towards other loads by a share whose square is uniform.
    With one right answer, `planted` of the way to 1 is added to the square in the first layer.
    """
    pairs, alpha_E = shape.records, CONCENTRATION * base_load(shape)
    own_PLE, other_PLE = rng.dirichlet(alpha_E, (2, pairs, shape.layers))
    tokens_P2 = np.maximum(rng.lognormal(np.log(shape.tokens / 2), 0.8, (pairs, 2)).astype(int), 4)
    differ_P = rng.random(pairs) < np.where(tokens_P2.sum(1) < np.median(tokens_P2.sum(1)), 0.7, 0.3)
    square_PL = 0.2 * rng.random((pairs, shape.layers))
    square_PL[differ_P, 0] += planted * (1 - square_PL[differ_P, 0])
    moved_PLE = own_PLE + np.sqrt(square_PL)[..., None] * (other_PLE - own_PLE)
    load_RLE = np.stack([own_PLE, moved_PLE], 1).reshape(2 * pairs, shape.layers, -1)
    tokens_R, right_P = tokens_P2.ravel(), rng.random(pairs) < 0.5
    tables = Tables(
        counts_RLE=rng.multinomial(np.broadcast_to(tokens_R[:, None], load_RLE.shape[:2]), load_RLE),
        tokens_R=tokens_R,
        groups={"language": np.array(["ar", "en"] * pairs)},
        pair_R=np.repeat(np.arange(pairs), 2).astype(str),
        correct_R=np.stack([right_P, right_P ^ differ_P], 1).ravel().astype(float),
    )
    apart = 2 * (1 - float((base_load(shape) ** 2).sum())) / (CONCENTRATION + 1)  # mean squared distance of two draws
    return tables, planted * 0.9 * apart


def answers(shape: Shape) -> dict[str, float]:
    """False positives, coverage and detections of the question of answers."""
    found: dict[str, list[float]] = {"fpr": [], "plain": [], "coverage": [], "detection": []}
    for number in range(shape.datasets):
        rng = generator(shape.seed, "answers", str(number))
        tables, _ = asked_twice(shape, rng, 0.0)
        null = answers_of(tables, shape.permutations, number)
        if null.test is None or null.contrast is None:
            continue
        found["fpr"].append(null.test.p_X.min() <= ALPHA)
        load_RLE = tables.counts_RLE / tables.tokens_R[:, None, None]
        plain_PL = ((load_RLE[0::2] - load_RLE[1::2]) ** 2).sum(-1)
        plain = compare(null.contrast.means(plain_PL, np.ones(len(plain_PL))), rng, shape.permutations)
        found["plain"].append(plain.p_X.min() <= ALPHA)
        tables, truth = asked_twice(shape, rng, 0.8)
        test = answers_of(tables, shape.permutations, number).test
        if test is not None:
            found["coverage"].append(test.low_X[0] <= truth <= test.high_X[0])
            found["detection"].append(test.p_X[0] <= ALPHA)
    return {name: float(np.mean(values)) if values else float("nan") for name, values in found.items()}


def measure(shape: Shape) -> dict[str, Any]:
    """Everything, as in the docstring of this file."""
    start = time.process_time()
    equal = null_sets(shape, "null", balanced(shape), plain=False)
    wild = null_sets(shape, "unequal", unequal(shape), plain=True)
    some, many = max(shape.datasets // 5, 1), max(shape.datasets // 2, 1)
    # loads that differ vary more than equal ones, so the effect is that stated for data which have one
    stated = planted_sets(shape, equal["mde80"], "stated", some).mde80
    effects = [size * stated for size in SIZES]
    powers = [planted_sets(shape, effect, f"planted {place}", some) for place, effect in enumerate(effects)]
    at_mde = planted_sets(shape, stated, "mde80", many)
    joined = answers(shape)
    return {
        "fpr": equal["fpr"],
        "fpr_relabelled": relabelled(shape),
        "fpr_unequal": wild["fpr"],
        "fpr_per_token": per_token(shape),
        "fpr_plain": wild["fpr_plain"],
        "fpr_unequal_permuted": wild["fpr_permuted"],
        "fpr_unequal_resampled": wild["fpr_resampled"],
        "fpr_within_token": within_token(shape),
        "fpr_answers": joined["fpr"],
        "fpr_answers_plain": joined["plain"],
        "coverage_answers": joined["coverage"],
        "detection_answers": joined["detection"],
        "coverage": (equal["coverage"] + wild["coverage"]) / 2,
        "coverage_equal": equal["coverage"],
        "coverage_unequal": wild["coverage"],
        "coverage_planted": at_mde.covered,
        "coverage_jsd": at_mde.covered_jsd,
        "power": [{"effect": e, "detected": power.detected} for e, power in zip(effects, powers, strict=True)],
        "mde80": stated,
        "detection_at_mde80": at_mde.detected,
        "datasets": shape.datasets,
        "shape": {name: getattr(shape, name) for name in ("records", "layers", "experts", "top_k", "tokens")},
        "permutations": shape.permutations,
        "seed": shape.seed,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def read_recording(path: Path) -> np.ndarray:
    """counts [R, L, E] of a file with the columns record, language, layer, counts.

    Raises:
      BimedixError: the file is not one.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [(row["record"], int(row["layer"]), row["counts"].split()) for row in csv.DictReader(file)]
        records, layers = (list(dict.fromkeys(row[place] for row in rows)) for place in (0, 1))
        counts = np.array([row[2] for row in rows], np.int64)
        return counts.reshape(len(records), len(layers), -1)
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise BimedixError(
            f"{path} is not a recording ({error}); it needs the columns record, language, layer, counts, with the "
            "layers of each record in order. `--record MODEL --recording FILE` writes one."
        ) from error


def record(model_folder: str, path: Path, limit: int) -> None:
    """Records the routes of the bundled sample, every fourth layer, and writes them to `path`."""
    import bimedix_jax as bmx
    from bimedix_jax.data.encoding import encode_chat
    from bimedix_jax.data.records import sample
    from bimedix_jax.data.tokenizer import load_tokenizer

    model, tokenizer = bmx.load(model_folder), load_tokenizer(model_folder)
    length = 256
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["record", "language", "layer", "counts"])
        for item in list(sample("train"))[:limit]:
            ids = encode_chat(tokenizer, item.conversations)[0][:length]
            tokens_BT, segments_BT = np.zeros((2, 1, length), np.int32)
            tokens_BT[0, : len(ids)], segments_BT[0, : len(ids)] = ids, 1
            experts_LTK = np.asarray(model(tokens_BT, segments_BT, record="choices").routing.experts_LBTK)[:, 0]
            for layer in range(0, len(experts_LTK), 4):
                counts_E = np.bincount(
                    experts_LTK[layer, : len(ids)].ravel(), minlength=model.config.router.num_experts
                )
                writer.writerow([item.id, item.language, layer, " ".join(map(str, counts_E))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--datasets",
        type=positive,
        default=1000,
        help="null data sets; half as many with the stated effect, a fifth with each other",
    )
    parser.add_argument("--records", type=positive, default=60)
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--experts", type=positive, default=8)
    parser.add_argument("--top-k", type=positive, default=2)
    parser.add_argument("--tokens", type=positive, default=60, help="median tokens of a record")
    parser.add_argument("--permutations", type=natural, default=PERMUTATIONS)
    parser.add_argument("--relabellings", type=natural, default=200)
    parser.add_argument("--token-datasets", type=natural, default=100, help="of both measurements with single tokens")
    parser.add_argument("--recording", type=Path, default=RECORDING)
    parser.add_argument("--record", metavar="MODEL", help="record the sample with it into --recording, and stop")
    parser.add_argument("--limit", type=positive, default=120, help="records of --record")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--json", action="store_true")
    shape = parser.parse_args(namespace=Shape())
    if shape.top_k > shape.experts or shape.experts < 4 or shape.records < 20 or shape.permutations < 100:
        parser.error("give --experts at least 4, --top-k at most as many, --records at least 20, --permutations 100")
    if shape.record is not None:
        record(shape.record, shape.recording, shape.limit)
        return
    found = measure(shape)
    if shape.json:
        json.dump(found, sys.stdout, indent=1)
        print()
        return
    for name, value in found.items():
        print(f"{name:20} {value:.4g}" if isinstance(value, float) else f"{name:20} {value}")


if __name__ == "__main__":
    run_script(main)
