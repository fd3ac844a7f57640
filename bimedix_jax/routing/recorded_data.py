"""What is recorded: records or packed rows as sequences of tokens, with what is known of each."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from bimedix_jax.data import loader, pack
from bimedix_jax.data.encoding import encode_chat
from bimedix_jax.data.records import Record, read_jsonl, sample
from bimedix_jax.data.roles import FIRST, ROLES
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.inference.planning import Source, source_of
from bimedix_jax.routing.parts import UNKNOWN_ROLE


@dataclasses.dataclass(frozen=True)
class Item:
    """A sequence to record: its tokens, what is known of it, and its length without the last answer."""

    source: Source
    ids: np.ndarray
    prompt: np.ndarray | None = None

    @property
    def about(self) -> Mapping[str, str | None]:
        """What the recording says of the record, by the names in parts.TEXTS."""
        return {"language": self.source.language, "kind": self.source.kind, **self.source.fields}


@dataclasses.dataclass(frozen=True)
class Data:
    """The records of a recording in order, and the SHA-256 of their content."""

    records: Sequence[Record] | None
    rows: Path | None
    tokenizer: Tokenizer | None
    digest: str
    limit: int | None = None

    @classmethod
    def open(cls, name: str, tokenizer: Tokenizer, limit: int | None) -> "Data":
        """`sample`, a JSONL file of records, or a folder of packed rows.

        Raises:
          BimedixError: there is no such data, no record, or the rows were packed with another tokenizer.
        """
        if limit is not None and limit < 1:
            raise BimedixError(f"--limit is {limit}; give at least 1")
        if Path(name).is_dir():
            loader.require_tokenizer(name, tokenizer)
            return cls(None, Path(name), tokenizer, loader.fingerprint(name), limit)
        records = list(sample() if name == "sample" else read_jsonl(name))
        if not records:
            raise BimedixError(f"{name} has no record; name a file with some")
        if limit is not None and limit < len(records):  # spread, because files are sorted by source and kind
            records = [records[i * len(records) // limit] for i in range(limit)]
        return cls.of(records, tokenizer, limit)

    @classmethod
    def of(cls, records: Sequence[Record], tokenizer: Tokenizer | None, limit: int | None = None) -> "Data":
        """These records, of which `limit` says how they were chosen."""
        content = hashlib.sha256()
        for record in records:
            content.update(record.to_json().encode() + b"\n")
        return cls(records, None, tokenizer, content.hexdigest(), limit)

    @classmethod
    def packed(cls, folder: str) -> "Data":
        """All sequences of a folder of packed rows, whose tokenizer is not needed; errors as `open`."""
        return cls(None, Path(folder), None, loader.fingerprint(folder))

    @property
    def hashes(self) -> dict[str, str | None]:
        """SHA-256 of the content, and of the tokenizer and the chat template as far as they are known."""
        if self.rows is not None:
            return {"data": self.digest, "tokenizer": loader.read_index(self.rows).tokenizer, "template": None}
        assert self.tokenizer is not None  # records have one
        return {"data": self.digest, "tokenizer": self.tokenizer.fingerprint, "template": template_hash(self.tokenizer)}

    def items(self, with_prompts: bool = False) -> Iterator[Item]:
        """The sequences in order; each has an id of its own.

        Raises:
          BimedixError: packed rows have no prompts.
        """
        seen: dict[str, int] = {}
        for item in self._of_rows(with_prompts) if self.records is None else self._of_records(with_prompts):
            times = seen[item.source.id] = seen.get(item.source.id, 0) + 1
            name = item.source.id if times == 1 else f"{item.source.id}#{times}"
            yield dataclasses.replace(item, source=dataclasses.replace(item.source, id=name))

    def spread(self, count: int) -> Iterator[Item]:
        """About this many sequences from the whole of the records, or the first ones of packed rows."""
        if self.records is None:
            return itertools.islice(self.items(), count)
        step = max(len(self.records) // count, 1)
        return dataclasses.replace(self, records=self.records[::step]).items()

    def _of_records(self, with_prompts: bool) -> Iterator[Item]:
        assert self.tokenizer is not None  # records have one
        for record in self.records or ():
            turns = record.conversations
            source = source_of(record, self.tokenizer)
            texts = {name: None if value is None else str(value) for name, value in source.fields.items()}
            prompt = None
            if with_prompts:
                prompt = np.array(encode_chat(self.tokenizer, turns[:-1], add_generation_prompt=True)[0], np.int32)
            ids = np.array(encode_chat(self.tokenizer, turns)[0], np.int32)
            yield Item(dataclasses.replace(source, fields=texts), ids, prompt)

    def _of_rows(self, with_prompts: bool) -> Iterator[Item]:
        if with_prompts:
            raise BimedixError("packed rows do not tell prompts from answers of a conversation; give records instead")
        assert self.rows is not None
        batches = loader.batches(self.rows, 1, seed=0, shuffle=False, epochs=1)
        found = (item for step in range(len(batches)) for row in batches.rows(step) for item in _of_row(row))
        for number, item in enumerate(found):
            if self.limit is not None and number >= self.limit:
                return
            yield item


def template_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of a chat template."""
    return hashlib.sha256(repr(tokenizer.template).encode()).hexdigest()


def _of_row(row: pack.Row) -> Iterator[Item]:
    for segment in row.segments:
        own_T = row.segment_ids == segment.segment
        roles = np.where(row.loss_mask[own_T], ROLES.index("answer"), UNKNOWN_ROLE).astype(np.uint8)
        roles[:FIRST] = ROLES.index("first")
        fields = {"source": segment.source}
        source = Source(segment.id, segment.language, segment.kind, roles, fields, "packed rows")
        yield Item(source, row.tokens[own_T])
