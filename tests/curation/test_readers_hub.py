"""Hub sets: folders laid out like them, folders saved by `datasets`, and a hub on this machine."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bimedix_jax.curation.quarantine import Quarantine
from bimedix_jax.curation.readers import hub, read
from bimedix_jax.data.records import Record
from bimedix_jax.errors import BimedixError

pytest.importorskip("datasets")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
---
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` caches what it resolves in the home folder otherwise."""
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run(source: str) -> tuple[list[Record], Quarantine]:
    quarantine = Quarantine()
    return list(read(source, quarantine)), quarantine


def write_set(folder: Path) -> Path:
    from pyarrow import Table, parquet

    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    rows = [
        {"id": f"q{i}", "question": "Vitamin of scurvy?", "opa": "A", "opb": "B", "opc": "C", "opd": "D", "cop": 2}
        for i in range(5)
    ]
    rows[3]["cop"] = -1
    parquet.write_table(Table.from_pylist(rows[:3]), folder / "data/train-00000-of-00002.parquet")
    parquet.write_table(Table.from_pylist(rows[3:4]), folder / "data/train-00001-of-00002.parquet")
    parquet.write_table(Table.from_pylist(rows[4:]), folder / "data/test-00000-of-00001.parquet")
    return folder


def test_a_local_folder_with_the_layout_of_the_hub(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "medmcqa")
    records, quarantine = run(f"medmcqa=hf:{folder}")
    assert [(record.id, record.answer, record.split) for record in records] == [
        (f"medmcqa/q{i}", 2, "train") for i in range(3)
    ]
    assert [(row.file, row.line) for row in quarantine.rejected] == [("medmcqa/train", 4)]
    assert [record.split for record in run(f"medmcqa=hf:{folder}#default/test")[0]] == ["heldout"]
    with pytest.raises(BimedixError, match="no split 'dev'; its splits are train, test"):
        run(f"medmcqa=hf:{folder}#dev")


def test_a_card_cannot_refer_to_files_outside_its_folder(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "medmcqa")
    (tmp_path / "secret.parquet").write_bytes((folder / "data/test-00000-of-00001.parquet").read_bytes())
    (folder / "data/train-x.parquet").symlink_to(tmp_path / "secret.parquet")
    with pytest.raises(BimedixError, match=r"outside"):
        run(f"medmcqa=hf:{folder}")


def test_formats_other_than_plain_data_raise(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.xml").write_text("<a/>")
    with pytest.raises(BimedixError, match="has format xml; only arrow, csv, json, parquet, text can be read"):
        run(f"medmcqa=hf:{tmp_path / 'set'}")
    (tmp_path / "set" / "set.py").write_text("raise SystemExit(1)")
    with pytest.raises(BimedixError, match="cannot read"):
        run(f"medmcqa=hf:{tmp_path / 'set'}")


def test_a_folder_written_by_save_to_disk(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_list([{"q": "Hi?", "a": "Hello."}])
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "two"))
    options = "?question=q&answer=a&licence=MIT"
    (record,) = run(f"table=hf:{tmp_path / 'one'}{options}")[0]
    assert record.id.startswith("table/one/train/1-")
    assert [record.split for record in run(f"table=hf:{tmp_path / 'two'}#test{options}")[0]] == ["heldout"]
    with pytest.raises(BimedixError, match="was saved by the `datasets` package"):
        run(f"table={tmp_path / 'one'}{options}")


@pytest.mark.parametrize("text", ["medmcqa", "../up", "owner/name/more", "ow ner/name", ""])
def test_invalid_hub_ids_raise(text: str) -> None:
    with pytest.raises(BimedixError, match="neither a folder nor a hub id"):
        hub.parse(text)


def test_a_local_folder_is_not_read_instead_of_a_data_set_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BimedixError, match="would read the local folder owner/name instead of the hub"):
        list(hub.parts(hub.HubSet("owner/name")))
    with pytest.raises(BimedixError, match="is a folder and has no revision"):
        hub.parse("owner/name@main")


def test_hub_ids_with_revision_configuration_and_split() -> None:
    assert hub.parse("owner/name") == hub.HubSet("owner/name")
    assert hub.parse("owner/name@abc#test") == hub.HubSet("owner/name", "abc", None, "test")
    assert hub.parse("owner/name#all/test") == hub.HubSet("owner/name", None, "all", "test")
    assert hub.HubSet("owner/name", "abc", "all", "test").label == "name/all/test"


