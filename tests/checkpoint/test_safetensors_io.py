"""Damaged files raise; reader and writer agree with the safetensors library."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from bimedix_jax.checkpoint.dtypes import TO_SAFETENSORS
from bimedix_jax.checkpoint.safetensors_io import (
    INDEX_NAME,
    SINGLE_NAME,
    ShardedWriter,
    TensorSpec,
    pieces,
    read_folder,
    read_header,
    weights_kind,
)
from bimedix_jax.errors import BimedixError


def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "a": draw.standard_normal((5, 7)).astype(ml_dtypes.bfloat16),
        "b": draw.standard_normal((3, 2, 4)).astype(np.float32),
        "c": draw.integers(0, 255, (6,), np.uint8),
        "scalar": np.array(3, np.float32),
        "empty": np.zeros((0, 4), np.float16),
    }


def file_of(folder: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / SINGLE_NAME
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def write(folder: Path, values: dict[str, np.ndarray], limit: int = 10**9) -> None:
    specs = [TensorSpec(name, value.dtype, value.shape) for name, value in values.items()]
    with ShardedWriter(folder, specs, limit) as writer:
        for name, value in reversed(values.items()):
            rows = 2 if value.ndim and len(value) > 2 else None
            if rows is None:
                writer.write(name, value)
            else:
                writer.write(name, value[rows:], rows)
                writer.write(name, value[:rows], 0)


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    values = arrays()
    safetensors.numpy.save_file(values, tmp_path / SINGLE_NAME, metadata={"format": "pt"})
    tensors = read_folder(tmp_path)
    assert tensors.keys() == values.keys()
    for name, value in values.items():
        read = tensors[name].read()
        assert (read.dtype, read.shape, read.tobytes()) == (value.dtype, value.shape, value.tobytes())
    assert tensors["a"].read(2, 2).tobytes() == values["a"][2:4].tobytes()
    out = np.zeros((2, 2, 4), np.float32)
    assert tensors["b"].read(1, out=out) is out
    assert np.array_equal(out, values["b"][1:])


@pytest.mark.parametrize("limit", [10**9, 100])
def test_the_library_reads_what_is_written(tmp_path: Path, limit: int) -> None:
    values = arrays()
    write(tmp_path, values, limit)
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(path)
    assert {k: (v.dtype, v.shape, v.tobytes()) for k, v in found.items()} == {
        k: (v.dtype, v.shape, v.tobytes()) for k, v in values.items()
    }
    assert (tmp_path / INDEX_NAME).exists() == (limit == 100)
    assert {name: tensor.read().tobytes() for name, tensor in read_folder(tmp_path).items()} == {
        name: value.tobytes() for name, value in values.items()
    }


def test_every_dtype_round_trips(tmp_path: Path) -> None:
    values = {name: np.ones((2, 8)).astype(dtype) for dtype, name in TO_SAFETENSORS.items()}
    write(tmp_path, values)
    for name, tensor in read_folder(tmp_path).items():
        assert tensor.dtype == values[name].dtype
        assert tensor.read().tobytes() == values[name].tobytes()


def test_truncated_files_raise_at_every_length(tmp_path: Path) -> None:
    safetensors.numpy.save_file(arrays(), tmp_path / SINGLE_NAME)
    whole = (tmp_path / SINGLE_NAME).read_bytes()
    for length in [0, 1, 7, 8, 9, 60, len(whole) // 2, len(whole) - 1]:
        (tmp_path / SINGLE_NAME).write_bytes(whole[:length])
        with pytest.raises(BimedixError, match="not a valid safetensors file"):
            read_header(tmp_path / SINGLE_NAME)


def test_a_file_cut_while_reading_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, arrays())
    tensors = read_folder(tmp_path)
    path = tmp_path / SINGLE_NAME
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(BimedixError, match="ends inside tensor"):
        for tensor in tensors.values():
            tensor.read()


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        ({"a": entry(0, 4), "b": entry(5, 8)}, bytes(8), "gap or an overlap"),
        ({"a": entry(0, 4), "b": entry(3, 8)}, bytes(8), "gap or an overlap"),
        ({"a": entry(1, 4)}, bytes(4), "gap or an overlap"),
        ({"a": entry(0, 4)}, bytes(5), "belong to no tensor"),
        ({"a": entry(0, 9)}, bytes(4), "truncated"),
        ({"a": entry(0, 4, "F32", [2])}, bytes(4), "does not occupy"),
        ({"a": entry(4, 0, "U8", [0])}, bytes(4), "does not occupy"),
        ({"a": entry(-4, 0, "U8", [4])}, bytes(4), "does not occupy"),
        ({"a": entry(0, 4, "U8", [-2, -2])}, bytes(4), "malformed"),
        ({"a": entry(0, 4, "C64", [4])}, bytes(4), "unknown dtype"),
        ({"a": {"dtype": "U8"}}, b"", "malformed"),
        ([], b"", "not a JSON object"),
        (b"{not json", b"", "not JSON"),
        (b'{"a":1,"a":2}', b"", "duplicate"),
        (b"\xff\xfe", b"", "not JSON"),
        (b"[" * 5000, b"", "not JSON"),
    ],
)
def test_damaged_headers_raise(tmp_path: Path, header: object, data: bytes, why: str) -> None:
    with pytest.raises(BimedixError, match=why):
        read_header(file_of(tmp_path, header, data))


def test_a_giant_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_NAME
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    with pytest.raises(BimedixError, match="limit"):
        read_header(path)


def sharded(folder: Path) -> Path:
    folder.mkdir()
    write(folder, arrays(), 100)
    return folder


def redirect(folder: Path, name: str, file: str) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"][name] = file
    (folder / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "..\\x"])
def test_an_index_cannot_name_files_outside_the_folder(tmp_path: Path, file: str) -> None:
    folder = sharded(tmp_path / "model")
    safetensors.numpy.save_file({"a": arrays()["a"]}, tmp_path / "outside.safetensors")
    redirect(folder, "a", file)
    with pytest.raises(BimedixError, match="not a path inside"):
        read_folder(folder)


def test_links_out_of_the_folder_are_followed(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    shard = next(folder.glob("*.safetensors"))
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    assert read_folder(folder).keys() == arrays().keys()


def test_hub_cache_links_work(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.parent.mkdir()
    sharded(snapshot)
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(f"../../blobs/{i}")
    assert read_folder(snapshot).keys() == arrays().keys()


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    first = sorted(folder.glob("*.safetensors"))[0].name
    redirect(folder, "ghost", first)
    with pytest.raises(BimedixError, match="lacks ghost"):
        read_folder(folder)
    redirect(folder, "ghost", "absent.safetensors")
    with pytest.raises(BimedixError, match=r"lacks absent\.safetensors"):
        read_folder(folder)
    (folder / INDEX_NAME).write_text('{"weight_map": {"a": 3}}')
    with pytest.raises(BimedixError, match=r"weight_map\.a = 3, but it should be a valid string"):
        read_folder(folder)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"other": first}}))
    with pytest.raises(BimedixError, match="does not assign to it"):
        read_folder(folder)


def test_incomplete_or_excess_writes_raise(tmp_path: Path) -> None:
    spec = TensorSpec("a", np.dtype(np.float32), (4, 2))
    with pytest.raises(ValueError, match="not completely written"), ShardedWriter(tmp_path, [spec]) as writer:
        writer.write("a", np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="more bytes"), ShardedWriter(tmp_path, [spec]) as writer:
        writer.write("a", np.zeros((3, 2), np.float32), 2)
    with pytest.raises(ValueError, match="does not fit"), ShardedWriter(tmp_path, [spec]) as writer:
        writer.write("a", np.zeros((3, 3), np.float32))


@given(st.integers(1, 300), st.integers(1, 50), st.integers(1, 2000), st.integers(1, 9))
def test_pieces_cover_all_rows_once(rows: int, columns: int, size: int, multiple: int) -> None:
    found = list(pieces(TensorSpec("a", np.dtype(np.float32), (rows, columns)), size, multiple))
    assert [row for first, count in found for row in range(first, first + count)] == list(range(rows))
    assert all(count % multiple == 0 for _, count in found[:-1])


def test_weights_kind(tmp_path: Path) -> None:
    assert weights_kind(tmp_path) == "none"
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    assert weights_kind(tmp_path) == "pickle"
    (tmp_path / SINGLE_NAME).touch()
    assert weights_kind(tmp_path) == "safetensors"
