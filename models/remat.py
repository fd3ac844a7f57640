"""What the backward pass recomputes: checkpoint policies for the body of the loop over layers."""

from collections.abc import Callable
from typing import Any

import jax

from bimedix_jax.kernels.attention.api import SAVED
from bimedix_jax.kernels.expert_mlp.composed import PRODUCTS
from bimedix_jax.models import shards
from bimedix_jax.models.config import Remat

ROUTES = "routes"
"""Name of the routers' decisions in checkpoint policies. Every policy saves them. Recomputing them could round
differently, and if one token then went to another expert, the gradient would not be that of the loss."""


def checkpointed(body: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """The body of the loop over layers, which saves for the backward pass only what `remat` allows, and always
    ROUTES."""
    policies = jax.checkpoint_policies
    if remat == "layer":
        policy = policies.save_only_these_names(ROUTES)
    elif remat == "experts":
        policy = policies.save_only_these_names(ROUTES, PRODUCTS, SAVED)
    elif shards.active():
        policy = shards.keep_all_but_parameters
    else:
        return body
    return jax.checkpoint(body, prevent_cse=False, policy=policy)
