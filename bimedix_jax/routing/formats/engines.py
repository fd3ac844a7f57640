"""Routes that engines report: OLMoE's analysis, responses of vLLM, envelopes of NeMo RL, traces of Megatron."""

import base64
import binascii
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bimedix_jax import files
from bimedix_jax.data.roles import FIRST, ROLES
from bimedix_jax.errors import BimedixError
from bimedix_jax.routing.formats import checks
from bimedix_jax.routing.formats.jsonl import id_of, lines_of
from bimedix_jax.routing.parts import UNKNOWN_ID, Routes

log = logging.getLogger(__name__)

Read = Iterator[tuple[str, Routes, Sequence[object] | None]]

ENVELOPE = re.compile(r"nrlre1:(?P<dtype>u?int(?:8|16|32)):(?P<shape>\d+x\d+x\d+):(?P<data>[A-Za-z0-9+/=\s]*)")


def read_olmoe(path: Path) -> Read:
    """Lines of OLMoE's run_moe_analysis.py: input_ids [T] and exp_ids [T][k][L]."""
    for number, (where, line) in enumerate(lines_of(path)):
        ids_N = checks.token_ids(_key(line, "input_ids", where), where)
        experts_NKL = checks.integers(_key(line, "exp_ids", where), "exp_ids", where)
        checks.require_shape(experts_NKL, (len(ids_N), None, None), "exp_ids [T][k][L]", where)
        routes = Routes(
            id=f"{path.name}:{number}",
            ids_N=ids_N,
            columns={"experts": experts_NKL.swapaxes(1, 2)},
            about={"source": path.name},
        )
        yield where, routes, None


def read_vllm(path: Path) -> Read:
    """Responses of vLLM, one a line: prompt_token_ids, and choices with token_ids and routed_experts [T][L][K].

    The last token was sampled but never run, so it has no routes, and is left out.
    """
    for number, (where, line) in enumerate(lines_of(path)):
        choices = line.get("choices", [line])
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
            raise BimedixError(f"{where} has no choices; give responses of vLLM")
        for index, choice in enumerate(choices):
            prompt = choice.get("prompt_token_ids", line.get("prompt_token_ids"))
            if prompt is None:
                raise BimedixError(f"{where} lacks prompt_token_ids; ask vLLM for them with return_token_ids")
            name = id_of(line.get("id", f"{path.name}:{number}"), where) + (f"#{index}" if len(choices) > 1 else "")
            experts_NLK = _decoded(_key(choice, "routed_experts", where), where)
            yield where, _of_response(name, path, prompt, choice.get("token_ids") or [], experts_NLK, where), None


def read_nemo(path: Path) -> Read:
    """Envelopes of NeMo RL, one a line: alone, or as routed_experts of an object with the token ids of a sample."""
    number = 0
    for place, raw in enumerate(_text_lines(path), start=1):
        where, text = f"{path}:{place}", raw.strip().strip('"')
        if not text.startswith("nrlre1:"):
            break
        experts_NLK = _decoded(text, where)
        ids_N = np.full(len(experts_NLK), UNKNOWN_ID)
        yield where, _without_gaps(f"{path.name}:{number}", path, ids_N, experts_NLK, None, where), None
        number += 1
    if number:
        return
    for where, line in lines_of(path):
        name, experts_NLK = (
            id_of(line.get("id", f"{path.name}:{number}"), where),
            _decoded(_key(line, "routed_experts", where), where),
        )
        if "input_ids" in line:
            prompt, answer = line["input_ids"], []
        else:
            prompt, answer = _key(line, "prompt_token_ids", where), line.get("generation_token_ids") or []
        yield where, _of_response(name, path, prompt, answer, experts_NLK, where, roles="input_ids" not in line), None
        number += 1


def _text_lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise BimedixError(f"there is no file {path}; correct the path")
    for line in files.text_lines(path):
        if line.strip():
            yield files.decode(line, str(path))


def _key(line: dict[str, Any], key: str, where: str) -> Any:
    if key not in line:
        raise BimedixError(f"{where} lacks the key {key}; docs/formats.md describes a line")
    return line[key]


def _decoded(value: object, where: str) -> np.ndarray:
    """routed_experts [T, L, K] from nested lists or an envelope."""
    if not isinstance(value, str):
        found = checks.integers(value, "routed_experts", where)
        checks.require_shape(found, (None, None, None), "routed_experts [T][L][K]", where)
        return found
    match = ENVELOPE.fullmatch(value)
    if match is None:
        raise BimedixError(f"{where} has routed_experts that are no nrlre1:<dtype>:<S>x<L>x<K>:<base64>; correct them")
    shape = tuple(int(size) for size in match["shape"].split("x"))
    try:
        data = base64.b64decode(match["data"], validate=True)
    except (binascii.Error, ValueError):
        raise BimedixError(f"{where} has routed_experts that are not base64; they were cut off or changed") from None
    dtype = np.dtype(match["dtype"]).newbyteorder("<")
    if len(data) != np.prod(shape, dtype=np.int64) * dtype.itemsize:
        raise BimedixError(
            f"{where} has {len(data)} bytes of routed_experts, but {match['shape']} of {match['dtype']} needs "
            f"{int(np.prod(shape, dtype=np.int64)) * dtype.itemsize}; they were cut off or changed"
        )
    return np.frombuffer(data, dtype).reshape(shape).astype(np.int64)


