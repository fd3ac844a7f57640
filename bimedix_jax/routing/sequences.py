"""Records as sequences of tokens in batches, for measurements that run a model many times over the same text.

Letters: R records, N scored tokens of all records.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bimedix_jax.data.encoding import ROLES
from bimedix_jax.data.records import Record
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.data.vocabulary import require_ids
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.heldout import example_of
from bimedix_jax.inference.padding import packed, packed_places
from bimedix_jax.inference.planning import Source, source_of
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.routing.contrasts import joined_units
from bimedix_jax.routing.tables import MISSING


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sequences:
    """Token sequences and what is known of them.

    Attributes:
      ids: int32 token ids of each record.
      answer: bool, for each record whether a token is one that `bimedix eval run` scores. Never the first token.
      sources: what is known of each record.
      too_long: number of records by language that did not fit and were left out.
    """

    ids: Sequence[np.ndarray]
    answer: Sequence[np.ndarray]
    sources: Sequence[Source]
    too_long: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    def prompt(self) -> list[np.ndarray]:
        """bool, for each record whether a token belongs to what is asked; all False where roles are not known."""
        found = []
        for ids, source in zip(self.ids, self.sources, strict=True):
            asked = np.zeros(len(ids), bool)
            if source.roles is not None:
                asked[: len(source.roles)] = source.roles[: len(ids)] == ROLES.index("prompt")
            asked[:1] = False
            found.append(asked)
        return found

    def labels(self, name: str) -> np.ndarray:
        """[R]: a field of each record ("language", "kind", "source", ...), MISSING where it has none."""
        values = [
            getattr(source, name) if name in ("language", "kind") else source.fields.get(name)
            for source in self.sources
        ]
        return np.array([MISSING if value is None else str(value) for value in values], object).astype(str)

    @property
    def groups(self) -> dict[str, np.ndarray]:
        """The fields by which records are compared."""
        return {"language": self.labels("language")}

    @property
    def cluster_R(self) -> np.ndarray:
        """The unit of analysis: the record, or the document where records share one."""
        document_R = self.labels("document")
        return np.array([document or f"\0{row}" for row, document in enumerate(document_R.tolist())])

    @property
    def pair_R(self) -> np.ndarray:
        """What a record shares with its translation."""
        return self.labels("pair")

    stratum_R = None

    @property
    def unit_R(self) -> np.ndarray:
        """[R]: index of the cluster of each record. Translations of each other are in one cluster."""
        unit_R = joined_units(self.cluster_R, self.pair_R, np.ones(len(self.ids), bool))
        return np.unique(unit_R, return_inverse=True)[1]


def sequences_of(records: Sequence[Record], tokenizer: Tokenizer, longest: int) -> Sequences:
    """Records as tokens; those of more than `longest` tokens are counted and left out.

    Raises:
      BimedixError: none fits, or two have the same id.
    """
    ids, answer, sources, too_long = [], [], [], {}
    if len(names := Counter(record.id for record in records)) < len(records):
        name, count = names.most_common(1)[0]
        raise BimedixError(f"{count} records have the id {name}; give each record once, with an id of its own")
    for record in records:
        example = example_of(record, tokenizer)
        if len(example.ids) > longest:
            too_long[record.language] = too_long.get(record.language, 0) + 1
            continue
        ids.append(np.asarray(example.ids, np.int32))
        answer.append(np.asarray(example.learned, bool))
        sources.append(source_of(record, tokenizer))
    if not ids:
        raise BimedixError(
            f"there is no record of at most {longest} tokens to score; give others or a longer max_length"
        )
    return Sequences(ids=ids, answer=answer, sources=sources, too_long=dict(sorted(too_long.items())))


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Packed sequences.

    Attributes:
      places: (index of a sequence, line, start).
      items_BT: index of each token's sequence; valid_BT: False at padding. scored_BT: the tokens to score.
    """

    places: list[tuple[int, int, int]]
    tokens_BT: np.ndarray
    ids_BT: np.ndarray
    items_BT: np.ndarray
    scored_BT: np.ndarray
    lengths: Sequence[int]

    @property
    def valid_BT(self) -> np.ndarray:
        return self.ids_BT != 0

    def by_sequence(self, values_BT: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(index of a sequence, its values [T, ...])."""
        for index, line, start in self.places:
            yield index, values_BT[line, start : start + self.lengths[index]]


def batches(
    sequences: Sequences, scored: Sequence[np.ndarray], config: MixtralConfig, batch_tokens: int
) -> Iterator[Batch]:
    """The batches in which `inference.scoring.score` runs the same sequences.

    Args:
      scored: for each sequence, the tokens to score.

    Raises:
      BimedixError: a token id that the model lacks.
    """
    require_ids(sequences.ids, config.vocab_size)
    lengths = sequences.lengths
    for places, tokens_BT, ids_BT in packed(sequences.ids, batch_tokens, config.max_position_embeddings):
        scored_BT = np.zeros(tokens_BT.shape, bool)
        for index, line, start in places:
            scored_BT[line, start : start + lengths[index]] = scored[index]
        items_BT, _ = packed_places(tokens_BT.shape, places, lengths)
        yield Batch(places, tokens_BT, ids_BT, items_BT, scored_BT, lengths)
