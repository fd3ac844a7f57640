"""Rotary embeddings in config.json: the base frequency, Llama 3.1's scaling, and settings that change nothing.

`rope_scaling` (transformers 4) and `rope_parameters` (transformers 5) are objects with the keys of one `rope_type`. The
scaling "llama3" is implemented. Every other type is read only with values for which it scales nothing.
"""

import dataclasses
import json
from typing import Any

from pydantic import ValidationInfo

from bimedix_jax.models.config import RopeScaling

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

IDENTITY: dict[str, tuple[str, ...]] = {
    "default": ("original_max_position_embeddings",),
    "linear": (),
    "dynamic": ("original_max_position_embeddings",),
    "yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("original_max_position_embeddings",),
    "su": ("original_max_position_embeddings",),
    "llama3": LLAMA3[1:],
}
"""Types that scale nothing where their factors are 1 -> their other keys, which then have no effect (checked with the
formulas of transformers 5.23 in tests/checkpoint/test_rope.py)."""
FACTORS = ("factor", "attention_factor", "short_factor", "long_factor", "short_mscale", "long_mscale")


@dataclasses.dataclass(frozen=True)
class Rope:
    """What a block of config.json gives: the base frequency, if it names one, and the scaling."""

    theta: float | None
    scaling: RopeScaling | None


def read_rope(block: Any, info: ValidationInfo) -> Rope | None:
    """A rope_parameters or rope_scaling block; None where it is absent or empty.

    Raises ValueError for a scaling that is not implemented, and for a wrong value.
    """
    if not block:
        return None
    fields = dict(block) if isinstance(block, dict) else {"type": block}
    fields = {key: value for key, value in fields.items() if value is not None}
    old_kind = fields.pop("type", "default")
    kind = fields.pop("rope_type", old_kind)
    theta = fields.pop("rope_theta", None)
    if theta is not None and not is_number(theta):
        raise ValueError(f"{info.field_name} needs rope_theta, a positive number (found {theta!r})")
    if not is_one(fields.pop("partial_rotary_factor", 1)):
        raise ValueError(
            f"the model rotates only a part of each head ({info.field_name}: partial_rotary_factor), which is not "
            "implemented"
        )
    scaling = None if scales_nothing(kind, fields) else read_scaling(kind, fields, str(info.field_name))
    return Rope(None if theta is None else float(theta), scaling)


def scales_nothing(kind: Any, fields: dict[str, Any]) -> bool:
    """Whether rotary embeddings of this type, with these values, equal plain ones."""
    if kind not in ("default", *IDENTITY) or (kind != "default" and "factor" not in fields):
        return False
    factors = [value for key, value in fields.items() if key in FACTORS]
    other = [key for key in fields if key not in (*FACTORS, *IDENTITY[kind])]
    return not other and all(is_one(value) for value in factors)


def read_scaling(kind: Any, fields: dict[str, Any], name: str) -> RopeScaling:
    """Llama 3.1's scaling; raises ValueError for any other and for missing or wrong values."""
    if kind != "llama3":
        values = "".join(f", {key} {json.dumps(value)[:40]}" for key, value in sorted(fields.items()))
        raise ValueError(
            f"the model scales its rotary embeddings ({name}: {kind!r}{values}), which is not implemented (only "
            "'llama3' is)"
        )
    extra = sorted(set(fields) - set(LLAMA3))
    if extra:
        raise ValueError(f"{name} has unknown key(s) of the scaling llama3: {', '.join(extra)}")
    wrong = [key for key in LLAMA3 if not is_number(fields.get(key))]
    if wrong:
        raise ValueError(
            f"{name} needs {wrong[0]}, a positive number, for the scaling llama3 (found {fields.get(wrong[0])!r})"
        )
    factor, low, high = (float(fields[key]) for key in LLAMA3[:3])
    if fields[LLAMA3[3]] != int(fields[LLAMA3[3]]):
        raise ValueError(f"{name} needs {LLAMA3[3]}, a whole number (found {fields[LLAMA3[3]]!r})")
    return RopeScaling(
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=int(fields[LLAMA3[3]]),
    )


def written_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The keys of config.json, for transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters)."""
    if scaling is None:
        return {"rope_theta": theta, "rope_parameters": {"rope_theta": theta, "rope_type": "default"}}
    block = {"rope_type": "llama3", **dataclasses.asdict(scaling)}
    return {"rope_theta": theta, "rope_scaling": block, "rope_parameters": {"rope_theta": theta, **block}}


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def is_one(value: Any) -> bool:
    """Whether a factor, or every one of a list of factors, is 1."""
    return all(map(is_one, value)) if isinstance(value, list) and value else type(value) in (int, float) and value == 1
