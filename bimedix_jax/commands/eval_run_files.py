"""The files that `bimedix eval run` reads and writes: results, and predictions beside them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bimedix_jax.errors import BimedixError

if TYPE_CHECKING:
    from bimedix_jax.evals.multiple_choice import Prediction


def check_out(out: Path, overwrite: bool) -> None:
    """Raises BimedixError if --out may not be written. What an unfinished evaluation wrote may always be replaced."""
    from bimedix_jax.commands.eval_run_open import answers_path, is_answers
    from bimedix_jax.evals.journal import is_unfinished
    from bimedix_jax.files import check_file

    overwrite = overwrite or is_unfinished(out)
    check_file(out, overwrite, is_result)
    check_file(predictions_path(out), overwrite, is_predictions)
    check_file(answers_path(out), overwrite, is_answers)


def read_result(path: Path) -> dict[str, Any]:
    """The result that an earlier run wrote. Raises BimedixError if the file is not one."""
    from bimedix_jax.files import read_json

    value = read_json(path, dict[str, Any], "name a file that --out wrote")
    if not {"heldout", "choice", "tasks", "open"} & set(value):
        raise BimedixError(f"{path} is not a result of `bimedix eval run`; name a file that --out wrote")
    return value


def is_result(path: Path) -> bool:
    """Whether a file has the keys of a result."""
    from bimedix_jax.files import peek_json

    found = set(peek_json(path))
    return {"model", "template"} <= found and bool({"heldout", "choice", "tasks", "open"} & found)


def is_predictions(path: Path) -> bool:
    """Whether every line of a file is a prediction, as `write_predictions` writes it."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError):
        return False
    return all(isinstance(row, dict) and {"set", "id"} <= set(row) for row in rows)


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes the result as JSON, and creates the folder if needed."""
    from bimedix_jax.files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, ensure_ascii=False, indent=2, default=str) + "\n")


def predictions_path(out: Path) -> Path:
    """Path of the predictions that belong to the result `out`."""
    return out.with_name(f"{out.name.removesuffix('.json')}.predictions.jsonl")


def write_predictions(out: Path, predictions: "dict[str, list[Prediction]]") -> dict[str, Any]:
    """Writes one line of JSON for each scored question; its `set` is the name of the task or the value of --heldout.

    Returns: name of the file in the result's folder, and its number of lines.
    """
    from bimedix_jax.files import write_text

    rows = [{"set": name, **row.to_dict()} for name, found in predictions.items() for row in found]
    path = predictions_path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
    return {"file": path.name, "lines": len(rows)}
