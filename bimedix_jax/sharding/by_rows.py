"""Packed weights of a model stored by rows (kernels/nf4/rows.py), as the TPU kernels read them, and back.

All values keep their bits. A matrix of all layers is converted at a time, and the memory of its earlier form is freed.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.rows import RowMajor, has_rows
from bimedix_jax.models import shards
from bimedix_jax.models.linear import ExpertLinear, Linear
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.sharding.layout import Layout, Place, place_packed

LAYERS = "layers"
"""Path of the stacked layers in the model."""


def store_for_training(model: Mixtral) -> None:
    """Stores the frozen base, in place, as this platform trains fastest."""
    if backends.platform() == "tpu":
        store_by_rows(model)


def store_by_rows(model: Mixtral) -> None:
    """Stores the packed weights of the layers by rows, in place; not those that `has_rows` rejects, and not those that
    the devices of the mesh could then not divide."""
    for path, layer in packed_layers(model):
        w = layer.w.get_value()
        if isinstance(w, NF4Tensor) and has_rows(w) and stays_divided(model, path, w):
            layer.w.set_value(converted(model, path, w, RowMajor.of))


def store_as_loaded(model: Mixtral) -> None:
    """Inverse of `store_by_rows`."""
    for path, layer in packed_layers(model):
        w = layer.w.get_value()
        if isinstance(w, RowMajor):
            layer.w.set_value(converted(model, path, w, RowMajor.tensor))


def packed_layers(model: Mixtral) -> Iterator[tuple[str, Linear | ExpertLinear]]:
    """(dotted path of the weight in the model, layer) of every linear layer that is stacked over layers."""
    for path, layer in nnx.iter_modules(model.layers):
        if isinstance(layer, Linear | ExpertLinear):
            yield shards.dotted(LAYERS, (*path, "w")), layer


def stays_divided(model: Mixtral, path: str, w: NF4Tensor) -> bool:
    """Whether devices that each store a part of the weight would also store only a part of its form by rows."""
    if model.placement is None:
        return True
    before, after = layout_of(model).places, place_of(model, path, jax.eval_shape(RowMajor.of, w))
    return is_gathered(after) or not is_gathered(dict(before)[path])


def is_gathered(place: Place) -> bool:
    return place.storage is not None and any(place.storage.gathers)


def converted(model: Mixtral, path: str, w: Any, convert: Callable[[Any], Any]) -> Any:
    """`convert(w)`, sharded like w, which the layout of the model records. Shapes with shardings give the same."""
    shapes, shardings = jax.eval_shape(convert, w), None
    if model.placement is not None:
        layout, own = layout_of(model), place_of(model, path, shapes)
        places = tuple((name, own if name == path else place) for name, place in layout.places)
        model.placement = dataclasses.replace(layout, places=places)
        shardings = layout.shardings(jax.tree.unflatten(jax.tree.structure(shapes), own.specs))
    first = jax.tree.leaves(w)[0]
    if not isinstance(first, jax.ShapeDtypeStruct):
        return jax.jit(convert, out_shardings=shardings)(w)
    shardings = jax.tree.map(lambda _: first.sharding, shapes) if shardings is None else shardings
    return jax.tree.map(lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), shapes, shardings)


def place_of(model: Mixtral, path: str, w: NF4Tensor | RowMajor) -> Place:
    """How a weight of the layout is sharded in another form."""
    layout = layout_of(model)
    storage = dict(layout.places)[path].storage
    return place_packed(w, storage is not None and storage.units, layout.mesh)


def layout_of(model: Mixtral) -> Layout:
    layout: Any = model.placement
    return layout
