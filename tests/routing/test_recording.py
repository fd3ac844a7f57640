"""Recordings on disk: what was written is read back, the same values give the same bytes, and damage is noticed."""

import dataclasses
import json

import numpy as np
import pytest

from bimedix_jax import files
from bimedix_jax.errors import BimedixError
from bimedix_jax.routing import parts, tables
from bimedix_jax.routing import recording as recordings
from bimedix_jax.routing.parts import COLUMNS, PartLayout, Routes, token_hash
from bimedix_jax.routing.recording import LayerName, Recording
from bimedix_jax.routing.recording_writer import finish, write_parts

LAYERS, EXPERTS, TOP_K, ROUTERS = 3, 5, 2, 4


def routes(number: int, rng: np.random.Generator) -> Routes:
    tokens = int(rng.integers(1, 9))
    shape = (tokens, LAYERS, TOP_K)
    columns = {
        "nll": rng.random(tokens),
        "shuffled_nll": rng.random(tokens),
        "experts": np.argsort(rng.random((tokens, LAYERS, EXPERTS)))[..., :TOP_K],
        "weights": rng.random(shape),
        "norms": rng.random(shape),
        "margin": rng.random(shape[:2]),
        "entropy": rng.random(shape[:2]),
        "done": rng.integers(0, 2**32, tokens),
    }
    columns["nll"][0] = np.nan
    columns["experts"][0, 0, 1] = -1
    return Routes(
        id=f"r{number}",
        ids_N=rng.integers(0, 300, tokens),
        columns=columns,
        about={"language": "ar" if number % 2 else "en", "document": f"d{number // 3}" if number > 1 else None},
        labels={"site": "x"} if number % 3 else {},
        roles_N=rng.integers(0, 4, tokens),
        random_RLE=rng.integers(0, tokens * TOP_K, (ROUTERS, LAYERS, EXPERTS)),
    )


def write(folder, found, exact=False, wide=False):
    layout = PartLayout(layers=LAYERS, top_k=TOP_K, columns=COLUMNS, wide=wide, gaps=True, exact=exact, routers=ROUTERS)
    layers = [LayerName(number=number, path=f"layers.{number}.moe") for number in range(LAYERS)]
    with files.new_folder(folder) as partial:
        write_parts(partial, layout, found)
        finish(partial, layers=layers, experts=EXPERTS, layout=layout, hashes={"model": "m"}, options={"limit": 3})
    return Recording.open(folder, verify=True)


@pytest.fixture
def found():
    rng = np.random.default_rng(0)
    return [routes(number, rng) for number in range(12)]


@pytest.mark.parametrize(("exact", "wide"), [(False, False), (True, True)])
def test_what_was_written_is_read_back(tmp_path, monkeypatch, found, exact, wide):
    monkeypatch.setattr("bimedix_jax.routing.recording_writer.PART_ROWS", 30)  # several parts
    recording = write(tmp_path / "R", found, exact, wide)
    assert len(recording.names(parts.TOKENS)) > 2
    columns = recording.tokens("record", "position", "id", "role", *COLUMNS)
    lengths = [len(own.ids_N) for own in found]
    assert np.array_equal(columns["record"], np.repeat(np.arange(len(found)), lengths))
    assert np.array_equal(columns["position"], np.concatenate([np.arange(length) for length in lengths]))
    assert np.array_equal(columns["id"], np.concatenate([own.ids_N for own in found]))
    assert np.array_equal(columns["role"], np.concatenate([own.roles_N for own in found]))
    for name in COLUMNS:
        real = np.float32 if exact or "nll" in name else np.float16
        kind = {"experts": int, "done": np.uint32}.get(name, real)
        expected = np.concatenate([own.columns[name] for own in found]).astype(kind)
        assert np.array_equal(columns[name], expected, equal_nan=name == "nll"), name
    counts = recording.random_counts()
    assert counts is not None
    assert np.array_equal(counts, np.stack([own.random_RLE for own in found]))
    assert recording.records["id"] == [own.id for own in found]
    assert recording.records["token_hash"] == [token_hash(own.ids_N) for own in found]
    groups = recording.groups()
    assert groups["language"].tolist() == ["en", "ar"] * 6
    assert groups["document"].tolist()[:3] == [recordings.MISSING] * 2 + ["d0"]
    assert groups["site"].tolist()[:3] == [recordings.MISSING, "x", "x"]
    assert recording.manifest.rows == sum(lengths) * LAYERS


