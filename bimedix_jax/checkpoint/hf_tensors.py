"""The tensors of a Hugging Face folder under the names of the conversion table, whatever saved them.

Training wrappers add segments to names (`_orig_mod.`), old files have buffers that are recomputed, and tied models may
store their head twice. Redundant tensors that agree are ignored. If they differ, the error names the cause.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bimedix_jax.checkpoint.bnb_format import assemble
from bimedix_jax.checkpoint.safetensors_io import StoredTensor, pieces, read_folder
from bimedix_jax.errors import BimedixError, listed
from bimedix_jax.models.config import MixtralConfig

WRAPPERS = ("_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Segments of names that torch.compile, DistributedDataParallel and DeepSpeed, Lightning Fabric, FSDP and activation
checkpointing add. No module of a model has such a name."""
RECOMPUTED = re.compile(r"(.+\.)?rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)")
"""Buffers in old exports. They are computed from the configuration, so they are ignored, as transformers does."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_tensors(folder: Path, config: MixtralConfig) -> dict[str, StoredTensor]:
    """The tensors of a folder, with packed ones assembled, by the names of the conversion table.

    Raises BimedixError for damaged files, for tensors that were saved empty or in flat pieces, and for a tied model
    with a head of its own.
    """
    source = str(folder)
    tensors = {name: tensor for name, tensor in read_folder(folder).items() if not RECOMPUTED.fullmatch(name)}
    require_gathered(tensors, source)
    tensors = assemble(plain_names(tensors, source), source)
    if config.tie_embeddings and HEAD in tensors and EMBEDDING in tensors:
        require_equal_head(tensors[HEAD], tensors[EMBEDDING], source)
        del tensors[HEAD]
    return tensors


def unwrapped(name: str) -> str:
    """A name without the segments of wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def plain_names(tensors: Mapping[str, StoredTensor], source: str) -> dict[str, StoredTensor]:
    """The tensors without the wrappers' segments and without a prefix that all of them share.

    Raises BimedixError where two names become one.
    """
    names = {name: unwrapped(name) for name in tensors}
    roots = [name.removesuffix(EMBEDDING) for name in names.values() if name.endswith(f".{EMBEDDING}")]
    if len(roots) == 1 and all(name.startswith(roots[0]) for name in names.values()):
        names = {name: plain.removeprefix(roots[0]) for name, plain in names.items()}
    elif "embed_tokens.weight" in names.values():  # saved from the model without its head class
        names = {name: plain if plain == HEAD else f"model.{plain}" for name, plain in names.items()}
    found: dict[str, StoredTensor] = {}
    for name, plain in names.items():
        if plain in found:
            raise BimedixError(f"{source} has {plain} twice, once as {name}; save it without the training's wrapper.")
        found[plain] = tensors[name]
    return found


def require_gathered(tensors: Mapping[str, StoredTensor], source: str) -> None:
    """Raises BimedixError for the names and shapes of a model whose parameters were partitioned when it was saved."""
    empty = [name for name, tensor in tensors.items() if 0 in tensor.shape]
    if empty:
        raise BimedixError(
            f"{source} has {len(empty)} empty tensor(s) ({listed(empty)}), as DeepSpeed ZeRO-3 saves partitioned "
            "parameters; gather them with zero_to_fp32.py of the checkpoint, or save again with "
            "stage3_gather_16bit_weights_on_model_save."
        )
    flat = [name for name in tensors if name.rpartition(".")[2].startswith("_flat_param")]
    if flat:
        raise BimedixError(
            f"{source} has FSDP's flattened parameters ({listed(flat)}); save the full state dict (FULL_STATE_DICT)."
        )


def require_equal_head(head: StoredTensor, embedding: StoredTensor, source: str) -> None:
    """Raises BimedixError unless the head of a tied model is a copy of its embedding."""
    same = head.shape == embedding.shape and len(head.shape) == 2
    for first, rows in pieces(head) if same else ():
        theirs, ours = head.read(first, rows), embedding.read(first, rows)
        if theirs.dtype != ours.dtype:
            theirs, ours = theirs.astype(np.float32), ours.astype(np.float32)
        same = same and theirs.tobytes() == ours.tobytes()
    if not same:
        raise BimedixError(
            f"{source} has tie_word_embeddings true, but its {HEAD} differs from {EMBEDDING}; if the head was trained, "
            "set tie_word_embeddings to false in config.json."
        )
