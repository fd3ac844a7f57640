"""What the backward pass recomputes: checkpoint policies for the body of the loop over layers."""

from collections.abc import Callable
from typing import Any

import jax

from bimedix_jax.kernels.expert_mlp.composed import PRODUCTS
from bimedix_jax.models import shards
from bimedix_jax.models.config import Remat

ROUTES = "routes"
"""Name in checkpoint policies of what routers decided. Every policy keeps it. A recomputation rounds differently, and
one token that changed its expert would give the gradient of another function than the one that gave the loss."""


def checkpointed(body: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """The body of the loop over layers, keeping for the backward pass only what `remat` allows, and always ROUTES."""
    policies = jax.checkpoint_policies
    if remat == "layer":
        policy = policies.save_only_these_names(ROUTES)
    elif remat == "experts":
        policy = policies.save_only_these_names(ROUTES, PRODUCTS)
    elif shards.active():
        policy = shards.keep_all_but_parameters
    else:
        return body
    return jax.checkpoint(body, prevent_cse=False, policy=policy)
