"""The tensors of a Hugging Face folder under the names of the conversion table, whatever saved them.

Training wrappers add segments to names (`_orig_mod.`), old files have buffers that are recomputed, and tied models may
store their head twice. Tensors that change nothing, such as biases of zeros, are ignored. Where they would change
something, the error names the cause.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bimedix_jax.checkpoint.bnb_format import assemble
from bimedix_jax.checkpoint.safetensors_io import INDEX_NAME, SINGLE_NAME, StoredTensor, pieces, read_folder
from bimedix_jax.errors import BimedixError, listed
from bimedix_jax.models.config import MixtralConfig

WRAPPERS = ("_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Segments of names that torch.compile, DistributedDataParallel and DeepSpeed, Lightning Fabric, FSDP and activation
checkpointing add. No module of a model has such a name."""
RECOMPUTED = re.compile(r"(.+\.)?rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)")
"""Buffers in old exports. They are computed from the configuration, so they are ignored, as transformers does."""
BIAS = re.compile(r"(?:.+\.)?layers\.\d+\.(self_attn|mlp)\.(?:[qkvo]|gate|up|down)_proj\.bias")
BIAS_KEYS = {"attention_bias": "self_attn", "mlp_bias": "mlp"}
"""Keys of config.json -> the part of a layer whose projections then have biases."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_tensors(folder: Path, config: MixtralConfig) -> dict[str, StoredTensor]:
    """The tensors of a folder, with packed ones assembled, by the names of the conversion table.

    Raises BimedixError for damaged files, for tensors that were saved empty or in flat pieces, for biases that are not
    zero, and for a tied model with a head of its own.
    """
    source = str(folder)
    tensors = {name: tensor for name, tensor in read_folder(folder).items() if not RECOMPUTED.fullmatch(name)}
    require_gathered(tensors, source)
    tensors = assemble(without_biases(plain_names(tensors, source), source), source)
    if config.tie_embeddings and HEAD in tensors and EMBEDDING in tensors:
        require_equal_head(tensors[HEAD], tensors[EMBEDDING], source)
        del tensors[HEAD]
    return tensors


def is_zero(tensor: StoredTensor) -> bool:
    return not any(np.any(tensor.read(first, rows).astype(np.float32)) for first, rows in pieces(tensor))


def without_biases(tensors: Mapping[str, StoredTensor], source: str) -> dict[str, StoredTensor]:
    """The tensors without biases of zeros; raises BimedixError for others, which are not implemented."""
    biases = [name for name in tensors if BIAS.fullmatch(name)]
    wrong = [name for name in biases if not is_zero(tensors[name])]
    if wrong:
        raise BimedixError(
            f"{source} has {len(wrong)} bias(es) that are not zero ({listed(wrong)}), which are not implemented; use "
            "another checkpoint."
        )
    return {name: tensor for name, tensor in tensors.items() if name not in biases}


def zero_biases(folder: Path) -> list[str]:
    """The keys of BIAS_KEYS whose biases are in the folder and are all zero, so that they change nothing."""
    if not any((folder / name).exists() for name in (INDEX_NAME, SINGLE_NAME)):
        return []
    found: dict[str, list[bool]] = {}
    for name, tensor in read_folder(folder).items():
        match = BIAS.fullmatch(unwrapped(name))
        if match:
            found.setdefault(match[1], []).append(is_zero(tensor))
    return [key for key, part in BIAS_KEYS.items() if part in found and all(found[part])]


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
