"""The options of a mix, shared by the modules that build a set and report on it."""

import dataclasses

from bimedix_jax.curation.mix import targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Options of a mix. `ratio` has an effect only where `preset` is None.

    Attributes:
      sources, evaluation: as readers.read takes them; evaluation records whose split is `train` are ignored.
      ratio: Arabic to English in each kind.
      preset, scale: see targets.py.
      near_duplicates: smallest similarity at which a record is removed; 0 keeps all records.
      ngram, share: see decontaminate.py.
      limit: maximum number of records to read from each source.
      seed: seed of the choice of records and of their order.
      tokenizer, template: count tokens as training does; without a tokenizer tokens are not counted.
      workers: number of worker processes; the set does not depend on it.
    """

    sources: tuple[str, ...]
    evaluation: tuple[str, ...]
    ratio: tuple[int, int]
    preset: targets.Preset | None
    scale: bool
    near_duplicates: float
    ngram: int
    share: float
    limit: int | None
    seed: int
    tokenizer: str | None
    template: str | None
    workers: int
