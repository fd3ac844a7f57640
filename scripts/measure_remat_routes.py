"""Shows that the gradient does not change if the backward pass recomputes different router logits.

    python scripts/measure_remat_routes.py --json
    python scripts/measure_remat_routes.py --devices 8      # the same on a mesh of 8 CPU devices

The chosen experts of the forward pass are saved, so a recomputation does not choose again. To test this, the host adds
noise of 1e-6 to the router's logits, but only in recomputations. Groups of three experts have equal logits, so that
this noise changes the choice of many tokens. `flips_injected` counts tokens, in each layer, whose experts would change.
`gradient_change` is the relative change of all gradients together, including aux and z-loss. `unprotected` is the same
without saved routes. Mode none recomputes nothing and is the control.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from bimedix_jax.errors import positive, run_script

if TYPE_CHECKING:
    import jax
    import numpy as np

MODES = ("none", "experts", "layer")
NOISE = 1e-6
ROWS, LENGTH = 8, 32


class Host:
    """Returns the noise for the router's logits. Counts its calls, and the tokens whose experts would change."""

    def __init__(self, forward_calls: int):
        self.forward_calls = forward_calls
        self.start(0.0)

    def start(self, noise: float) -> None:
        """Call it before a step. Calls after those of the forward pass return noise of this standard deviation."""
        self.noise, self.calls, self.flips = noise, 0, 0

    def __call__(self, logits_BTE: "np.ndarray") -> "np.ndarray":
        import numpy as np

        self.calls += 1
        logits_BTE = np.asarray(logits_BTE)
        if self.calls <= self.forward_calls:
            return np.zeros_like(logits_BTE)
        draw = np.random.default_rng(self.calls).standard_normal(logits_BTE.shape)
        added = (self.noise * draw).astype(logits_BTE.dtype)
        # a stable sort orders equal logits by index, as lax.top_k does
        before, after = (np.argsort(-x, axis=-1, kind="stable")[..., :2] for x in (logits_BTE, logits_BTE + added))
        self.flips += int((np.sort(before) != np.sort(after)).any(-1).sum())
        return added


def disturbed(host: Host) -> Any:
    """x + noise from the host. Its backward pass uses the noise, so that a recomputation must call the host again."""
    import jax

    @jax.custom_vjp
    def add(x: "jax.Array") -> "jax.Array":
        return forward(x)[0]

    def forward(x: "jax.Array") -> tuple["jax.Array", "jax.Array"]:
        added = jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return x + added, added

    def backward(added: "jax.Array", dx: "jax.Array") -> tuple["jax.Array"]:
        return (dx + 0.0 * added,)

    add.defvjp(forward, backward)
    return add


@contextlib.contextmanager
def without_kept_routes() -> Iterator[None]:
    """Replaces the checkpoint policy by one that saves no routes."""
    from bimedix_jax.models import remat

    kept, remat.ROUTES = remat.ROUTES, "nothing has this name"
    try:
        yield
    finally:
        remat.ROUTES = kept


def step(mode: str, devices: int) -> tuple[Callable[[float], dict[str, Any]], Host]:
    """(function from noise to the gradients of one step, the host). Groups of three experts have equal logits."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np

    from bimedix_jax.experiment import RouterTraining
    from bimedix_jax.models.config import RouterConfig
    from bimedix_jax.models.init import init_random
    from bimedix_jax.models.linear import Linear
    from bimedix_jax.presets import smoke
    from bimedix_jax.sharding.placement import place
    from bimedix_jax.sharding.rules import make_mesh
    from bimedix_jax.training.state import split_params
    from bimedix_jax.training.step import make_gradient

    tiny = smoke().model.random
    assert tiny is not None
    config = dataclasses.replace(tiny, num_layers=4, router=RouterConfig(num_experts=8, top_k=2))
    model = init_random(config, dtype="float32", std=0.1)
    router = model.layers.moe.router
    router.w.set_value(router.w.get_value()[..., jnp.array([0, 0, 0, 3, 3, 3, 6, 6])])
    host = Host(config.num_layers * devices)
    add = disturbed(host)

    class Disturbed(Linear):
        def __call__(self, x: Any, out_dtype: Any = None) -> Any:
            return add(super().__call__(x, out_dtype))

    router.__class__ = Disturbed
    if devices > 1:
        model = place(model, make_mesh(fsdp=devices, devices=jax.devices()[:devices]))
    structure, params, frozen = split_params(model)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, config.vocab_size, (1, ROWS, LENGTH), dtype=np.int32)
    batch = {"tokens_BT": tokens, "segment_ids_BT": np.ones_like(tokens), "loss_mask_BT": np.ones(tokens.shape, bool)}
    losses = RouterTraining(aux_loss_coef=0.1, z_loss_coef=0.1)
    gradient = jax.jit(make_gradient(structure, losses, mode))  # pyright: ignore[reportArgumentType]

    def gradients(noise: float) -> dict[str, Any]:
        host.start(noise)
        return {name: np.asarray(value) for name, value in gradient(params, frozen, batch)[0].items()}

    return gradients, host


def change(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Relative norm of the difference, of all gradients as one vector."""
    import numpy as np

    def norm(values: Any) -> float:
        return float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in values)))

    return norm(ours[name] - theirs[name] for name in theirs) / norm(theirs.values())


def compare(mode: str, devices: int = 1) -> dict[str, Any]:
    """One mode: calls and flips of its recomputation, and the change of the gradients."""
    gradients, host = step(mode, devices)
    still, moved = gradients(0.0), gradients(NOISE)
    return {
        "flips_injected": host.flips,
        "recomputations": host.calls - host.forward_calls,
        "gradient_change": change(moved, still),
    }


def unprotected(mode: str, devices: int = 1) -> float:
    """The change of the gradients without saved routes."""
    with without_kept_routes():
        gradients, _ = step(mode, devices)
        still, moved = gradients(0.0), gradients(NOISE)
    return change(moved, still)


def measure(devices: int = 1) -> dict[str, Any]:
    """The document that is printed."""
    rows = {mode: compare(mode, devices) for mode in MODES}
    by_column = {column: {mode: row[column] for mode, row in rows.items()} for column in rows["none"]}
    without = {mode: unprotected(mode, devices) for mode in MODES if mode != "none"}
    return {"modes": list(MODES), "devices": devices, "noise": NOISE, **by_column, "unprotected": without}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=positive, default=1, help="CPU devices of a mesh")
    parser.add_argument("--json", action="store_true", help="print exactly one JSON document")
    options = parser.parse_args()
    if options.devices > 1:
        count = f"--xla_force_host_platform_device_count={options.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
    found = measure(options.devices)
    if options.json:
        print(json.dumps(found))
        return
    for mode in found["modes"]:
        print(
            f"{mode:8} {found['recomputations'][mode]:3} recomputations, {found['flips_injected'][mode]:5} flips, "
            f"gradients change by {found['gradient_change'][mode]:.1e}"
            + (f" (unprotected {found['unprotected'][mode]:.1e})" if mode in found["unprotected"] else "")
        )


if __name__ == "__main__":
    from bimedix_jax import startup

    startup.prepare()
    run_script(main)
