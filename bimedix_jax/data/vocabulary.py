"""Checks that a tokenizer fits a model: a token id without a row in the embedding is an error.

JAX clamps an index that is out of range without a warning: another token's row is used, and a loss becomes NaN.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bimedix_jax.data.run_folder import base_of, is_run
from bimedix_jax.errors import BimedixError
from bimedix_jax.files import peek_json

if TYPE_CHECKING:
    from bimedix_jax.data.tokenizer import Tokenizer


def vocab_size_of(folder: str | Path) -> int | None:
    """Rows of the embedding of the model in `folder`, from its configuration alone.

    A training run has its model's or its base's. None if there is none or it is wrong; the error is raised when the
    model is loaded.
    """
    return _config_number(folder, "vocab_size")


def context_of(folder: str | Path) -> int | None:
    """Longest sequence of the model in `folder`; None as in `vocab_size_of`."""
    return _config_number(folder, "max_position_embeddings")


def _config_number(folder: str | Path, field: str) -> int | None:
    if is_run(folder):
        base, trained = base_of(folder), Path(folder, "model")
        if trained.is_dir():
            return _config_number(trained, field)
        if isinstance(base, str):
            return _config_number(base, field)
        value = base and base.get(field)
        return value if type(value) is int else None
    for name, parents in (("bimedix.json", ("config",)), ("config.json", ())):  # ours, then Hugging Face's
        value: Any = peek_json(Path(folder, name))
        if value:
            for key in (*parents, field):
                value = value.get(key) if isinstance(value, dict) else None
            return value if type(value) is int else None
    return None


def tokenizer_of_model(
    folder: Path, model: str | Path, tokenizer: str | Path | None = None, template: str | None = None
) -> "Tokenizer":
    """The tokenizer in a model's folder or another one, checked before the weights are loaded.

    Args:
      model: name of the model in messages. tokenizer: its folder, by default the model's.
      template: as `load_tokenizer`.

    Raises:
      BimedixError: there is none, its chat template is not a known one, or it has ids that the model lacks.
    """
    from bimedix_jax.data.tokenizer import load_tokenizer

    found = load_tokenizer(tokenizer or folder, template)
    _ = found.template
    require_fit(found, vocab_size_of(folder), model)
    return found


def require_fit(tokenizer: "Tokenizer", vocab_size: int | None, model: str | Path) -> None:
    """Checks that every id of the tokenizer has a row in the model's embedding.

    A smaller tokenizer fits, since many embeddings are padded.

    Args:
      vocab_size: rows of the embedding; None skips the check.
      model: name of the model in the message.

    Raises:
      BimedixError: an id is not below `vocab_size`; added tokens and stop tokens count too.
    """
    # stop tokens of generation_config.json need not be in the tokenizer's vocabulary
    highest = max(tokenizer.vocab_size - 1, *tokenizer.stop_ids, -1)
    if vocab_size is None or highest < vocab_size:
        return
    ids = {role: tokenizer.token_id(text) for role, text in tokenizer.special.items()}
    lost = [role for role, number in ids.items() if number is not None and number >= vocab_size]
    lost += [f"stop token {number}" for number in tokenizer.stop_ids if number >= vocab_size and "eos" not in lost]
    raise BimedixError(
        f"The tokenizer in {tokenizer.folder} has token ids up to {highest}"
        + (f" ({', '.join(lost)} included)" if lost else "")
        + f", but {model} has {vocab_size} embedding rows; use tokenizer and weights of the same model."
    )


def outside(rows: Iterable[Sequence[int] | np.ndarray], vocab_size: int) -> int | None:
    """The first token id of `rows` that a model of `vocab_size` lacks; None if it has all."""
    for row in rows:
        ids = np.asarray(row)
        wrong = ids[(ids < 0) | (ids >= vocab_size)]
        if wrong.size:
            return int(wrong.flat[0])
    return None


def require_ids(rows: Iterable[Sequence[int] | np.ndarray], vocab_size: int) -> None:
    """Raises BimedixError for a token id that a model of `vocab_size` lacks."""
    wrong = outside(rows, vocab_size)
    if wrong is not None:
        raise BimedixError(
            f"token id {wrong} is outside the vocabulary of {vocab_size}; use the tokenizer that this model was "
            "trained with"
        )
