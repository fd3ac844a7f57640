"""Loads a Mixtral whose experts are packed into fused 4-bit tensors with transformers 5 and bitsandbytes.

    python scripts/load_bnb_fused.py FOLDER --text "The heart"        # needs torch, transformers >= 5, bitsandbytes

For folders of `bimedix export --format bitsandbytes --layout fused` and of transformers' own
`save_pretrained(save_original_format=False)`. `from_pretrained` alone fails on them, because its quantiser
handles linear layers only, and experts are plain parameters. After loading, `load` replaces them by bitsandbytes'
parametrisation, which dequantises them in each forward pass. `load` has no other dependencies and can be copied.

On a CPU with AVX512-BF16, bitsandbytes computes its linear layers in bfloat16 with scales rounded to bfloat16, in eval
mode without gradients, for any dtype of the model. Call `model.train()` to compare logits (Mixtral has no dropout).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
from safetensors import safe_open

from bimedix_jax.errors import positive, run_script

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")


def load(folder: str | Path, device: str = "cpu") -> Any:
    """The model, with all packed tensors of the folder still packed."""
    config = transformers.AutoConfig.from_pretrained(folder)
    width = config.intermediate_size
    config.intermediate_size = 1  # from_pretrained allocates experts in 16 bits; with this width they are tiny
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, ignore_mismatched_sizes=True, device_map={"": device}
    )
    model.config.intermediate_size = width
    for number, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        experts.intermediate_dim = width
        for parameter in EXPERT_PARAMETERS:
            parts = packed_parts(Path(folder), f"model.layers.{number}.mlp.experts.{parameter}")
            nibbles = torch.nn.Parameter(parts.pop("").to(device), requires_grad=False)
            setattr(experts, parameter, nibbles)
            replace_parameter_4bit_prequantized(experts, parameter, parts, torch.device(device))
    return model


def packed_parts(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The nibbles of a packed tensor under the key "", and its quantisation state by name suffix."""
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"] if index.exists() else None
    files = {places[key] for key in places if key.startswith(name)} if places else {"model.safetensors"}
    parts = {}
    for file in files:
        with safe_open(folder / file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dictionary)
                if key == name or key.startswith(f"{name}."):
                    parts[key.removeprefix(name).removeprefix(".")] = tensors.get_tensor(key)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--text", default="The heart", help="text to continue")
    parser.add_argument("--max-new-tokens", type=positive, default=20)
    arguments = parser.parse_args()
    model = load(arguments.folder, arguments.device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.folder)
    inputs = tokenizer(arguments.text, return_tensors="pt").to(arguments.device)
    tokens = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    run_script(main)
