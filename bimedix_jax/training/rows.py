"""Batches of a run by optimiser step: the same step gives the same rows, so a resumed run must know its step only."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment

NumpyBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a run learns from.

    Attributes:
      batch: (step from 0, positions of rows in the batch of a whole optimiser step) -> tokens_BT, segment_ids_BT and
        loss_mask_BT of these rows, and language_BT where the experiment names languages.
      steps: steps of the run.
      fingerprint: of the data; a resumed run must have the same.
    """

    batch: Callable[[int, np.ndarray], NumpyBatch]
    steps: int
    fingerprint: str


def open_rows(experiment: Experiment, vocab_size: int) -> Rows:
    """The rows that an experiment names.

    Raises:
      BimedixError: no data is named, the folder is not a packed one, or its rows have another length.
    """
    data, size = experiment.data, experiment.batch.size
    languages = experiment.router.languages
    if data.synthetic_rows:
        if languages:
            raise BimedixError("Made-up rows have no language; name a packed folder, or leave router.languages out.")
        steps = experiment.steps or -(-(experiment.epochs or 1) * data.synthetic_rows // size)
        rows = synthetic(data.synthetic_rows, data.sequence_length, vocab_size, experiment.seed)
        digest = hashlib.sha256(b"".join(rows[name].tobytes() for name in sorted(rows))).hexdigest()
        return Rows(
            lambda step, positions: {name: x[(step * size + positions) % len(x)] for name, x in rows.items()},
            steps,
            digest,
        )
    if data.path is None:
        raise BimedixError("The experiment names no data; give a packed folder (`bimedix data pack` writes one).")
    from bimedix_jax.data import loader

    check_length(data.path, data.sequence_length)
    held = {group.language for group in loader.read_index(data.path).groups}
    if missing := [language for language in languages if language not in held]:
        raise BimedixError(
            f"{data.path} has no record in {', '.join(missing)}, it has {', '.join(sorted(held))}; correct "
            "router.languages."
        )
    batches = loader.batches(data.path, size, experiment.seed, epochs=experiment.epochs)
    steps = experiment.steps or len(batches)
    if experiment.epochs is not None and steps > len(batches):
        raise BimedixError(
            f"{steps} steps are more than the {len(batches)} that {experiment.epochs} epochs of {data.path} have; "
            "lower steps, or leave epochs out so that the data repeat."
        )
    return Rows(lambda step, rows: batches.at(step, rows, languages), steps, loader.fingerprint(data.path))


def check_length(folder: str, sequence_length: int) -> None:
    from bimedix_jax.data import loader

    found = loader.read_index(folder).sequence_length
    if found != sequence_length:
        raise BimedixError(
            f"{folder} was packed with {found} tokens a row, the experiment says {sequence_length}; "
            "set data.sequence_length, or pack it again."
        )


def check_tokenizer(experiment: Experiment) -> int:
    """Refuses packed rows of another tokenizer than the model's: their ids mean other words to it.

    Returns: folders that could not be compared, since the model has no tokenizer files or the rows name no tokenizer.

    Raises:
      BimedixError: a folder was packed with another tokenizer.
    """
    from bimedix_jax.checkpoint.hub import resolve
    from bimedix_jax.data import loader
    from bimedix_jax.data.tokenizer import has_tokenizer, load_tokenizer

    folders = [experiment.data.path, experiment.data.heldout if experiment.eval_every else None]
    packed = [folder for folder in folders if folder is not None]
    source = experiment.model
    if not packed or source.path is None:
        return len(packed)
    model = resolve(source.path, source.revision)
    if not has_tokenizer(model):
        return len(packed)
    tokenizer = load_tokenizer(model)
    return sum(not loader.require_tokenizer(folder, tokenizer) for folder in packed)


def heldout_batches(experiment: Experiment) -> Iterator[NumpyBatch]:
    """Every held-out row once, in order, as micro-batches; the last is filled up with empty rows."""
    from bimedix_jax.data import loader

    assert experiment.data.heldout is not None  # experiment.py: eval_every needs it
    check_length(experiment.data.heldout, experiment.data.sequence_length)
    batches = loader.batches(experiment.data.heldout, experiment.batch.rows, seed=0, shuffle=False, epochs=1)
    return (batches[step] for step in range(len(batches)))


def synthetic(rows: int, length: int, vocab_size: int, seed: int) -> NumpyBatch:
    """Made-up rows: two random documents each, padding at the end, the second half of a document learned."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, vocab_size, (rows, length), dtype=np.int32)
    place = np.broadcast_to(np.arange(length), (rows, length))
    border, end = length // 2, length - length // 16
    segment_ids = np.where(place < border, 1, np.where(place < end, 2, 0)).astype(np.int32)
    inside = np.where(place < border, place, place - border)
    return {
        "tokens_BT": np.where(segment_ids != 0, tokens, 0).astype(np.int32),
        "segment_ids_BT": segment_ids,
        "loss_mask_BT": (segment_ids != 0) & (inside >= border // 2),
    }


def micro_batches(batch: NumpyBatch, accumulation: int) -> NumpyBatch:
    """[B, T] as [A, B / A, T]."""
    return {name: x.reshape(accumulation, -1, *x.shape[1:]) for name, x in batch.items()}