def test_the_error_without_a_connection_names_the_data_set() -> None:
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(BimedixError, match="cannot read owner/name"):
        run("medmcqa=hf:owner/name")
    with pytest.raises(BimedixError, match="cannot get owner/name at main"):
        hub.pin(hub.HubSet("owner/name"))


class _Hub(BaseHTTPRequestHandler):
    """The little of the hub's interface that reading a data set takes."""

    sets: dict[str, dict[str, bytes]]  # hub id -> path in the set -> content

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        match = re.fullmatch("/(api/)?datasets/(owner/[a-z]+)(.*)", path)
        if match is None or match[2] not in self.sets:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        files, rest = self.sets[match[2]], match[3]
        if match[1] and rest in ("", "/revision/main", f"/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in files]
            self._json(
                {"id": match[2], "sha": COMMIT, "siblings": siblings, "cardData": {"license": "mit"}, "tags": []}
            )
        elif match[1] and rest.startswith(f"/tree/{COMMIT}"):
            self._json(_children(files, rest.partition(COMMIT)[2].strip("/")))
        elif not match[1] and rest.removeprefix(f"/resolve/{COMMIT}/") in files:
            self._file(files[rest.removeprefix(f"/resolve/{COMMIT}/")])
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def _file(self, content: bytes) -> None:
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(part[1]), int(part[2] or len(content) - 1)) if part else (0, len(content) - 1)
        chosen = content[first : last + 1]
        headers = {"ETag": f'"{sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if part:
            headers["Content-Range"] = f"bytes {first}-{first + len(chosen) - 1}/{len(content)}"
        self._send(206 if part else 200, chosen, headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Quiet."""


def _children(files: dict[str, bytes], folder: str) -> list[dict[str, Any]]:
    """What the hub lists of a folder: its folders and its files."""
    start = f"{folder}/" if folder else ""
    below = {name.removeprefix(start): content for name, content in files.items() if name.startswith(start)}
    folders = sorted({name.partition("/")[0] for name in below if "/" in name})
    return [{"type": "directory", "path": start + name, "size": 0, "oid": "0" * 40} for name in folders] + [
        {"type": "file", "path": start + name, "size": len(content), "oid": sha1(content).hexdigest()}
        for name, content in below.items()
        if "/" not in name
    ]


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    folder = write_set(tmp_path / "published")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    rows = [{"instruction": "", "input": "Hi?", "output": "Hello."}]
    _Hub.sets = {
        "owner/name": {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths},
        "owner/array": {"release.json": json.dumps(rows).encode()},
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


FROM_THE_HUB = """
import json
from bimedix_jax.curation.quarantine import Quarantine
from bimedix_jax.curation.readers import hub, read
from bimedix_jax.curation.assembly.recipe import ResolvedSource
from bimedix_jax.curation.assembly.sources import pinned
from bimedix_jax.errors import BimedixError

def medmcqa(place, licence=None):
    return ResolvedSource(name="a", reader="medmcqa", place=hub.parse(place), licence=licence)

def failing(source):
    try:
        pinned(source)
    except BimedixError as error:
        return str(error)

place = pinned(medmcqa("owner/name@0123456", licence="MIT"))
quarantine = Quarantine()
print(json.dumps({
    "commit": place.revision,
    "parquet": [record.id for record in read(f"medmcqa=hf:owner/name@{place.revision}", quarantine)],
    "rejected": quarantine.count,
    "json": [record.id for record in read(f"chatdoctor=hf:owner/array@{place.revision}", Quarantine())],
    "licence": failing(medmcqa("owner/name", licence="Apache-2.0")),
    "moved": failing(medmcqa("owner/name@fffffff")),
    "absent": failing(medmcqa("owner/absent")),
}))
"""


def test_sets_are_pinned_and_read_from_a_hub(endpoint: str, tmp_path: Path) -> None:
    """End to end over HTTP: commit, licence, card, files. Parquet is streamed; JSON is downloaded and then streamed."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    env = {**os.environ, **settings}
    done = subprocess.run([sys.executable, "-c", FROM_THE_HUB], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["commit"] == COMMIT
    assert result["parquet"] == [f"medmcqa/q{i}" for i in range(3)]
    assert result["rejected"] == 1
    assert [name.rpartition("-")[0] for name in result["json"]] == ["chatdoctor/array/train/release/1"]
    assert "has licence 'mit' on the hub, but the recipe states 'Apache-2.0'" in result["licence"]
    assert f"main of owner/name is {COMMIT}, not fffffff" in result["moved"]
    assert "cannot get owner/absent at main" in result["absent"]
