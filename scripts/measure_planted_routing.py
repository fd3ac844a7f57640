"""Models with a planted dependence of routes on language, through record and report: each must be found for what it is.

    python scripts/measure_planted_routing.py --json        # a minute on one core
    python scripts/measure_planted_routing.py --records 120 --seed 3

The models are built by hand, see `PLANTED`. Their data are records of two languages that have letters of their own and
share the digits. Every model is recorded with the divergence gate and 100 random routers, and compared with a recording
of a base model, whose router is random, so that every level but "functional" is tested.

`estimate`, `low` and `high` are the report's difference in load of expert 0 in layer 0, Arabic minus English in the
order of the report's groups; `truth` is that of many more records of the same kind. The exit code is 1 if a model is
found at another level than was planted.
"""

import argparse
import dataclasses
import json
import string
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from bimedix_jax.data.records import Language, Record, Turn
from bimedix_jax.data.tokenizer import Tokenizer, byte_tokenizer
from bimedix_jax.errors import natural, positive, run_script
from bimedix_jax.models.config import MixtralConfig, RouterConfig
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.routing.contrasts import contrasts
from bimedix_jax.routing.recorded import tables_of
from bimedix_jax.routing.recorded_data import Data
from bimedix_jax.routing.recorder import RecordSettings, record_routes
from bimedix_jax.routing.recording import Recording
from bimedix_jax.routing.report.writing import ReportOptions, write_report

CONFIG = MixtralConfig(
    vocab_size=304,
    hidden_size=16,
    intermediate_size=4,
    num_layers=2,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
    router=RouterConfig(num_experts=4, top_k=1),
    rope_theta=10_000.0,
    rms_norm_eps=1e-5,
    sliding_window=None,
    tie_embeddings=False,
    max_position_embeddings=512,
)
CONSTANT, LETTER, DIGIT, OWN, CONTEXT, HIGH, NEXT_LETTER, NEXT_DIGIT, FREE = range(9)
"""Dimensions of the hidden states: 1; letters; digits; +1 and -1 for letters of a language; the same as the attention
writes it into every token; +1 and -1 for digits from 5 on and below; what the next token is; and from FREE on, random
numbers for each token id."""
ALPHABETS: dict[Language, str] = {"ar": string.ascii_uppercase[13:], "en": string.ascii_uppercase[:13]}
"""Capital letters, because the template has small ones."""
ALTERNATES = 0.85
"""Probability that a letter follows a digit and a digit a letter."""
TRUTH = 10
"""Times as many records for the truth."""


@dataclasses.dataclass(frozen=True)
class Planted:
    """A model: what its router reads, whether attention writes the language, whether experts differ, and the level."""

    router: str
    attention: bool
    equal_experts: bool
    level: str


PLANTED = {
    "token identity only": Planted("token", attention=False, equal_experts=False, level="association"),
    "language written into shared tokens by attention": Planted("language", True, False, "learned"),
    "language routes over equal experts": Planted("language", True, True, "geometry"),
    "a random router": Planted("random", True, False, "token"),
}
BASE = Planted("random", attention=True, equal_experts=False, level="")


def built(planted: Planted, seed: int) -> Mixtral:
    """The model; `seed` is that of random routers."""
    model = Mixtral(CONFIG, "float32")
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        fill = 1.0 if path[-1] == "scale" else 0.0
        variable.set_value(jnp.asarray(np.full(variable.get_value().shape, fill, np.float32)))
    width, experts = CONFIG.hidden_size, CONFIG.router.num_experts
    table_VD = embeddings()
    model.embed.table.set_value(jnp.asarray(table_VD))
    if planted.attention:
        v_DD, o_DD = np.zeros((2, width, width), np.float32)  # without queries, attention is the mean
        v_DD[OWN, 0], o_DD[0, CONTEXT] = 1.0, 1.5
        set_layers(model.layers.attention.v.w, v_DD)
        set_layers(model.layers.attention.o.w, o_DD)
    router_DE = np.zeros((width, experts), np.float32)
    letter_E, first_E = np.array([1, -1, 1, -1]), np.array([1, 1, -1, -1])
    if planted.router == "language":  # Arabic letters, Arabic digits, English letters, English digits
        router_DE[LETTER], router_DE[DIGIT], router_DE[CONTEXT] = 2 * letter_E, -2 * letter_E, 4 * first_E
    elif planted.router == "token":  # Arabic letters, low digits, English letters, high digits
        router_DE[LETTER], router_DE[DIGIT] = 2 * letter_E, -2 * letter_E
        router_DE[OWN], router_DE[HIGH] = 4 * first_E * (letter_E > 0), -4 * first_E * (letter_E < 0)
    else:
        router_DE = np.random.default_rng(seed).normal(size=router_DE.shape).astype(np.float32)
    set_layers(model.layers.moe.router.w, router_DE)
    w1_EDF = np.zeros((experts, width, CONFIG.intermediate_size), np.float32)
    w1_EDF[:, CONSTANT, 0] = 1.0
    w2_EFD = np.zeros((experts, CONFIG.intermediate_size, width), np.float32)
    sign_E = np.ones(experts) if planted.equal_experts else letter_E  # after a letter comes a digit
    w2_EFD[:, 0, NEXT_DIGIT], w2_EFD[:, 0, NEXT_LETTER] = sign_E, -sign_E
    for linear, value in ((model.layers.moe.w1, w1_EDF), (model.layers.moe.w3, w1_EDF), (model.layers.moe.w2, w2_EFD)):
        set_layers(linear.w, value)
    head_DV = np.zeros((width, CONFIG.vocab_size), np.float32)
    head_DV[NEXT_LETTER], head_DV[NEXT_DIGIT] = table_VD[:, LETTER], table_VD[:, DIGIT]
    assert model.lm_head is not None
    model.lm_head.w.set_value(jnp.asarray(head_DV))
    return model