def test_the_same_values_give_the_same_bytes(tmp_path, found):
    names = [write(tmp_path / name, found).folder for name in "ab"]
    one, other = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in names)
    assert one == other


def test_a_row_takes_few_bytes(tmp_path):
    """At most 6 + 3k bytes a token and layer at 32 layers, with 8 experts and real-looking weights."""
    rng, layers, tokens = np.random.default_rng(0), 32, 4000
    scores = rng.normal(size=(tokens, layers, 8))
    experts = np.argsort(-scores, -1)[..., :2]
    columns = {"nll": rng.random(tokens), "experts": experts, "weights": rng.random(experts.shape)}
    columns |= {"margin": rng.random((tokens, layers)), "entropy": rng.random((tokens, layers))}
    columns["done"] = np.zeros(tokens, int)
    own = Routes(id="r", ids_N=rng.integers(0, 32000, tokens), columns=columns)
    layout = PartLayout(layers=layers, top_k=2, columns=tuple(columns), wide=False)
    write_parts(tmp_path, layout, [own])
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size / (tokens * layers) <= 6 + 3 * 2


def test_incomplete_or_damaged_recordings_raise(tmp_path, found):
    recording = write(tmp_path / "R", found)
    with pytest.raises(BimedixError, match="no norm of tokens"):
        recording.tokens("norm")
    manifest = tmp_path / "R" / recordings.MANIFEST
    text = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(text) | {"format": "bimedix routes 9"}))
    with pytest.raises(BimedixError, match="routes 9"):
        Recording.open(tmp_path / "R")
    manifest.write_text(text)
    part = tmp_path / "R" / recording.names(parts.TOKENS)[0]
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)
    with pytest.raises(BimedixError, match="changed after"):
        Recording.open(tmp_path / "R", verify=True)
    part.unlink()
    with pytest.raises(BimedixError, match="lacks tokens-00000"):
        Recording.open(tmp_path / "R")
    manifest.unlink()
    with pytest.raises(BimedixError, match="no complete recording"):
        Recording.open(tmp_path / "R")


def test_labels_of_missing_values_are_those_of_the_statistics():
    assert recordings.MISSING == tables.MISSING


def test_hashes_of_tokens_depend_on_ids_only():
    assert token_hash(np.array([1, 2], np.int64)) == token_hash(np.array([1, 2], np.int32))
    assert token_hash(np.array([1, 2])) != token_hash(np.array([2, 1]))
    assert token_hash(np.array([1, -1])) is None


def test_the_layout_names_every_column_once():
    layout = PartLayout(layers=1, top_k=1, columns=COLUMNS, wide=False)
    assert len(set(layout.tokens.names)) == len(layout.tokens.names) == 4 + len(COLUMNS)
    assert dataclasses.replace(layout, wide=True).no_expert == 0xFFFF


@pytest.mark.parametrize(
    ("experts", "gaps", "wide"), [(8, True, False), (256, False, False), (256, True, True), (257, False, True)]
)
def test_numbers_of_experts_fit_their_type(tmp_path, experts, gaps, wide):
    assert parts.needs_wide(experts, gaps) == wide
    layout = PartLayout(layers=1, top_k=2, columns=("experts",), wide=wide, gaps=gaps)
    chosen = np.array([[[experts - 1, -1 if gaps else 0]]])
    write_parts(tmp_path, layout, [Routes(id="r", ids_N=np.array([1]), columns={"experts": chosen})])
    finish(tmp_path, layers=[LayerName(number=0)], experts=experts, layout=layout, hashes={}, options={})
    assert np.array_equal(Recording.open(tmp_path).tokens("experts")["experts"], chosen)
