"""Folders and files are written completely or not at all, and names never lead outside a folder."""

import errno
import gzip
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, StrictFloat, StrictInt

from bimedix_jax.errors import BimedixError
from bimedix_jax.files import (
    check_file,
    check_replaceable,
    inside,
    new_folder,
    peek_json,
    read_json,
    read_text,
    require_content,
    sha256,
    text_lines,
    write_text,
)
from bimedix_jax.process.folders import WRITTEN, one_writer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != WRITTEN)


def test_folder_appears_only_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
        assert folder.parent == tmp_path / "deep"  # the same file system: the rename is atomic
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out") == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [None, "old"])
def test_an_error_leaves_everything_as_it_was(tmp_path, error, before):
    out = tmp_path / "out"
    if before:
        with new_folder(out) as folder:
            (folder / before).touch()
    with pytest.raises(error), new_folder(out, overwrite=True) as folder:
        (folder / "a").write_text("1")
        raise error
    assert names(tmp_path) == (["out"] if before else [])
    assert not before or names(out) == [before]


def test_a_full_folder_is_replaced_only_on_request(tmp_path):
    out = tmp_path / "out"
    for name in ("first", "second"):
        with new_folder(out, overwrite=True) as folder:
            (folder / name).touch()
    assert names(out) == ["second"]
    assert names(tmp_path) == ["out"]
    with pytest.raises(BimedixError, match="--overwrite"), new_folder(out):
        pytest.fail("the body must not run")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", ".git/config"])
@pytest.mark.parametrize("ours_first", [False, True])
def test_files_of_others_are_never_deleted(tmp_path, overwrite, name, ours_first):
    out = tmp_path / "out"
    if ours_first:
        with new_folder(out) as folder:
            (folder / "model").touch()
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("theirs")
    with pytest.raises(BimedixError, match=Path(name).name) as caught, new_folder(out, overwrite):
        pytest.fail("the body must not run")
    assert "--overwrite" not in str(caught.value)
    assert (out / name).read_text() == "theirs"
    assert names(tmp_path) == ["out"]


def test_a_file_that_was_edited_is_not_deleted(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "reviews.csv").write_text("verdict\n\n")
        (folder / "other").touch()
    check_replaceable(tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "reviews.csv").write_text("verdict\ny")
    with pytest.raises(BimedixError, match=r"changed since \(reviews\.csv\)"):
        check_replaceable(tmp_path / "out", overwrite=True)


def test_links_of_others_are_never_deleted(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "broken").symlink_to("nowhere")
    with pytest.raises(BimedixError, match="broken"):
        check_replaceable(tmp_path / "out", overwrite=True)


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    """And what a living one writes is not."""
    killed = """
import os, sys
from bimedix_jax.files import new_folder
with new_folder(sys.argv[1]) as folder:
    (folder / "weights").write_bytes(b"x" * 1000)
    os.kill(os.getpid(), 9)
"""
    for target in ("out", "out.more"):
        assert subprocess.run([sys.executable, "-c", killed, str(tmp_path / target)]).returncode == -9
    assert len(names(tmp_path)) == 2
    with new_folder(tmp_path / "other"):
        assert len([name for name in names(tmp_path) if ".out" in name]) == 2
    with pytest.raises(BimedixError, match="not empty"), new_folder(tmp_path / "out") as first:
        assert len([name for name in names(tmp_path) if name.startswith(".out.")]) == 2, "the new one and that of more"
        with new_folder(tmp_path / "out") as second:
            assert first.exists()
            (second / "a").touch()
        (first / "b").touch()
    assert names(tmp_path / "out") == ["a"]
    with new_folder(tmp_path / "out.more"):
        pass
    assert names(tmp_path) == ["other", "out", "out.more"]


def test_a_folder_that_was_killed_while_it_was_replaced_comes_back(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    (tmp_path / "out").rename(tmp_path / ".out.0123abcd.old")
    with pytest.raises(BimedixError, match="--overwrite"), new_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]


