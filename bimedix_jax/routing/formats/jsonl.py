"""Routes as JSON lines, a record a line: what `bimedix routes import --format jsonl` reads and `export` writes."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from bimedix_jax import files
from bimedix_jax.data.roles import ROLES
from bimedix_jax.errors import BimedixError, listed
from bimedix_jax.routing.formats import checks
from bimedix_jax.routing.parts import TEXTS, UNKNOWN_ROLE, Routes, token_hash

KEYS = ("id", *TEXTS, "input_ids", "experts", "weights", "logits", "nll", "shuffled_nll", "roles", "labels")
CORRECT = "correct"
"""The label of a record that says whether the model answered its question right: 0 or 1."""
FURTHER = ("token_hash", "layers")


def lines_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it is, the JSON object) of each line of a file that is not blank.

    Raises:
      BimedixError: the file cannot be read, or a line is no JSON object or has a key twice.
    """
    if not path.is_file():
        raise BimedixError(f"there is no file {path}; correct the path")
    for number, line in enumerate(files.text_lines(path), start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                value = json.loads(line, object_pairs_hook=files.unique_pairs, parse_constant=_no_number)
            except (ValueError, RecursionError) as error:
                raise BimedixError(f"{where} is not valid JSON ({error}); correct the line or remove it") from None
            if not isinstance(value, dict):
                raise BimedixError(f"{where} is not a JSON object; write a record a line")
            yield where, value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON: write null where there is none")


def read(path: Path) -> Iterator[tuple[str, Routes, Sequence[object] | None]]:
    """(where it is, the record, paths of its layers if it has them) of each line; errors as in docs/formats.md."""
    for where, line in lines_of(path):
        unknown = sorted(set(line) - {*KEYS, *FURTHER})
        if unknown:
            raise BimedixError(f"{where} has {len(unknown)} unknown key(s): {listed(unknown)}; docs/formats.md has all")
        for key in ("id", "input_ids", "experts"):
            if key not in line:
                raise BimedixError(f"{where} lacks the key {key}; docs/formats.md describes a line")
        yield where, _routes(line, where), line.get("layers")


def _routes(line: dict[str, Any], where: str) -> Routes:
    ids_N = checks.token_ids(line["input_ids"], where)
    experts_LNK = checks.integers(line["experts"], "experts", where)
    checks.require_shape(experts_LNK, (None, len(ids_N), None), "experts [L][T][k]", where)
    given = line.get("token_hash")
    if given is not None and given != token_hash(ids_N):
        raise another_hash(where, "the line")
    layers, _, top_k = experts_LNK.shape
    columns, experts = {"experts": experts_LNK.swapaxes(0, 1)}, None
    if line.get("weights") is not None:
        weights_LNK = checks.reals(line["weights"], "weights", where)
        checks.require_shape(weights_LNK, experts_LNK.shape, "weights [L][T][k]", where)
        columns["weights"] = weights_LNK.swapaxes(0, 1)
    if line.get("logits") is not None:
        logits_LNE = checks.reals(line["logits"], "logits", where)
        checks.require_shape(logits_LNE, (layers, len(ids_N), None), "logits [L][T][E]", where)
        if not np.isfinite(logits_LNE).all():
            raise BimedixError(f"{where} has logits that are not finite numbers; correct them")
        experts = logits_LNE.shape[2]
        if experts_LNK.max(initial=-1) >= experts:
            raise BimedixError(
                f"{where} has an expert out of range: {experts_LNK.max()}, but its logits are of {experts} experts; "
                "correct the line"
            )
        if top_k and experts_LNK.min(initial=0) >= 0:
            margin_LN, entropy_LN = of_logits(logits_LNE, experts_LNK)
            margin_LN = _agreeing(margin_LN, logits_LNE, experts_LNK, where)
            columns |= {"margin": margin_LN.T, "entropy": entropy_LN.T}
    for name in ("nll", "shuffled_nll"):
        if line.get(name) is not None:
            columns[name] = _by_token(line[name], len(ids_N), name, where)
    return Routes(
        id=id_of(line["id"], where),
        ids_N=ids_N,
        columns=columns,
        about={name: _text(line.get(name), name, where) for name in TEXTS},
        labels=_labels(line.get("labels"), where),
        roles_N=_roles(line.get("roles"), len(ids_N), where),
        experts=experts,
    )


def another_hash(where: str, what: str) -> BimedixError:
    """The error for tokens that are not those of `what`."""
    return BimedixError(
        f"{where} has another token hash than {what} says: the routes belong to other tokens, so use those that the "
        "model was given"
    )


def of_logits(logits_LNE: np.ndarray, experts_LNK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(margin, entropy) [L, N]: lowest chosen minus highest refused logit, and entropy of the softmax in nats."""
    chosen_LNE = np.zeros(logits_LNE.shape, bool)
    np.put_along_axis(chosen_LNE, experts_LNK, True, axis=-1)
    lowest_LN = np.where(chosen_LNE, logits_LNE, np.inf).min(-1)
    refused_LN = np.where(chosen_LNE, -np.inf, logits_LNE).max(-1)
    margin_LN = np.where(np.isfinite(refused_LN), lowest_LN - refused_LN, 0.0)
    shifted_LNE = logits_LNE - logits_LNE.max(-1, keepdims=True)
    log_mass_LNE = shifted_LNE - np.log(np.exp(shifted_LNE).sum(-1, keepdims=True))
    return margin_LN, -(np.exp(log_mass_LNE) * log_mass_LNE).sum(-1)


def _agreeing(margin_LN: np.ndarray, logits_LNE: np.ndarray, experts_LNK: np.ndarray, where: str) -> np.ndarray:
    """The margins, at least 0: a difference within the rounding of bfloat16 is a tie.

    Raises:
      BimedixError: an expert that was not chosen has a higher logit than one that was.
    """
    lowest_LN = np.take_along_axis(logits_LNE, experts_LNK, axis=-1).min(-1)
    tie_LN = checks.ROUNDING * np.maximum(1, np.abs(lowest_LN))
    wrong_LN = margin_LN < -tie_LN
    if wrong_LN.any():
        layer, token = np.argwhere(wrong_LN)[0]
        best = np.argsort(-logits_LNE[layer, token], kind="stable")[: experts_LNK.shape[2]].tolist()
        raise BimedixError(
            f"{where} has logits that contradict the experts: token {token} of layer {layer} has the experts "
            f"{experts_LNK[layer, token].tolist()}, but the highest logits are those of {best}; give the scores by "
            "which the router chose, with its bias if it has one, or leave the logits out"
        )
    return np.maximum(margin_LN, 0)


def _by_token(value: object, tokens: int, what: str, where: str) -> np.ndarray:
    found = checks.reals(value, what, where)
    if found.ndim == 0:
        return np.full(tokens, found)  # the mean of the record
    checks.require_shape(found, (tokens,), f"{what} [T]", where)
    return found


def id_of(value: object, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise BimedixError(f"{where} has the id {value!r}; give a text or a number")
    return str(value)


def _text(value: object, key: str, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise BimedixError(f"{where} has the {key} {value!r}; give a text")


def _labels(value: object, where: str) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BimedixError(f"{where} has labels that are not a JSON object; write {{NAME: TEXT}}")
    taken = sorted(set(value) & set(TEXTS))
    if taken:
        raise BimedixError(f"{where} has the label {taken[0]}, which is a key of its own; write it there")
    answer = value.get(CORRECT)
    if answer is not None and (isinstance(answer, bool) or answer not in (0, 1, "0", "1")):
        raise BimedixError(
            f"{where} has the label correct {answer!r}; give 1 if the model answered the question right, else 0"
        )
    return {name: text for name, item in value.items() if (text := _text(item, f"label {name}", where)) is not None}


def _roles(value: object, tokens: int, where: str) -> np.ndarray | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != tokens or any(x is not None and x not in ROLES for x in value):
        raise BimedixError(f"{where} has wrong roles; give each token one of {', '.join(ROLES)}, or null")
    return np.array([UNKNOWN_ROLE if x is None else ROLES.index(x) for x in value], np.uint8)


def write_line(file: IO[str], values: Mapping[str, Any]) -> None:
    """Writes a record without the keys whose value is None."""
    kept = {name: value for name, value in values.items() if value is not None}
    file.write(json.dumps(kept, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n")
