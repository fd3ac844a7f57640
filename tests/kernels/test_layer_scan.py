"""The loop over layers: every backend gives the results of lax.scan, forward and backward."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.expert_mlp import LayerOf, out_of_stacks
from bimedix_jax.kernels.layer_scan import InPlace, bits, layer_scan
from bimedix_jax.kernels.layer_scan.api import BACKENDS
from bimedix_jax.kernels.nf4 import quantize
from bimedix_jax.kernels.nf4_matmul import matmul
from bimedix_jax.kernels.unstacked import stack, unstack

LAYERS, ROWS, WIDTH = 3, 5, 64
DTYPES = ["float32", "bfloat16", "float16"]
OTHERS = [name for name in BACKENDS if name != "scan"]
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02, "float16": 4e-3}


def draw(dtype: str) -> tuple[Any, jax.Array, dict[str, Any], Any]:
    """(constants, x, trained arrays, other arrays) with integers, PRNG keys and NF4 weights among the others."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(WIDTH), dtype)

    constants = (normal(WIDTH), jnp.arange(ROWS, dtype=jnp.int32), None)
    trained = {"weight": normal(LAYERS, WIDTH, WIDTH), "shift": normal(LAYERS, 4, WIDTH)}
    frozen = {
        "pick": jnp.asarray([2, 0, 3], jnp.int32),
        "key": jax.random.split(jax.random.key(7), LAYERS),
        "packed": quantize(normal(LAYERS, WIDTH, WIDTH), batch_dims=1),
        "nothing": None,
    }
    return constants, normal(ROWS, WIDTH), trained, frozen


def body(constants: Any, x: jax.Array, layer: Any, slot: Any) -> tuple[jax.Array, Any, Any]:
    shared, rows, _ = constants
    trained, frozen = layer
    product = checkpoint_name(x @ trained["weight"].astype(x.dtype), "product")
    y = jnp.tanh(product * (1 + shared)[None]) + trained["shift"][frozen["pick"]][None]
    y = y + matmul(x, frozen["packed"]) * np.linspace(0.5, 1, WIDTH, dtype=np.float32).astype(x.dtype)[None]
    y = y + (rows + jax.random.key_data(frozen["key"])[-1].astype(jnp.int32) % 8)[:, None].astype(y.dtype) / 8
    return y, {"mean": jnp.mean(y.astype(jnp.float32), axis=0), "state": y, "pick": frozen["pick"]}, slot


@functools.cache
def value_and_gradients(backend: str, kind: str, dtype: str) -> Any:
    constants, x, trained, frozen = draw(dtype)

    def loss(x: jax.Array, trained: Any) -> tuple[jax.Array, Any]:
        x, outs, memory = layer_scan(BODIES[kind], constants, x, (trained, frozen), backend=backend)
        assert memory is None
        total = jnp.sum(jnp.square(x.astype(jnp.float32))) + jnp.sum(jnp.square(outs["mean"]))
        return total + jnp.sum(outs["state"].astype(jnp.float32)), (x, outs)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, trained)


def assert_close(found: Any, expected: Any, dtype: str) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        one, other = (np.asarray(leaf, np.float32) for leaf in (one, other))
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE[dtype] * max(np.abs(other).max(), 1e-3))


