"""The `quantization_config` of config.json that marks a folder as packed by bitsandbytes in 4 bits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from bimedix_jax import files
from bimedix_jax.errors import BimedixError

KEY = "quantization_config"
FLAGS = ("load_in_4bit", "_load_in_4bit", "load_in_8bit", "_load_in_8bit")
"""Without one of these nothing is quantised."""
REMEDY = f"if {{keys}} does not change the numbers, pass --ignore-config-key {KEY}: each packed tensor describes itself"


def written_settings(compute_dtype: str, double_quantised: bool, skipped: Sequence[str]) -> dict[str, Any]:
    """What transformers writes for a 4-bit model; `skipped` are names of modules that are not packed."""
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


class BitsandbytesJson(BaseModel, extra="forbid"):
    """The keys that transformers writes. Only their names are checked: how a tensor is packed is read from the tensor
    itself."""

    flag_4bit: Any = Field(None, alias="_load_in_4bit")
    flag_8bit: Any = Field(None, alias="_load_in_8bit")
    bnb_4bit_compute_dtype: Any = None
    bnb_4bit_quant_storage: Any = None
    bnb_4bit_quant_type: Any = None
    bnb_4bit_use_double_quant: Any = None
    llm_int8_enable_fp32_cpu_offload: Any = None
    llm_int8_has_fp16_weight: Any = None
    llm_int8_skip_modules: Any = None
    llm_int8_threshold: Any = None
    load_in_4bit: Any = None
    load_in_8bit: Any = None
    quant_method: Any = None


def is_packed(raw: Mapping[str, Any], folder: Path) -> bool:
    """Whether this config.json declares NF4 weights of bitsandbytes.

    Raises:
      BimedixError: it declares another quantisation, or has a key that is unknown.
    """
    settings = raw.get(KEY)
    if settings is None or settings == {}:
        return False
    source = f"{KEY} in {folder / 'config.json'}"
    if not isinstance(settings, dict):
        raise BimedixError(f"{source} is not a JSON object; correct it, or remove it.")
    method = settings.get("quant_method") or "bitsandbytes"
    if method == "bitsandbytes" and not any(settings.get(flag) for flag in FLAGS):
        files.validate(settings, BitsandbytesJson, source, REMEDY)
        return False
    four_bit = settings.get("load_in_4bit") or settings.get("_load_in_4bit")
    kind = settings.get("bnb_4bit_quant_type", "fp4") if four_bit else "int8"
    if method != "bitsandbytes" or kind != "nf4":
        what = f"bitsandbytes {kind}" if method == "bitsandbytes" else repr(method)
        raise BimedixError(
            f"{folder} is quantised as {what} ({KEY}), which is not implemented (only bitsandbytes nf4 is); name the "
            "unquantised checkpoint and load it with base nf4."
        )
    files.validate(settings, BitsandbytesJson, source, REMEDY)
    return True


def stated_dtypes(raw: Mapping[str, Any]) -> list[str]:
    """The dtypes that config.json names: that of the model, then that of the products in 4-bit layers."""
    settings = raw.get(KEY)
    compute = settings.get("bnb_4bit_compute_dtype") if isinstance(settings, dict) else None
    names = (raw.get("dtype"), raw.get("torch_dtype"), compute)
    return [str(name).removeprefix("torch.") for name in names if name is not None]
