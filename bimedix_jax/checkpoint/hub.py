"""Resolves a folder or hub id to a local folder with safetensors weights."""

import logging
import os
import re
import shutil
import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from bimedix_jax.checkpoint.safetensors_io import INDEX_NAME, weights_kind
from bimedix_jax.errors import BimedixError
from bimedix_jax.files import require_content

log = logging.getLogger(__name__)

WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "LICENSE*", "NOTICE*"]
UNWANTED = ["consolidated*", "original/*", "onnx/*", "*.bin", "*.pt", "*.pth", "*.gguf"]
"""Mixtral's own repository has a second copy of all weights in consolidated*."""

COMPANIONS = (
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt chat_template.jinja chat_template.json generation_config.json LICENSE LICENSE.txt LICENSE.md NOTICE "
    "NOTICE.txt"
).split()
"""Files that a conversion copies unchanged."""

PART_NAME = re.compile(r".+-\d+-of-(\d+)\.safetensors")
"""A part of a model or adapter, as transformers and huggingface_hub name it."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """A local folder: `path_or_hub_id` itself, or the hub's snapshot of it at `revision`, downloaded unless it is
    cached.

    Raises BimedixError where neither exists or the download fails.
    """
    folder = Path(path_or_hub_id).expanduser()
    if folder.exists():
        if not folder.is_dir():
            raise BimedixError(f"{folder} is a file; name the folder that contains it.")
        if revision is not None:
            raise BimedixError(f"{folder} is a local folder, which has no revision {revision!r}; leave --revision out.")
        return folder
    name = str(path_or_hub_id)
    if not HUB_ID.fullmatch(name):
        raise BimedixError(f"{name} is neither an existing folder nor a hub id (owner/name); correct the path.")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except (OSError, ValueError) as error:  # every error class of the hub derives from these
        at = f" at revision {revision}" if revision else ""
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BimedixError(
            f"cannot get {name}{at} from the hub ({reason}); check the name, or name a local folder."
        ) from None


def offline_if_unreachable(timeout: float = 5) -> None:
    """Sets HF_HUB_OFFLINE if the hub does not answer, because its client tries each file for half a minute.

    Must run before huggingface_hub is imported. With a proxy nothing is checked.
    """
    if os.environ.get("HF_HUB_OFFLINE") or {"http", "https", "all"} & set(urllib.request.getproxies()):
        return
    hub = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)), timeout).close()
    except OSError as error:
        log.warning("%s cannot be reached (%s); only what is in its cache is used.", hub.netloc, error)
        os.environ["HF_HUB_OFFLINE"] = "1"


def require_safetensors(folder: Path) -> None:
    """Raises BimedixError, with the remedy, where `folder` has no safetensors weights under the expected names."""
    kind = weights_kind(folder)
    if kind == "safetensors":
        return
    if kind == "pickle":
        raise BimedixError(
            f"{folder} has only pickled PyTorch weights (.bin/.pt), which are never read because they can run code; "
            "use a safetensors revision (for the published BiMediX models: --revision refs/pr/1) or convert them once "
            "with transformers' save_pretrained."
        )
    if (folder / "adapter_config.json").exists() or (folder / "adapter.json").exists():
        raise BimedixError(
            f"{folder} is an adapter without a base model; name the base, and pass this folder as adapter."
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    parts = [match for name in others if (match := PART_NAME.fullmatch(name))]
    if parts:
        raise BimedixError(
            f"{folder} has {len(parts)} of {int(parts[0][1])} parts of a model ({parts[0][0]}, ...), but not "
            f"{INDEX_NAME}, which names the tensors of each; download that file, and all parts, too."
        )
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs and not others:
        raise BimedixError(f"{folder} has GGUF weights only; name the file itself, {folder / ggufs[0]}.")
    hint = f" (found {others[0]}, which is another layout)" if others else ""
    raise BimedixError(
        f"{folder} contains neither model.safetensors nor model.safetensors.index.json{hint}; name a folder that does."
    )


def check_companions(source: Path) -> list[str]:
    """The names of the files that `copy_companions` copies; raises BimedixError for one that is a stand-in."""
    found = [name for name in COMPANIONS if (source / name).is_file()]
    for name in found:
        require_content(source / name, markup=not name.endswith((".json", ".model")))
    return found


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copies tokenizer, chat template, generation config and licence files that exist; returns their names."""
    copied = check_companions(source)
    for name in copied:
        shutil.copyfile(source / name, target / name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)
        copied.append(templates.name)
    return copied