KEEP_PRODUCTS = jax.checkpoint_policies.save_only_these_names("product")
BODIES = {
    "as it is": body,
    "recomputed": jax.checkpoint(body, prevent_cse=False),
    "products kept": jax.checkpoint(body, prevent_cse=False, policy=KEEP_PRODUCTS),
}


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", OTHERS)
def test_values_and_gradients_equal_those_of_a_scan(backend: str, dtype: str, kind: str) -> None:
    found, expected = (value_and_gradients(name, kind, dtype) for name in (backend, "scan"))
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(expected[1]))
    assert_close(found, expected, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constants_get_no_gradient(backend: str) -> None:
    constants, x, trained, frozen = draw("float32")

    def loss(shared: jax.Array) -> jax.Array:
        return jnp.sum(layer_scan(body, (shared, *constants[1:]), x, (trained, frozen), backend=backend)[0])

    assert not jnp.any(jax.grad(loss)(constants[0]))


def compiled_text(function: Any, *operands: jax.Array) -> str:
    return jax.jit(function).lower(*operands).compile().as_text() or ""


def test_residuals_of_unused_gradients_are_not_kept() -> None:
    """The gradient of a floating-point constant would need each layer's product; XLA removes both."""
    _, x, trained, _ = draw("float32")

    def layer(constants: Any, x: jax.Array, layer: Any, slot: Any) -> tuple[jax.Array, None, Any]:
        return (x @ layer) * constants[0], None, slot

    def loss(weight: jax.Array, shared: jax.Array) -> jax.Array:
        return jnp.sum(layer_scan(layer, (shared,), x, weight, backend="bits")[0])

    text = compiled_text(jax.grad(loss), trained["weight"], jnp.ones((ROWS, WIDTH)))
    loops = [line for line in text.splitlines() if " while(" in line]
    assert len(loops) == 2
    assert all(line.split(" while(")[0].count(f"f32[{LAYERS},{ROWS},{WIDTH}]") == 1 for line in loops), "x alone"


def residuals_of(body: Any, *operands: Any) -> list[tuple[tuple[int, ...], str]]:
    """(shape, dtype) of all residuals but the arguments of the forward rule."""
    _, (pulls, _, _) = jax.eval_shape(functools.partial(bits.forward, body, LAYERS), *operands)
    return [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(pulls)]


def test_weights_and_constants_are_not_stacked_again() -> None:
    constants, x, trained, frozen = draw("bfloat16")
    found = residuals_of(BODIES["recomputed"], constants, x, (trained, frozen))
    assert found == [((LAYERS, ROWS, WIDTH), "uint16")], "x alone"
    kept = residuals_of(BODIES["products kept"], constants, x, (trained, frozen))
    assert kept == 2 * found, "x and the named product"
    every = residuals_of(body, constants, x, (trained, frozen))
    assert every
    assert not any(WIDTH in shape[1:-1] for shape, _ in every), "no matrix"
    assert not any(shape[1:] == (WIDTH,) for shape, _ in every), "no constant vector"


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_keep_their_dtypes(backend: str) -> None:
    constants, x, trained, frozen = draw("bfloat16")
    last, outs, _ = layer_scan(body, constants, x, (trained, frozen), backend=backend)
    assert last.dtype == outs["state"].dtype == jnp.bfloat16
    assert outs["mean"].dtype == jnp.float32
    assert outs["state"].shape == (LAYERS, ROWS, WIDTH)
    np.testing.assert_array_equal(outs["pick"], frozen["pick"])


def test_no_stack_becomes_float32() -> None:
    """XLA:CPU would convert all weights before the loop, and all residuals at each layer."""
    constants, x, trained, frozen = draw("bfloat16")

    def loss(x: jax.Array, weight: jax.Array) -> jax.Array:
        layers = (trained | {"weight": weight}, frozen)
        return jnp.sum(jnp.square(layer_scan(body, constants, x, layers)[0].astype(jnp.float32)))

    text = compiled_text(jax.grad(loss, (0, 1)), x, trained["weight"])
    assert f"[{LAYERS},{WIDTH},{WIDTH}]" in text
    assert f"f32[{LAYERS},{WIDTH},{WIDTH}]" not in text
    assert f"f32[{LAYERS},{ROWS},{WIDTH}]" not in text


def remember(constants: Any, x: jax.Array, layer: Any, slot: Any) -> tuple[jax.Array, Any, Any]:
    """Adds the layer's memory to x, and writes x to one row of the memory."""
    row, kept = constants, slot["kept"]
    y = jnp.tanh(x @ layer) + kept[:ROWS]
    return y, jnp.sum(y), {"kept": jax.lax.dynamic_update_slice_in_dim(kept, y[:1], row, 0), "calls": slot["calls"] + 1}


def memories(form: str, dtype: str) -> Any:
    kept = jnp.asarray(np.random.default_rng(2).standard_normal((LAYERS, ROWS + 1, WIDTH)), dtype)
    memory = {"kept": kept, "calls": jnp.arange(LAYERS)}
    return memory if form == "stacked" else jax.tree.map(lambda leaf: unstack(leaf, 1), memory)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("backend", "weights", "form"),
    [
        ("bits", "stacked", "stacked"),
        ("unrolled", "stacked", "stacked"),
        ("unrolled", "stacked", "unstacked"),
        ("unrolled", "unstacked", "stacked"),
        ("unrolled", "unstacked", "unstacked"),
    ],
)
def test_memory_keeps_its_form(backend: str, weights: str, form: str, dtype: str) -> None:
    _, x, trained, _ = draw(dtype)
    weight = trained["weight"]
    expected = layer_scan(remember, jnp.int32(2), x, weight, memories("stacked", dtype), backend="scan")
    given = memories(form, dtype)
    layers = unstack(weight, 1) if weights == "unstacked" else weight
    scan_layers = jax.jit(functools.partial(layer_scan, remember, backend=backend))
    found = scan_layers(jnp.int32(2), x, layers, given)
    assert jax.tree.structure(found[2]) == jax.tree.structure(given)
    assert_close((*found[:2], stack(found[2])), expected, dtype)
    np.testing.assert_array_equal(expected[2]["calls"], 1 + np.arange(LAYERS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_x_is_differentiable_with_a_memory(backend: str) -> None:
    _, x, trained, _ = draw("float32")

    def loss(x: jax.Array, backend: str) -> jax.Array:
        memory = memories("stacked", "float32")
        return jnp.sum(layer_scan(remember, 2, x, trained["weight"], memory, backend=backend)[0])

    assert_close(jax.grad(loss)(x, backend), jax.grad(loss)(x, "scan"), "float32")


def test_unstacked_weights_train() -> None:
    constants, x, trained, frozen = draw("bfloat16")

    def loss(trained: Any) -> jax.Array:
        last, outs, _ = layer_scan(body, constants, x, (trained, frozen))
        return jnp.sum(jnp.square(last.astype(jnp.float32))) + jnp.sum(outs["state"].astype(jnp.float32))

    found = jax.grad(loss)(jax.tree.map(lambda leaf: unstack(leaf, 1), trained))
    assert_close(stack(found), jax.grad(loss)(trained), "bfloat16")


def experts(constants: Any, x: jax.Array, layer: Any, slot: Any) -> tuple[jax.Array, Any, Any]:
    w: Any = out_of_stacks((layer["w"],))[0]
    y = x @ w[1].astype(x.dtype) + layer["shift"][None]
    return y, jnp.asarray(isinstance(layer["w"], LayerOf)), slot


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_arrays_are_not_sliced_on_a_cpu_without_gradients(backend: str, dtype: str) -> None:
    rng = np.random.default_rng(3)
    w = jnp.asarray(rng.standard_normal((LAYERS, 2, WIDTH, WIDTH)) / 8, dtype)
    x, shift = draw(dtype)[1], draw(dtype)[2]["shift"][:, 0]

    def scan_layers(w: jax.Array, wrap: Any) -> tuple[jax.Array, jax.Array]:
        layers = {"w": wrap(w), "shift": shift}
        x_last, in_place, _ = layer_scan(experts, (), x, layers, backend=backend)
        return x_last, in_place

    expected, _ = scan_layers(w, lambda w: w)
    found, in_place = jax.jit(lambda w: scan_layers(w, InPlace))(w)
    assert_close(found, expected, dtype)
    assert np.all(in_place) == np.any(in_place) == (backend == "bits")
    found, pull, in_place = jax.vjp(lambda w: scan_layers(w, InPlace), w, has_aux=True)
    assert not np.any(in_place)
    _, plain, _ = jax.vjp(lambda w: scan_layers(w, lambda w: w), w, has_aux=True)
    assert_close(pull(jnp.cos(found)), plain(jnp.cos(found)), dtype)


def test_in_place_arrays_with_a_memory() -> None:
    w = jnp.asarray(np.random.default_rng(3).standard_normal((LAYERS, 2, WIDTH, WIDTH)) / 8, jnp.float32)
    x, layers = draw("float32")[1], {"w": InPlace(w), "shift": draw("float32")[2]["shift"][:, 0]}
    for backend in BACKENDS:
        _, in_place, memory = layer_scan(experts, (), x, layers, jnp.arange(LAYERS), backend=backend)
        assert np.all(in_place) == (backend == "bits")
        np.testing.assert_array_equal(memory, np.arange(LAYERS))


@pytest.mark.parametrize("recomputed", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_weights_in_place(backend: str, recomputed: bool) -> None:
    """Loops pass a reference to the stack. Values and gradients of x are those of slices, bit for bit."""
    packed = quantize(jnp.asarray(np.random.default_rng(4).standard_normal((LAYERS, WIDTH, WIDTH))), batch_dims=1)
    seen = []

    def layer(constants: Any, x: jax.Array, layer: Any, slot: Any) -> tuple[jax.Array, None, Any]:
        seen.append(isinstance(layer["w"], LayerOf))
        return jnp.tanh(x + matmul(x, layer["w"]) / 8 + layer["shift"][None]), None, slot

    body = jax.checkpoint(layer, prevent_cse=False) if recomputed else layer
    x, shift = draw("float32")[1], draw("float32")[2]["shift"][:, 0]

    @functools.partial(jax.jit, static_argnums=1)
    def loss(given: tuple[jax.Array, jax.Array], wrap: Any) -> Any:
        def total(x: jax.Array, shift: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(layer_scan(body, (), x, {"w": wrap(packed), "shift": shift}, backend=backend)[0]))

        return jax.value_and_grad(total, (0, 1))(*given)

    expected = loss((x, shift), lambda stack: stack)
    assert not any(seen)
    seen.clear()
    found = loss((x, shift), InPlace)
    assert not any(seen) if backend == "unrolled" else set(seen) == {True}
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_packed_weights_in_place_are_zeros(backend: str) -> None:
    packed = quantize(jnp.asarray(np.random.default_rng(4).standard_normal((LAYERS, WIDTH, WIDTH))), batch_dims=1)
    x, shift = draw("float32")[1], draw("float32")[2]["shift"][:, 0]

    def layer(constants: Any, x: jax.Array, layer: Any, slot: Any) -> tuple[jax.Array, None, Any]:
        return jnp.tanh(x + matmul(x, layer["w"]) / 8 + layer["shift"][None]), None, slot

    _, pull = jax.vjp(
        lambda layers: layer_scan(layer, (), x, layers, backend=backend)[0], {"w": InPlace(packed), "shift": shift}
    )
    (found,) = pull(jnp.ones_like(x))
    assert np.all(found["shift"] != 0)
    for leaf, gradient in zip(jax.tree.leaves(packed), jax.tree.leaves(found["w"]), strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.dtype == (leaf.dtype if leaf.dtype == jnp.float32 else jax.dtypes.float0)
        assert not np.any(gradient)


def picked(platform: str, layers: Any, memory: Any = None) -> list[str]:
    def scan_layers(x: jax.Array, layers: Any, memory: Any) -> Any:
        return layer_scan(lambda constants, x, layer, slot: (x, None, slot), (), x, layers, memory)

    with backends.use(platform), backends.recording() as record:
        jax.eval_shape(scan_layers, jnp.ones(2), layers, memory)
    return record.to_dict()["layer_scan"]


def test_default_backend_of_each_platform() -> None:
    stacked = jnp.ones((LAYERS, 2))
    assert picked("cpu", stacked) == ["bits"]
    assert picked("gpu", stacked) == picked("tpu", stacked) == ["scan"]
    for platform in ("cpu", "gpu", "tpu"):
        assert picked(platform, unstack(stacked, 1)) == picked(platform, stacked, unstack(stacked, 1)) == ["unrolled"]


def test_invalid_operands_raise() -> None:
    x, layers = jnp.ones((ROWS, WIDTH)), jnp.ones((LAYERS, WIDTH, WIDTH))

    def scan_layers(layers: Any, memory: Any = None, backend: str | None = None) -> Any:
        return layer_scan(lambda constants, x, layer, slot: (x, None, slot), (), x, layers, memory, backend=backend)

    for name in ("scan", "bits"):
        with pytest.raises(NotImplementedError, match=f"'{name}': it takes stacked arrays only"):
            scan_layers(unstack(layers, 1), backend=name)
        with pytest.raises(NotImplementedError, match=f"'{name}': it takes stacked arrays only"):
            scan_layers(layers, unstack(layers, 1), backend=name)
    with backends.use("gpu"), pytest.raises(NotImplementedError, match="it runs on CPUs only"):
        scan_layers(layers, backend="bits")
    with pytest.raises(ValueError, match=r"same number of layers .* got \[3, 4\]"):
        scan_layers((layers, jnp.ones(4)))
    with pytest.raises(ValueError, match=r"same number of layers .* got \[\]"):
        scan_layers(None)
    with pytest.raises(ValueError, match="Unknown layer_scan backend 'fastest'; choose one of bits, scan, unrolled"):
        scan_layers(layers, backend="fastest")
