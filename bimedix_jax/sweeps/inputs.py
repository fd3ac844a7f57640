"""What the runs of a sweep read: an upcycled mixture and packed rows. They are made once, by our own commands.

INPUTS/dense/      the tiny dense model, where the study asks for it
INPUTS/base/       `bimedix upcycle`
INPUTS/rows/       `bimedix data pack`
"""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bimedix_jax import files
from bimedix_jax.errors import BimedixError
from bimedix_jax.process import folders

TINY = "tiny"
"""Name of a random dense model with 0.1 M parameters and a tokenizer of bytes, for runs of seconds."""
WAIT_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The mixture that every run starts from, and the records that it trains on.

    Attributes:
      dense: the dense model to upcycle, as in `bimedix upcycle --model`, or `tiny`.
      experts, top_k, noise: how (`bimedix upcycle --help`). With noise 0 the experts are equal, and routers learn
        from the auxiliary loss alone.
      records: `sample` or a JSONL file; its training records are packed.
    """

    dense: str
    experts: int = 4
    top_k: int = 2
    noise: float = 0.1
    records: str = "sample"

    def folder(self, parent: Path, sequence_length: int) -> Path:
        """Where they are; inputs that differ have different names."""
        text = json.dumps([dataclasses.asdict(self), sequence_length], sort_keys=True)
        return parent / f"{Path(self.dense).name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def changes(self, folder: Path) -> dict[str, Any]:
        """Fields of an experiment that reads them."""
        return {"model.path": str(folder / "base"), "data.path": str(folder / "rows")}

    def commands(self, folder: Path, sequence_length: int) -> list[list[str]]:
        """The words of the commands that are still to be run."""
        found, base, rows = [], folder / "base", folder / "rows"
        dense = str(folder / "dense") if self.dense == TINY else self.dense
        if not base.is_dir():
            words = ["--experts", self.experts, "--top-k", self.top_k, "--noise", self.noise]
            found.append(["upcycle", "--model", dense, *map(str, words), "--out", str(base)])
        if not rows.is_dir():
            words = ["--records", self.records, "--split", "train", "--tokenizer", str(base)]
            words += ["--sequence-length", str(sequence_length), "--out", str(rows)]
            found.append(["data", "pack", *words])
        return found


def prepare(
    inputs: Inputs,
    folder: Path,
    sequence_length: int,
    command: Callable[[Sequence[str], Path], None],
    waiting: Callable[[], None] = lambda: None,
) -> None:
    """Makes what is missing. Of several processes one makes it, and the others wait.

    Args:
      command: runs the words of a command, with its output in a log file; raises BimedixError if it fails.
      waiting: is called once if this process has to wait.
    """
    if not inputs.commands(folder, sequence_length):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder, waiting):
        if inputs.dense == TINY and not (folder / "dense").is_dir():
            from bimedix_jax.quickstart.tiny import tiny_dense

            tiny_dense(folder / "dense")
        for words in inputs.commands(folder, sequence_length):
            command(words, folder / "log.txt")


@contextlib.contextmanager
def held(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """The folder's lock, after waiting for another process that holds it."""
    told = False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(folders.one_writer(folder, "makes the inputs"))
                break
            except BimedixError:
                if not told:
                    waiting()
                told = True
                time.sleep(WAIT_SECONDS)
        yield


@dataclasses.dataclass
class Fingerprints:
    """SHA-256 of files by path. A large file is hashed again only if its size or time of change differs.

    Attributes:
      store: JSON file that keeps them.
    """

    store: Path

    def __post_init__(self) -> None:
        self._known, self._changed = files.peek_json(self.store), False

    def of_file(self, path: Path) -> str:
        status = path.stat()
        key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
        if key not in self._known:
            self._known[key] = files.sha256(path)
            self._changed = True
        return self._known[key]

    def of_model(self, path: str, revision: str | None) -> str:
        """Of the weights and the configuration in a folder; a hub id is its own."""
        folder = Path(path).expanduser()
        if not folder.is_dir():
            return f"hub:{path}@{revision or 'main'}"
        names = ("config.json", "bimedix.json", "tokenizer.json", "tokenizer.model")
        parts = [file for file in sorted(folder.iterdir()) if file.suffix == ".safetensors" or file.name in names]
        if not any(part.suffix == ".safetensors" for part in parts):
            raise BimedixError(f"{folder} has no weights (*.safetensors); name the folder of a model with --model.")
        return combined({part.name: self.of_file(part) for part in parts})

    def of_rows(self, path: str) -> str:
        """Of a packed folder: the hash in its manifest, which training checks against the rows."""
        manifest = files.read_json(Path(path) / "manifest.json", dict[str, Any], "name a packed folder with --data")
        return combined({name: value["sha256"] for name, value in manifest["files"].items()})

    def save(self) -> None:
        if self._changed:
            files.write_text(self.store, json.dumps(self._known, indent=2, sort_keys=True) + "\n")


def combined(values: dict[str, Any]) -> str:
    """One SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
