"""The mirror in Weights & Biases, read back from wandb's own offline format: one run, one id, one curve."""

import dataclasses
import json
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from bimedix_jax import cli
from bimedix_jax.experiment import Tracking
from bimedix_jax.training.metrics_file import METRICS, read_metrics, rewind
from bimedix_jax.training.picture import draw_load
from bimedix_jax.training.tracking import CONFIG, RUN, Mirror, labels, run_id

BLOCK, HEADER = 32768, 7


def records(path: Path) -> list[Any]:
    """The records of a .wandb file: LevelDB's log format, with ':W&B' and a version first, of protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    found, parts, place = [], b"", HEADER
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, place)
        part = data[place + HEADER : place + HEADER + length]
        if len(part) < length:  # it is being written
            break
        assert checksum == zlib.crc32(part, zlib.crc32(bytes([kind])))
        parts, place = parts + part, place + HEADER + length
        if kind in (1, 4):  # full, or the last part
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def complete(path: Path) -> list[Any]:
    """The records of a finished run. wandb's own process may write them shortly after `finish` has returned."""
    deadline = time.monotonic() + 60
    while True:
        found = records(path)
        if any(record.HasField("exit") for record in found):
            return found
        assert time.monotonic() < deadline
        time.sleep(0.05)


def mirrored(folder: Path) -> dict[str, Any]:
    """The one offline run in a folder: how it is called, its configuration, its curve of loss and its summary."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    curve, summary, own = [], {}, None
    for record in complete(path):
        if record.HasField("run") and record.run.run_id:
            own = own or record.run
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if "loss" in items:
                curve.append((items["_step"], items["loss"]))
        if record.HasField("summary"):
            summary |= {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.summary.update
            }
    assert own is not None
    config = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in own.config.update}
    return {
        "id": own.run_id,
        "group": own.run_group,
        "name": own.display_name,
        "tags": list(own.tags),
        "config": config,
        "curve": curve,
        "summary": summary,
    }


@pytest.fixture
def arm(experiment, tmp_path) -> tuple[Any, Path]:
    """An arm of a sweep that has logged three steps and was killed before it saved the third."""
    run = experiment(name="study-smoke/low", seed=3, tracking=Tracking(mode="offline", project="test"))
    folder = tmp_path / "low-seed3-0123/training"
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(run.to_json())
    (folder / RUN).write_text(json.dumps({"starts": [{"time": "2026-01-01"}]}))
    facts = {"study": "study", "size": "smoke", "arm": "low", "seed": 3, "identity": "abc"}
    (folder.parent / "arm.json").write_text(json.dumps(facts))
    return run, folder


def write(folder: Path, mirror: Mirror, steps: range) -> None:
    with (folder / METRICS).open("a") as file:
        for step in steps:
            load = [[0.5, 0.5], [0.25, 0.75]]
            line = {"step": step, "loss": 1.0 / step, "load_max_share": [0.5, 0.75], "tokens": 9.0, "load": load}
            file.write(json.dumps(line) + "\n")
            mirror.write(line)


def test_an_interrupted_run_is_one_run_with_one_curve(arm, tmp_path):
    """Live, and made again by `bimedix track upload` after the mirror was lost."""
    run, folder = arm
    with pytest.raises(KeyboardInterrupt), Mirror(run, folder, 0) as mirror:
        write(folder, mirror, range(1, 4))
        raise KeyboardInterrupt
    rewind(folder, 2)
    with Mirror(run, folder, 2) as mirror:
        write(folder, mirror, range(3, 6))
    live = mirrored(folder)
    assert live["curve"] == [(step, 1.0 / step) for step in range(1, 6)]
    assert live["summary"]["load/_type"] == "image-file", "a run that ended has a picture of its load"
    assert (live["id"], live["group"], live["tags"]) == (run_id(folder), "study-smoke", ["smoke"])
    assert live["name"] == "study-smoke/low seed 3"
    assert live["config"]["lora/targets"] == ", ".join(run.lora.targets)
    assert live["config"]["arm"] == "low"
    assert not any(isinstance(value, dict | list) for key, value in live["config"].items() if key != "_wandb")

    rows = [
        {"id": "r", "language": "ar", "kind": "qa", "nats": 20.0, "tokens": 10, "bytes": 40},
        {"id": "s", "language": "en", "kind": "qa", "nats": 10.0, "tokens": 10, "bytes": 40},
    ]
    (folder.parent / "evaluation.json").write_text(json.dumps({"identity": "abc", "records": rows, "tokens": 60}))
    for old in folder.glob("wandb/*"):
        old.rename(folder.parent / old.name) if old.is_dir() else old.unlink()
    assert cli.main(["track", "upload", str(folder.parents[1]), "--offline"]) == 0
    again = mirrored(folder)
    for name in ("id", "group", "name", "tags", "curve"):
        assert again[name] == live[name]
    assert again["summary"]["final/nats_per_token/ar"] == 2.0
    assert again["summary"]["final/nats_per_token/all"] == 1.5
    assert again["summary"]["evaluation/_type"] == "table-file"
    assert again["summary"]["load/_type"] == "image-file"
    (image,) = folder.glob("wandb/offline-run-*/files/media/images/load*.png")
    assert image.read_bytes().startswith(b"\x89PNG")
    assert image.read_bytes() == draw_load(read_metrics(folder), tmp_path / "load.png").read_bytes()
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/evaluation*.json")
    shown = json.loads(table.read_text())
    assert shown["columns"] == ["group", "nats_per_token", "bits_per_byte", "tokens", "records"]
    assert [row[0] for row in shown["data"]] == ["all", "ar", "ar/qa", "en", "en/qa"]
    assert not any(isinstance(value, str) for row in shown["data"] for value in row[1:]), "numbers, and names of groups"


def test_the_id_follows_the_run_and_not_its_place(arm, tmp_path):
    run, folder = arm
    moved = folder.parent.rename(tmp_path / "moved") / "training"
    first = run_id(moved)
    (moved / CONFIG).write_text(dataclasses.replace(run, name="study-smoke/moved").to_json())
    assert run_id(moved) == first
    (moved / RUN).write_text(json.dumps({"starts": [{"time": "2026-01-02"}, {"time": "2026-01-03"}]}))
    assert run_id(moved) != first


def test_an_agent_of_a_sweep_names_its_run(arm, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    assert run_id(arm[1]) == "chosen"


def test_a_run_alone_is_its_own_group(experiment, tmp_path):
    found = labels(experiment(), tmp_path)
    assert (found["group"], found["name"], found["tags"]) == ("tiny", "tiny seed 0", [])
    assert found["config"]["batch/rows"] == 2


def test_a_folder_without_a_run_is_one_sentence(tmp_path, capsys):
    assert cli.main(["track", "upload", str(tmp_path)]) == 1
    assert "contains no run" in capsys.readouterr().err
