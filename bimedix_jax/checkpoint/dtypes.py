"""One table of the dtypes in checkpoints.

config.json, bitsandbytes, NumPy and JAX name a dtype alike ("bfloat16"); safetensors has its own names ("BF16"). Bytes
per element are `dtype.itemsize`.
"""

import ml_dtypes
import numpy as np

FROM_SAFETENSORS: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
"""Name in a safetensors header -> dtype."""
TO_SAFETENSORS = {dtype: name for name, dtype in FROM_SAFETENSORS.items()}

FLOATS = tuple(FROM_SAFETENSORS[name] for name in ("F64", "F32", "F16", "BF16"))
"""Dtypes that unpacked weights are read from."""


def by_name(*names: str) -> dict[str, np.dtype]:
    """The dtypes of these names in config.json."""
    dtypes = {dtype.name: dtype for dtype in FROM_SAFETENSORS.values()}
    return {name: dtypes[name] for name in names}


COMPUTE = by_name("bfloat16", "float32")
"""Dtypes that a model computes in here, and that its weights are written in."""
PACKED_FROM = by_name("bfloat16", "float16", "float32")
"""Dtypes that bitsandbytes packs and unpacks to."""
