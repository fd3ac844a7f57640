"""The `quantization_config` of config.json that marks a folder as packed by bitsandbytes in 4 bits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bimedix_jax.errors import BimedixError

KEY = "quantization_config"
KNOWN = frozenset(
    """_load_in_4bit _load_in_8bit bnb_4bit_compute_dtype bnb_4bit_quant_storage bnb_4bit_quant_type
    bnb_4bit_use_double_quant llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight llm_int8_skip_modules
    llm_int8_threshold load_in_4bit load_in_8bit quant_method""".split()
)
"""What transformers writes. What is packed, and how, stands beside each tensor, and that is what is read."""


def is_packed(raw: Mapping[str, Any], folder: Path) -> bool:
    """Whether this config.json announces NF4 weights of bitsandbytes.

    Raises:
      BimedixError: it announces another quantisation.
    """
    settings = raw.get(KEY)
    if settings is None:
        return False
    if not isinstance(settings, dict):
        raise BimedixError(f"{KEY} in {folder / 'config.json'} is not an object; correct it, or remove it.")
    method = settings.get("quant_method", "bitsandbytes")
    four_bit = settings.get("load_in_4bit") or settings.get("_load_in_4bit")
    kind = settings.get("bnb_4bit_quant_type", "fp4") if four_bit else "int8"
    if method != "bitsandbytes" or kind != "nf4":
        what = f"bitsandbytes {kind}" if method == "bitsandbytes" else repr(method)
        raise BimedixError(
            f"{folder} is quantised as {what} ({KEY}), which is not implemented (only bitsandbytes nf4 is); name the "
            "unquantised checkpoint and load it with base nf4."
        )
    unknown = sorted(set(settings) - KNOWN)
    if unknown:
        raise BimedixError(
            f"{KEY} in {folder / 'config.json'} has unknown key(s) {', '.join(unknown)}; if they do not change the "
            f"numbers, pass --ignore-config-key {KEY}: each packed tensor describes itself."
        )
    return True


def stated_dtypes(raw: Mapping[str, Any]) -> list[str]:
    """The dtypes that config.json names: of the model between its layers, then of the products in 4-bit layers."""
    settings = raw.get(KEY)
    compute = settings.get("bnb_4bit_compute_dtype") if isinstance(settings, dict) else None
    names = (raw.get("dtype"), raw.get("torch_dtype"), compute)
    return [str(name).removeprefix("torch.") for name in names if name is not None]


def settings_for(compute_dtype: str, double_quantised: bool, skipped: Sequence[str]) -> dict[str, Any]:
    """What transformers writes for such a model; `skipped` are names of modules that are not packed."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quantised,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skipped),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
