"""BiMediX in JAX: bilingual (English and Arabic) medical mixtures of experts, from weights to evaluation.

The public names below are imported when first used, so that `import bimedix_jax` and `bimedix --help` load no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bimedix_jax.adapters import add_lora as add_lora
    from bimedix_jax.adapters import coverage as coverage
    from bimedix_jax.checkpoint.hf import export_hf as export_hf
    from bimedix_jax.checkpoint.load import load as load
    from bimedix_jax.checkpoint.peft_write import export_peft as export_peft
    from bimedix_jax.checkpoint.store import save as save
    from bimedix_jax.errors import BimedixError as BimedixError
    from bimedix_jax.inference.generate import generate as generate
    from bimedix_jax.models.config import LoraConfig as LoraConfig
    from bimedix_jax.models.config import LoraOverride as LoraOverride
    from bimedix_jax.models.config import MixtralConfig as MixtralConfig
    from bimedix_jax.models.config import RouterConfig as RouterConfig
    from bimedix_jax.models.routers import RoutingPlan as RoutingPlan

__version__ = "0.1.0"

# name -> module that defines it; a test checks that the imports above, for type checkers, are the same
_PUBLIC = {
    "BimedixError": "bimedix_jax.errors",
    "LoraConfig": "bimedix_jax.models.config",
    "LoraOverride": "bimedix_jax.models.config",
    "MixtralConfig": "bimedix_jax.models.config",
    "RouterConfig": "bimedix_jax.models.config",
    "RoutingPlan": "bimedix_jax.models.routers",
    "add_lora": "bimedix_jax.adapters",
    "coverage": "bimedix_jax.adapters",
    "export_hf": "bimedix_jax.checkpoint.hf",
    "export_peft": "bimedix_jax.checkpoint.peft_write",
    "generate": "bimedix_jax.inference.generate",
    "load": "bimedix_jax.checkpoint.load",
    "save": "bimedix_jax.checkpoint.store",
}

__all__ = [
    "BimedixError",
    "LoraConfig",
    "LoraOverride",
    "MixtralConfig",
    "RouterConfig",
    "RoutingPlan",
    "__version__",
    "add_lora",
    "coverage",
    "export_hf",
    "export_peft",
    "generate",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(sorted(_PUBLIC))}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value  # the next access does not call this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