def _of_response(
    name: str, path: Path, prompt: object, answer: object, experts_NLK: np.ndarray, where: str, roles: bool = True
) -> Routes:
    prompt_N, answer_N = checks.token_ids(prompt, where), checks.token_ids(answer, where)
    ids_N = np.concatenate([prompt_N, answer_N])
    if len(experts_NLK) not in (len(ids_N), len(ids_N) - 1):
        raise BimedixError(
            f"{where} has another number of tokens ({len(ids_N)}) than routes ({len(experts_NLK)}); routes of some of "
            "the tokens, or of several turns, cannot be joined to them"
        )
    ids_N = ids_N[: len(experts_NLK)]
    roles_N = None
    if roles:
        roles_N = np.full(len(ids_N), ROLES.index("answer"), np.uint8)
        roles_N[: len(prompt_N)] = ROLES.index("prompt")
        roles_N[:FIRST] = ROLES.index("first")
    return _without_gaps(name, path, ids_N, experts_NLK, roles_N, where)


def _without_gaps(
    name: str, path: Path, ids_N: np.ndarray, experts_NLK: np.ndarray, roles_N: np.ndarray | None, where: str
) -> Routes:
    """The record without tokens that have -1 everywhere, which mark tokens that were not run."""
    run_N = (experts_NLK != -1).any(axis=(1, 2))
    if not run_N.all():
        log.warning("%s: %s of %s tokens have no routes (-1) and are left out", where, (~run_N).sum(), len(run_N))
    return Routes(
        id=name,
        ids_N=ids_N[run_N],
        columns={"experts": experts_NLK[run_N]},
        about={"source": path.name},
        roles_N=None if roles_N is None else roles_N[run_N],
    )


def read_megatron(path: Path) -> Read:
    """The trace of a rank that Megatron-LM writes with --moe-routing-trace-path: a line a step, block and layer.

    A step is a record. Its token ids are not in the trace. Layers of multi-token prediction are left out.
    """
    step: object = None
    rows: dict[int, tuple[str, np.ndarray, dict[str, Any]]] = {}
    seen: set[object] = set()
    skipped = 0
    for where, line in lines_of(path):
        if line.get("block") not in ("decoder", "mtp"):
            raise BimedixError(
                f"{where} binds its layer by position instead of path: it does not say in which block (decoder or mtp) "
                "the layer is; record it with a version of Megatron-LM that writes block"
            )
        if line["block"] == "mtp" or line.get("stage", "pre_dispatch") != "pre_dispatch":
            skipped += 1
            continue
        if line.get("step") != step and rows:
            yield _of_step(path, step, rows)
            rows = {}
        step = _key(line, "step", where)
        if not isinstance(step, int) or isinstance(step, bool):
            raise BimedixError(f"{where} has the step {step!r}; give its number")
        if not rows:
            if step in seen:
                raise BimedixError(f"{where} is a duplicate: step {step} is there twice; import each rank's file alone")
            seen.add(step)
        layer = _key(line, "layer", where)
        if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
            raise BimedixError(f"{where} has the layer {layer!r}; give its number in the decoder")
        if layer in rows:
            raise BimedixError(f"{where} is a duplicate: layer {layer} of step {step} is there twice; remove one")
        found = checks.integers(_key(line, "top_indices", where), "top_indices", where)
        checks.require_shape(found, (line.get("num_tokens"), line.get("topk")), "top_indices [T][k]", where)
        rows[layer] = (where, found, line)
    if skipped:
        log.warning("%s: %s lines of other blocks or stages than the decoder's routers are left out", path, skipped)
    if rows:
        yield _of_step(path, step, rows)


def _of_step(
    path: Path, step: object, rows: dict[int, tuple[str, np.ndarray, dict[str, Any]]]
) -> tuple[str, Routes, Sequence[object]]:
    layers = sorted(rows)
    where, first, line = rows[layers[0]]
    for layer in layers:
        checks.require_shape(rows[layer][1], first.shape, f"top_indices of layer {layer}", rows[layer][0])
    experts_NLK = np.stack([rows[layer][1] for layer in layers], axis=1)
    routes = Routes(
        id=f"{path.name}:{step}",
        ids_N=np.full(len(experts_NLK), UNKNOWN_ID),
        columns={"experts": experts_NLK},
        about={"source": path.name},
        labels={"step": str(step), "rank": str(line.get("rank", ""))},
    )
    return where, routes, [f"decoder.layers.{layer}.mlp.router" for layer in layers]
