import itertools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest

from bimedix_jax import files
from bimedix_jax.data import pack
from bimedix_jax.data.loader import Batches, Records, batches, fingerprint, require_tokenizer
from bimedix_jax.data.pack import Example, PackReport
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError

ROWS = 11


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, bytes_tokenizer: Tokenizer) -> Path:
    """Eleven rows; the tokens of row i are all i."""
    folder = tmp_path_factory.mktemp("packed")
    mask = np.arange(8) > 2
    examples = [Example(f"r{i}", "en", "qa", "t", np.full(8, i, np.int32), mask) for i in range(ROWS)]
    report = PackReport()
    facts = {"pad_id": 7, "tokenizer": bytes_tokenizer.fingerprint, "template": "chatml"}
    pack.write(folder, pack.pack(examples, 8, packing="none", report=report), report, 8, facts)
    return folder


def names(found: Batches, step: int) -> list[int]:
    return found[step]["tokens_BT"][:, 0].tolist()


def test_a_batch_has_the_promised_arrays(packed: Path) -> None:
    batch = batches(packed, 4, seed=0)[3]
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "tokens_BT": ((4, 8), np.int32),
        "segment_ids_BT": ((4, 8), np.int32),
        "loss_mask_BT": ((4, 8), np.bool_),
    }
    row = batches(packed, 4, seed=0).rows(3)[0]
    assert row.segments[0].id == f"r{row.tokens[0]}"


def test_records_are_those_of_grains_source(packed: Path) -> None:
    """Ours reads a record in a hundredth of the time. Two threads read at once."""
    theirs: Any = grain.sources.ArrayRecordDataSource([str(packed / pack.ROWS)])
    ours = Records(packed / pack.ROWS)
    numbers = [*range(ROWS), *reversed(range(ROWS))] * 5
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(ours.__getitem__, numbers)) == [theirs[number] for number in numbers]
    assert len(ours) == len(theirs) == ROWS


def test_every_epoch_is_another_permutation_of_all_rows(packed: Path) -> None:
    stream = list(itertools.chain.from_iterable(names(batches(packed, 4, seed=0), step) for step in range(11)))
    epochs = [stream[i * ROWS : (i + 1) * ROWS] for i in range(4)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert stream != [name for step in range(11) for name in names(batches(packed, 4, seed=1), step)]


def test_the_global_batch_does_not_depend_on_the_number_of_processes(packed: Path) -> None:
    whole = batches(packed, 4, seed=5)
    for count in (2, 4):
        parts = [batches(packed, 4, seed=5, process_index=i, process_count=count) for i in range(count)]
        for step in (0, 2, 1000):
            assert list(itertools.chain.from_iterable(names(part, step) for part in parts)) == names(whole, step)


def test_a_bounded_stream_ends_with_empty_rows(packed: Path) -> None:
    found = batches(packed, 4, seed=0, shuffle=False, epochs=1)
    assert len(found) == 3
    everything = [found[step] for step in range(3)]
    assert [batch["tokens_BT"][:, 0].tolist() for batch in everything] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 7]]
    assert everything[2]["segment_ids_BT"][3].sum() == 0
    assert not everything[2]["loss_mask_BT"][3].any()
    with pytest.raises(IndexError):
        found[3]


def test_invalid_arguments_and_folders_raise(packed: Path, tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    with pytest.raises(BimedixError, match="cannot be divided"):
        batches(packed, 4, seed=0, process_count=3)
    with pytest.raises(BimedixError, match="not a packed folder"):
        batches(tmp_path, 4, seed=0)
    with pytest.raises(BimedixError, match="have no end"):
        len(batches(packed, 4, seed=0))
    assert require_tokenizer(packed, bytes_tokenizer)
    (tmp_path / "index.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(BimedixError, match="has format 'other'"):
        batches(tmp_path, 4, seed=0)
    index = json.loads((packed / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "tokenizer": "another"}))
    with pytest.raises(BimedixError, match=r"packed with another tokenizer .*pack the records again"):
        require_tokenizer(tmp_path, bytes_tokenizer)
    unnamed = {name: value for name, value in index.items() if name != "tokenizer"}
    (tmp_path / "index.json").write_text(json.dumps(unnamed))
    assert not require_tokenizer(tmp_path, bytes_tokenizer)
    (tmp_path / "index.json").write_text(json.dumps({**index, "rows": 5}))
    (tmp_path / "rows.array_record").write_bytes((packed / "rows.array_record").read_bytes())
    with pytest.raises(BimedixError, match="11 rows, but its index says 5"):
        _ = batches(tmp_path, 4, seed=0)[0]


def test_a_changed_copy_of_a_packed_folder_raises(packed: Path, tmp_path: Path) -> None:
    assert fingerprint(packed) == files.sha256(packed / "rows.array_record")
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    assert fingerprint(copy) == fingerprint(packed)
    for name in ("rows.array_record", "index.json"):
        whole = (copy / name).read_bytes()
        for broken in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:]):
            (copy / name).write_bytes(broken)
            with pytest.raises(BimedixError, match="is not the file that was packed"):
                fingerprint(copy)
        (copy / name).unlink()
        with pytest.raises(BimedixError, match="is missing"):
            fingerprint(copy)
        (copy / name).write_bytes(whole)
    (copy / "manifest.json").unlink()
    with pytest.raises(BimedixError, match=r"has no manifest\.json"):
        fingerprint(copy)
