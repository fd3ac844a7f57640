"""Batches of a run by optimiser step. A step always has the same rows, so a resumed run only needs its step."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from bimedix_jax.data.pack import Row, Segment
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment
from bimedix_jax.training.groups import NO_GROUPS, Groups

NumpyBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The training data of a run.

    Attributes:
      batch: (step from 0, indices of rows in the batch of an optimiser step) -> tokens_BT, segment_ids_BT and
        loss_mask_BT of these rows, and group_BT if there are groups.
      whole: (step) -> all rows of its batch, with the record of each segment.
      steps: steps of the run.
      fingerprint: of the data; it must be the same in a resumed run.
      groups: languages and kinds whose loss and load are reported.
    """

    batch: Callable[[int, np.ndarray], NumpyBatch]
    whole: Callable[[int], list[Row]]
    steps: int
    fingerprint: str
    groups: Groups = NO_GROUPS


def open_rows(experiment: Experiment, vocab_size: int) -> Rows:
    """Opens the data of an experiment.

    Raises:
      BimedixError: the experiment names no data, the folder is not a packed one, or its rows have another length.
    """
    data, size = experiment.data, experiment.batch.size
    languages = experiment.router.languages
    if data.synthetic_rows:
        if languages:
            raise BimedixError("Synthetic rows have no language; name a packed folder, or do not set router.languages.")
        steps = experiment.steps or -(-(experiment.epochs or 1) * data.synthetic_rows // size)
        rows = synthetic(data.synthetic_rows, data.sequence_length, vocab_size, experiment.seed)
        digest = hashlib.sha256(b"".join(rows[name].tobytes() for name in sorted(rows))).hexdigest()
        return Rows(
            lambda step, positions: {name: x[(step * size + positions) % len(x)] for name, x in rows.items()},
            lambda step: [synthetic_row(rows, (step * size + i) % data.synthetic_rows) for i in range(size)],
            steps,
            digest,
        )
    if data.path is None:
        raise BimedixError("The experiment names no data; give a packed folder (`bimedix data pack` writes one).")
    from bimedix_jax.data import loader

    check_length(data.path, data.sequence_length)
    counted = loader.read_index(data.path).groups
    present, groups = {group.language for group in counted}, Groups.of_data(counted, languages)
    if missing := [language for language in languages if language not in present]:
        raise BimedixError(
            f"{data.path} has no record in {', '.join(missing)}, only in {', '.join(sorted(present))}; correct "
            "router.languages."
        )
    batches = loader.batches(data.path, size, experiment.seed, epochs=experiment.epochs)
    steps = experiment.steps or len(batches)
    if experiment.epochs is not None and steps > len(batches):
        raise BimedixError(
            f"{steps} steps are more than the {len(batches)} that {experiment.epochs} epochs of {data.path} have; "
            "lower steps, or do not set epochs, so that the data repeat."
        )
    return Rows(
        lambda step, rows: batches.at(step, rows, groups.pairs),
        batches.rows,
        steps,
        loader.fingerprint(data.path),
        groups,
    )


def check_length(folder: str, sequence_length: int) -> None:
    from bimedix_jax.data import loader

    found = loader.read_index(folder).sequence_length
    if found != sequence_length:
        raise BimedixError(
            f"{folder} was packed with {found} tokens a row, the experiment has {sequence_length}; "
            "set data.sequence_length, or pack it again."
        )


def check_tokenizer(experiment: Experiment) -> int:
    """Checks that the data were packed with the model's tokenizer.

    Returns: the number of folders that could not be checked, since the model or the folder names no tokenizer.

    Raises:
      BimedixError: a folder was packed with another tokenizer.
    """
    from bimedix_jax.checkpoint.hub import resolve
    from bimedix_jax.data import loader
    from bimedix_jax.data.tokenizer import has_tokenizer, load_tokenizer

    folders = [experiment.data.path, experiment.data.heldout if experiment.eval_every else None, experiment.probe]
    packed = [folder for folder in folders if folder is not None]
    source = experiment.model
    if not packed or source.path is None:
        return len(packed)
    model = resolve(source.path, source.revision)
    if not has_tokenizer(model):
        return len(packed)
    tokenizer = load_tokenizer(model)
    return sum(not loader.require_tokenizer(folder, tokenizer) for folder in packed)


def heldout_batches(experiment: Experiment) -> Iterator[list[Row]]:
    """Every held-out row once, in order, as micro-batches. The last one is padded with empty rows."""
    from bimedix_jax.data import loader

    assert experiment.data.heldout is not None  # experiment.py requires it for eval_every
    check_length(experiment.data.heldout, experiment.data.sequence_length)
    batches = loader.batches(experiment.data.heldout, experiment.batch.rows, seed=0, shuffle=False, epochs=1)
    return (batches.rows(step) for step in range(len(batches)))


def synthetic(rows: int, length: int, vocab_size: int, seed: int) -> NumpyBatch:
    """Synthetic rows: two random documents in each, padding at the end, loss on the second half of a document."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, vocab_size, (rows, length), dtype=np.int32)
    position = np.broadcast_to(np.arange(length), (rows, length))
    border, end = length // 2, length - length // 16
    segment_ids = np.where(position < border, 1, np.where(position < end, 2, 0)).astype(np.int32)
    inside = np.where(position < border, position, position - border)
    return {
        "tokens_BT": np.where(segment_ids != 0, tokens, 0).astype(np.int32),
        "segment_ids_BT": segment_ids,
        "loss_mask_BT": (segment_ids != 0) & (inside >= border // 2),
    }


def synthetic_row(rows: NumpyBatch, number: int) -> Row:
    """One of the synthetic rows, whose documents have neither language nor kind."""
    tokens, segment_ids, learned = (rows[name][number] for name in ("tokens_BT", "segment_ids_BT", "loss_mask_BT"))
    segments = []
    for segment in (1, 2):
        own = segment_ids == segment
        name = f"synthetic {number}.{segment}"
        segments.append(Segment(segment, name, "", "", "", int(own.sum()), int(learned[own].sum())))
    return Row(tokens, segment_ids, learned, tuple(segments))


def micro_batches(batch: NumpyBatch, accumulation: int) -> NumpyBatch:
    """Reshapes [B, T] to [A, B / A, T]."""
    return {name: x.reshape(accumulation, -1, *x.shape[1:]) for name, x in batch.items()}