def set_layers(variable: Any, value: np.ndarray) -> None:
    """The same weights in every layer."""
    variable.set_value(jnp.asarray(np.broadcast_to(value, (CONFIG.num_layers, *value.shape)), jnp.float32))


def embeddings() -> np.ndarray:
    """[V, D]: see the names of the dimensions."""
    table_VD = np.zeros((CONFIG.vocab_size, CONFIG.hidden_size), np.float32)
    table_VD[:, CONSTANT] = 1.0
    table_VD[:, FREE:] = 0.7 * np.random.default_rng(0).normal(size=table_VD[:, FREE:].shape)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = byte_tokenizer(folder)
    for language, alphabet in ALPHABETS.items():
        ids = tokenizer.encode(alphabet)
        table_VD[ids, LETTER], table_VD[ids, OWN] = 1.0, 1.0 if language == "ar" else -1.0
    for digit in string.digits:
        [name] = tokenizer.encode(digit)
        table_VD[name, DIGIT], table_VD[name, HIGH] = 1.0, 1.0 if digit >= "5" else -1.0
    return table_VD


def records(count: int, rng: np.random.Generator) -> list[Record]:
    """Records of both languages by turns. Arabic ones prefer high digits, and each has a preference of its own."""
    found = []
    for number in range(count):
        language: Language = ("ar", "en")[number % 2]
        slope = (1 if language == "ar" else -1) * 0.1 + 0.1 * rng.normal()
        weight = np.exp(slope * np.arange(10))
        turns = [text(language, weight / weight.sum(), int(rng.integers(30, 80)), rng) for _ in range(2)]
        record = Record(
            id=f"{language}{number}",
            language=language,
            kind="qa",
            source="planted",
            licence="none",
            conversations=(Turn(speaker="human", value=turns[0]), Turn(speaker="gpt", value=turns[1])),
        )
        found.append(record)
    return found


def text(language: Language, digit_share: np.ndarray, length: int, rng: np.random.Generator) -> str:
    """Letters and digits, which mostly alternate."""
    changes = rng.random(length) < ALTERNATES
    is_letter = (np.cumsum(changes) + rng.integers(2)) % 2 == 0
    letters = rng.choice(list(ALPHABETS[language]), length)
    digits = rng.choice(list(string.digits), length, p=digit_share)
    return "".join(np.where(is_letter, letters, digits).tolist())


def recorded(
    model: Mixtral, found: list[Record], tokenizer: Tokenizer, out: Path, settings: RecordSettings
) -> Recording:
    path = out.with_suffix(".jsonl")
    path.write_text("".join(record.to_json() + "\n" for record in found), "utf-8")
    record_routes(model, Data.open(str(path), tokenizer, None), out, settings)
    return Recording.open(out)


def difference(recording: Recording) -> float:
    """The difference in load of expert 0 in layer 0."""
    tables = tables_of(recording)
    [contrast] = contrasts(tables, "language")
    lead, trail = contrast.loads(tables.counts_RLE)
    return float(lead[:, 0, 0].mean() - trail[:, 0, 0].mean())


def measured(count: int, routers: int, seed: int, truth: int = TRUTH) -> list[dict[str, Any]]:
    """A row for each planted model; the truth is that of `truth` times as many records."""
    rows, rng = [], np.random.default_rng(seed)
    some, many = records(count, rng), records(truth * count, rng)
    full, plain = RecordSettings(exact=True, gate=True, random_routers=routers, seed=seed), RecordSettings(exact=True)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        tokenizer = byte_tokenizer(place / "tokenizer")
        recorded(built(BASE, seed), some, tokenizer, place / "base", plain)
        for number, (name, planted) in enumerate(PLANTED.items()):
            model = built(planted, seed + 1)
            recording = recorded(model, some, tokenizer, place / f"R{number}", full)
            known = difference(recorded(model, many, tokenizer, place / f"T{number}", plain))
            options = ReportOptions(baseline=place / "base", seed=seed)
            claims = write_report(recording, place / f"report{number}", options)
            [question] = claims["questions"]
            cell = question["cells"][0]
            rows.append(
                {
                    "planted": name,
                    "level_expected": planted.level,
                    "level_found": question["level"],
                    **{key: cell[key] for key in ("estimate", "low", "high")},
                    "truth": known,
                    "gate": claims["gate"],
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=positive, default=80, help="records of both languages together")
    parser.add_argument("--random-routers", type=natural, default=100)
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of lines")
    options = parser.parse_args()
    if options.records < 40:
        parser.error("give --records at least 40")
    rows = measured(options.records, options.random_routers, options.seed)
    if options.json:
        print(json.dumps({"records": options.records, "seed": options.seed, "rows": rows}, indent=2))
    for row in [] if options.json else rows:
        print(
            f"{row['planted']}: expected {row['level_expected']}, found {row['level_found']}; "
            f"{row['estimate']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}), truth {row['truth']:+.3f}"
        )
    if any(row["level_expected"] != row["level_found"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