def test_a_folder_has_one_writer(tmp_path):
    wait = """
import sys, time
from pathlib import Path
from bimedix_jax.process.folders import one_writer
with one_writer(Path(sys.argv[1]), "trains"):
    print("holds", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", wait, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        with (
            pytest.raises(BimedixError, match=rf"process {process.pid} on .* trains in"),
            one_writer(tmp_path, "trains"),
        ):
            pytest.fail("the body must not run")
        process.kill()
        process.wait()
    with one_writer(tmp_path, "trains"):
        assert names(tmp_path) == ["run.lock"]
    assert names(tmp_path) == []


def test_places_that_cannot_be_written_are_found_early(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "out", Path("/proc/out"), tmp_path / ("x" * 300)):
        with pytest.raises(BimedixError, match="cannot create"):
            check_replaceable(path, overwrite=False)
        with pytest.raises(BimedixError, match="cannot create"), new_folder(path):
            pass
    with pytest.raises(BimedixError, match="is a file"):
        check_replaceable("/dev/full", overwrite=True)
    check_replaceable(tmp_path / "new" / "out", overwrite=False)
    assert names(tmp_path) == ["file"]


def test_a_failure_removes_the_parents_that_it_made(tmp_path):
    with pytest.raises(ValueError, match="failed"), new_folder(tmp_path / "a" / "b" / "out"):
        raise ValueError("failed")
    assert names(tmp_path) == []


def test_a_file_is_replaced_only_on_request_and_if_it_is_ours(tmp_path):
    path = tmp_path / "result.json"
    check_file(path, overwrite=False, is_ours=lambda _: False)
    path.write_text("{}")
    with pytest.raises(BimedixError, match="pass --overwrite"):
        check_file(path, overwrite=False, is_ours=lambda _: True)
    with pytest.raises(BimedixError, match="did not write it"):
        check_file(path, overwrite=True, is_ours=lambda _: False)
    with pytest.raises(BimedixError, match="is a folder"):
        check_file(tmp_path, overwrite=True, is_ours=lambda _: True)
    check_file(path, overwrite=True, is_ours=lambda _: True)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("(os error 28)")])
def test_a_full_disk_is_one_sentence(tmp_path, error):
    with pytest.raises(BimedixError, match=r"out cannot be written: no space is left"), new_folder(tmp_path / "out"):
        raise error
    assert names(tmp_path) == []


def test_an_empty_folder_can_be_written(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert names(tmp_path / "out") == ["a"]


def test_files_written_meanwhile_by_another_process_are_kept(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(BimedixError, match="not empty"), new_folder(out):
        out.mkdir()
        (out / "theirs").touch()
    assert names(out) == ["theirs"]
    assert names(tmp_path) == ["out"]


def test_a_file_or_the_working_directory_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(BimedixError, match="is a file"), new_folder(tmp_path / "file", overwrite=True):
        pass
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (".", "..", tmp_path):
        with pytest.raises(BimedixError, match="working directory"), new_folder(path, overwrite=True):
            pass
    assert (tmp_path / "file").read_text() == "keep"


def test_a_folder_below_a_file_raises(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BimedixError, match="cannot create"), new_folder(tmp_path / "file" / "out"):
        pass


def test_a_symlink_still_points_to_the_replaced_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link") as folder:
        (folder / "a").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["a"]


def test_text_is_replaced_atomically(tmp_path):
    path = tmp_path / "report.md"
    write_text(path, "قديم\r\n")
    write_text(path, "جديد\n")
    assert path.read_bytes() == "جديد\n".encode()
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")  # half a surrogate pair cannot be encoded
    assert path.read_text("utf-8") == "جديد\n"
    assert names(tmp_path) == ["report.md"]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../../x", "/etc/passwd", "a\\..\\x", "C:\\x", "a\0b"])
def test_a_name_outside_the_folder_raises(tmp_path, name):
    with pytest.raises(BimedixError, match="not a path inside"):
        inside(tmp_path, name)


@given(st.text(max_size=20))
def test_no_name_points_outside_the_folder(name):
    folder = Path("/srv/model")
    try:
        found = inside(folder, name)
    except BimedixError:
        return
    assert found.resolve().is_relative_to(folder)


def test_symlinks_may_point_outside_the_folder(tmp_path):
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "123").write_text("weights")
    snapshot = repository / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    assert inside(snapshot, "model.safetensors").read_text() == "weights"

    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "model.safetensors").symlink_to("../models--a--b/blobs/123")
    assert inside(plain, "model.safetensors").read_text() == "weights"


def test_links_and_new_files_inside_are_allowed(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").symlink_to("a")
    assert inside(tmp_path, "b").read_text() == "x"
    assert inside(tmp_path, "new/shard.safetensors") == tmp_path / "new" / "shard.safetensors"


def test_sha256(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "f").write_bytes(data)
    assert sha256(tmp_path / "f") == hashlib.sha256(data).hexdigest()


class Rope(BaseModel, extra="forbid"):
    theta: StrictFloat


class Config(BaseModel, extra="forbid"):
    size: StrictInt
    rope: Rope | None = None


def written(folder: Path, text: str) -> Path:
    (folder / "config.json").write_text(text)
    return folder / "config.json"


def test_json_is_read_into_its_schema(tmp_path):
    path = written(tmp_path, '{"size": 3, "rope": {"theta": 1e4}}')
    assert read_json(path, Config, "correct it") == Config(size=3, rope=Rope(theta=1e4))
    assert read_json(path, dict[str, Any], "correct it")["size"] == 3
    assert peek_json(path)["size"] == 3


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "lacks the key size"),
        ('{"size": "3"}', "has size = '3', but it should be a valid integer"),
        ('{"size": 3, "rope": {"theta": "x"}}', r"has rope\.theta = 'x', but it should be a valid number"),
        ('{"size": 3, "siez": 3}', r"has 1 unknown key\(s\): siez"),
        ('{"size": 3, "rope": {"theta": 1.0, "beta": 1}}', r"has 1 unknown key\(s\): rope\.beta"),
    ],
)
def test_json_errors_name_file_key_and_remedy(tmp_path, text, problem):
    path = written(tmp_path, text)
    with pytest.raises(BimedixError, match=rf"config\.json {problem}.*; correct it\.$"):
        read_json(path, Config, "correct it")


def test_a_list_that_is_something_else_is_called_a_list(tmp_path):
    with pytest.raises(BimedixError, match=r"config\.json is not a JSON list; correct it\.$"):
        read_json(written(tmp_path, "{}"), list[Any], "correct it")


def test_a_remedy_can_name_the_wrong_key(tmp_path):
    with pytest.raises(BimedixError, match=r"; remove siez\.$"):
        read_json(written(tmp_path, '{"size": 3, "siez": 3}'), Config, "remove {key}")


def test_duplicate_keys_are_refused_on_request(tmp_path):
    path = written(tmp_path, '{"size": 3, "size": 4}')
    assert read_json(path, Config, "correct it").size == 4
    with pytest.raises(BimedixError, match="duplicate key"):
        read_json(path, Config, "correct it", unique_keys=True)


@pytest.mark.parametrize("text", [None, "{", "[1]", "\udcff"])
def test_peek_json_is_empty_without_a_json_object(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert peek_json(tmp_path / "config.json") == {}


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4892809584\n"
PAGE = "<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (POINTER.encode(), "git-lfs pointer.*git lfs pull"),
        (POINTER.encode("utf-16"), "git-lfs pointer"),
        (PAGE.encode(), "web page"),
        (b"\xef\xbb\xbf \r\n<html>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
        (b"/annex/objects/SHA256E-s12--00\n", "git-annex pointer"),
        (b"Entry not found", "server's answer"),
    ],
)
def test_stand_ins_are_named(tmp_path, content, what):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    for read in (require_content, read_text, lambda path: list(text_lines(path))):
        with pytest.raises(BimedixError, match=what):
            read(path)
    with pytest.raises(BimedixError, match=what):
        read_json(path, dict, "download it again")


@pytest.mark.parametrize("content", [b"", b"{}", b"\x93NUMPY", b"entry not found in this list", b'{"a": "<html>"}'])
def test_files_that_are_no_stand_ins_pass(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    require_content(path)


def test_a_byte_order_mark_is_not_a_part_of_the_text(tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(b"\xef\xbb\xbf" + '{"a": "ب"}\n{}\n'.encode())
    assert read_text(path).startswith("{")
    assert list(text_lines(path)) == ['{"a": "ب"}\n'.encode(), b"{}\n"]
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path, dict[str, int], "save it again") == peek_json(path) == {"a": 1}


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(b'{"a": 1}' * 99, mtime=0),
        gzip.compress(b'{"a": 1}' * 99, mtime=1_800_000_000),
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"\x93NUMPY\x01\0v\0{'descr': '<f8', }",
        bytes(range(256)) * 2,
    ],
    ids=["gzip_without_time", "gzip", "png", "numpy", "all_bytes"],
)
def test_what_is_not_text_is_not_called_another_encoding(tmp_path, data):
    path = tmp_path / "file.json"
    path.write_bytes(data)
    for read in (read_text, lambda path: list(text_lines(path))):
        with pytest.raises(BimedixError, match="contains zero bytes, so it is not text; name a text file"):
            read(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(tmp_path, encoding):
    path = tmp_path / "file.json"
    path.write_bytes('{"a": 1}'.encode(encoding))
    for read in (read_text, lambda path: list(text_lines(path))):
        with pytest.raises(BimedixError, match="UTF-16 or UTF-32 text; save it as UTF-8"):
            read(path)
    path.write_bytes(("{}\u200f\n" * 300 + "ب").encode(encoding))
    with pytest.raises(BimedixError, match="UTF-16 or UTF-32 text; save it as UTF-8"):
        read_text(path)
    path.write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(BimedixError, match="is not UTF-8 text \\(byte 0xe9 at position 7"):
        read_text(path)
