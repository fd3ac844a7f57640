"""Under the layer scan neither base nor adapters are copied: temporaries do not grow with stacked weights.

A copy would add its stack's bytes for every layer; what does grow is the saved input of each layer, some kilobytes
here. `scripts/measure_adapter_memory.py` shows the same at full width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tiny import GROUPED, tiny

from bimedix_jax.adapters import add_lora
from bimedix_jax.experiment import RouterTraining
from bimedix_jax.kernels import backends
from bimedix_jax.models.config import LoraConfig
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.plan import hardware
from bimedix_jax.quantise import quantise_base
from bimedix_jax.training.state import split_params
from bimedix_jax.training.step import make_gradient

WIDE = tiny(GROUPED, vocab_size=64, hidden_size=256, intermediate_size=512, head_dim=64, experts=8)


def memory_of(layers: int, device: Any) -> tuple[int, int, int]:
    """(base, adapters, temporaries) in bytes, of the gradient of one step on 32 tokens."""
    base = quantise_base(Mixtral(dataclasses.replace(WIDE, num_layers=layers)))
    structure, params, frozen = split_params(add_lora(base, LoraConfig(rank=64, alpha=64.0)))
    ids, mask = (jax.ShapeDtypeStruct((1, 1, 32), kind) for kind in (jnp.int32, jnp.bool_))
    batch = {"tokens_BT": ids, "segment_ids_BT": ids, "loss_mask_BT": mask}
    placed = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), (params, frozen, batch))
    with backends.use(device=None if device.platform == "cpu" else device):
        compiled = jax.jit(make_gradient(structure, RouterTraining(), "layer")).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    sizes = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (frozen, params)]
    return sizes[0], sizes[1], memory.temp_size_in_bytes


@pytest.mark.parametrize("target", ["cpu", "a100-80gb"])
def test_temporaries_do_not_grow_with_the_stack(target: str) -> None:
    device = jax.devices("cpu")[0] if target == "cpu" else hardware.devices(target)[0]
    shallow, deep = memory_of(2, device), memory_of(6, device)
    base, adapters, temporaries = ((b - a) / 4 for a, b in zip(shallow, deep, strict=True))
    assert adapters > 2 * base > 1e6, "sizes that would show"
    # the zeros that some gradient accumulators start from: an XLA buffer for each distinct shape, on GPUs
    assert temporaries < 0.3 * adapters
    assert temporaries < base
