"""What is refused in others' recordings of routes, by name: each message says what was found and what to do."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from bimedix_jax.errors import BimedixError
from bimedix_jax.routing.parts import Routes
from bimedix_jax.routing.recording import LayerName

MOST_EXPERTS = 0xFFFF
FEWEST_CHOICES = 64
"""Choices from which on a number of an expert that is far above all others counts as wrong, unless E is told.

If E were larger than the highest number, at most one in 2^64 recordings would have all other choices in the lower half.
"""
FEWEST_TOKENS = 8
"""Tokens from which on a layer that sends all of them to the same experts counts as constant."""
ROUNDING = 2.0**-7
"""Relative spacing of bfloat16: scores that are closer to each other may be in either order after rounding."""
LEAST_NLL = -1e-3
"""A loss below 0 by more than the rounding of a float32 softmax is not that of a probability."""
MOST_REAL = 65504.0
"""Largest number of float16, in which weights, margins and entropies are stored."""
_LAYER_OF_PATH = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)(?:\.|$)")


@dataclasses.dataclass
class Checks:
    """Checks the records of a recording one after the other, and what only the whole of it shows at the end.

    Attributes:
      experts: number of experts, None if not known. keep_constant: accept constant layers.
    """

    experts: int | None = None
    keep_constant: bool = False

    def __post_init__(self) -> None:
        self.ids: set[str] = set()
        self.shape: tuple[int, int] | None = None
        self.columns: tuple[str, ...] = ()
        self.chosen = np.zeros(MOST_EXPERTS, bool)
        self.choices = 0
        self.tokens = 0
        self.first_set_LK: np.ndarray | None = None
        self.constant_L = np.zeros(0, bool)

    def add(self, routes: Routes, where: str) -> None:
        """Checks a record.

        Raises:
          BimedixError: it does not fit those before it, or has values that routes cannot have.
        """
        if routes.id in self.ids:
            raise BimedixError(
                f"{where} is a duplicate: another record has the id {routes.id!r}; give each its own id, "
                "and files whose records have none different names"
            )
        self.ids.add(routes.id)
        experts_NLK = routes.columns["experts"]
        if len(routes.ids_N) == 0:
            raise BimedixError(f"{where} has no tokens; leave it out")
        shape = (experts_NLK.shape[1], experts_NLK.shape[2])
        columns = tuple(sorted(routes.columns))
        if self.shape is None:
            self.shape, self.columns = shape, columns
        if 0 in shape:
            raise BimedixError(
                f"{where} has {shape[0]} layers of {shape[1]} experts a token; give at least one of each"
            )
        if shape != self.shape:
            raise BimedixError(
                f"{where} has {shape[0]} layers of {shape[1]} experts a token, but the records before it have "
                f"{self.shape[0]} of {self.shape[1]}; import the recordings of each model alone"
            )
        if columns != self.columns:
            odd = sorted(set(columns) ^ set(self.columns))
            raise BimedixError(
                f"{where} and the records before it do not have the same columns ({', '.join(odd)}); give all records "
                "the same ones"
            )
        if routes.experts is not None and self.experts not in (None, routes.experts):
            raise BimedixError(
                f"{where} has logits of {routes.experts} experts, but there are {self.experts}; correct it"
            )
        self.experts = self.experts if routes.experts is None else routes.experts
        self._check_experts(experts_NLK, where)
        for name in sorted({"weights", "margin", "entropy"} & routes.columns.keys()):
            require_finite(routes.columns[name], name, where)
        _check_weights_and_losses(routes.columns, where)
        self._watch(experts_NLK)

    def _check_experts(self, experts_NLK: np.ndarray, where: str) -> None:
        ordered = np.sort(experts_NLK, axis=-1)
        twice_NL = (ordered[..., 1:] == ordered[..., :-1]).any(-1) if ordered.shape[-1] > 1 else np.zeros(0, bool)
        if twice_NL.any():
            token, layer = np.argwhere(twice_NL)[0]
            if (experts_NLK[:, layer] == experts_NLK[0, layer]).all():
                raise constant(where, int(layer), experts_NLK[0, layer].tolist(), len(experts_NLK), twice=True)
            raise BimedixError(
                f"{where} has duplicate experts: token {token} chooses {experts_NLK[token, layer].tolist()} in layer "
                f"{layer}; a token chooses an expert at most once, so check the order of the axes"
            )
        low, high = int(experts_NLK.min()), int(experts_NLK.max())
        most = MOST_EXPERTS if self.experts is None else self.experts
        if low < 0 or high >= most:
            wrong = low if low < 0 else high
            raise BimedixError(
                f"{where} has an expert out of range: {wrong}, but experts are numbered from 0 to {most - 1}; correct "
                "the file or --experts"
            )
        self.chosen[experts_NLK.reshape(-1)] = True
        self.choices += experts_NLK.size

    def _watch(self, experts_NLK: np.ndarray) -> None:
        sets_NLK = np.sort(experts_NLK, axis=-1)
        if self.first_set_LK is None:
            self.first_set_LK, self.constant_L = sets_NLK[0], np.ones(sets_NLK.shape[1], bool)
        self.tokens += len(sets_NLK)
        if self.constant_L.any():
            self.constant_L &= (sets_NLK == self.first_set_LK).all(axis=(0, 2))

    def finish(self, layers: Sequence[LayerName], where: str) -> int:
        """The number of experts.

        Raises:
          BimedixError: a layer is constant.
        """
        assert self.shape is not None  # there is at least one record
        assert self.first_set_LK is not None
        experts = self._count(where) if self.experts is None else self.experts
        found = np.flatnonzero(self.constant_L)
        if len(found) and self.tokens >= FEWEST_TOKENS and experts > self.shape[1] and not self.keep_constant:
            number = layers[found[0]].number
            raise constant(where, number, self.first_set_LK[found[0]].tolist(), self.tokens)
        return experts

    def _count(self, where: str) -> int:
        """The number of experts, from the highest number."""
        numbers = np.flatnonzero(self.chosen).tolist()
        highest, second = numbers[-1], ([-1, *numbers])[-2]
        if self.choices >= FEWEST_CHOICES and second > 0 and highest >= 2 * (second + 1):
            raise BimedixError(
                f"{where} has an expert out of range: {highest}, while all others are below {second + 1}; correct "
                "it, or give --experts if the model has so many"
            )
        return highest + 1


def _check_weights_and_losses(columns: Mapping[str, np.ndarray], where: str) -> None:
    """Raises BimedixError for values that no router and no model give. Weights need not sum to 1."""
    if "weights" in columns and columns["weights"].min() < 0:
        raise BimedixError(
            f"{where} has a negative weight: {columns['weights'].min():g}; a router's weights are at least 0, so "
            "give the weights of the experts, not their logits"
        )
    for name in sorted({"nll", "shuffled_nll"} & columns.keys()):
        known = columns[name][~np.isnan(columns[name])]
        if np.isinf(known).any():
            raise BimedixError(f"{where} has an infinite {name}; write null where there is none, or correct it")
        if known.min(initial=0) < LEAST_NLL:
            raise BimedixError(
                f"{where} has a negative {name}: {known.min():g}; a negative log-likelihood in nats is at least 0, so "
                "check its sign"
            )


def require_finite(found: np.ndarray, what: str, where: str) -> None:
    """Raises BimedixError unless all are finite numbers that float16 can store."""
    if not np.isfinite(found).all():
        raise BimedixError(f"{where} has {what} that are not finite numbers; correct them")
    if found.size and np.abs(found).max() > MOST_REAL:
        raise BimedixError(
            f"{where} has {what} up to {np.abs(found).max():g}, but a recording stores them in float16, up to "
            f"{MOST_REAL:.0f}; correct them"
        )


def constant(where: str, layer: int, chosen: list[int], tokens: int, twice: bool = False) -> BimedixError:
    """The error for a layer that sends every token to the same experts; `twice`: to one of them twice."""
    collapsed = "" if twice else " (--keep-constant, if the router did collapse)"
    return BimedixError(
        f"{where}: layer {layer} is constant, all {tokens} tokens have the experts {chosen}; kernels that report no "
        "routes and dense layers appear like this, so record again with another kernel, or leave the layer out with "
        f"--layers{collapsed}"
    )


def layer_names(paths: Sequence[object], where: str) -> tuple[LayerName, ...]:
    """The layers of module paths such as model.layers.3.mlp.gate.

    Raises:
      BimedixError: a layer is given by its position instead of its path, or twice.
    """
    found = []
    for path in paths:
        match = _LAYER_OF_PATH.search(path) if isinstance(path, str) else None
        if match is None:
            raise BimedixError(
                f"{where} binds layers by position instead of path: {path!r} does not say which module of the model it "
                "is; give paths such as model.layers.3.mlp.gate"
            )
        found.append(LayerName(number=int(match[1]), path=str(path)))
    numbers = [layer.number for layer in found]
    twice = [number for number in numbers if numbers.count(number) > 1]
    if twice:
        raise BimedixError(f"{where} has duplicate layers: layer {twice[0]} is there twice; name each once")
    return tuple(found)


def integers(values: object, what: str, where: str) -> np.ndarray:
    """Nested lists of whole numbers as an int64 array.

    Raises:
      BimedixError: they are ragged, or something else.
    """
    found = _rectangular(values, what, where)
    if found.dtype.kind not in "iu" and found.size:
        raise BimedixError(f"{where} has {what} that are not whole numbers; correct them")
    return found.astype(np.int64)


def reals(values: object, what: str, where: str) -> np.ndarray:
    """Nested lists of numbers as a float64 array, NaN for null; errors as `integers`."""
    found = _rectangular(values, what, where)
    if found.dtype == object:
        try:
            found = found.astype(np.float64)  # None becomes NaN
        except (TypeError, ValueError):
            raise BimedixError(f"{where} has {what} that are not numbers; correct them") from None
    if found.dtype.kind not in "iuf":
        raise BimedixError(f"{where} has {what} that are not numbers; correct them")
    return found.astype(np.float64)


def _rectangular(values: object, what: str, where: str) -> np.ndarray:
    if _has_booleans(values):  # NumPy reads them as 0 and 1 where numbers are among them
        raise BimedixError(f"{where} has {what} with true or false among them; give numbers")
    try:
        return np.array(values)
    except (TypeError, ValueError, OverflowError):
        raise BimedixError(
            f"{where} has {what} in lists of unequal lengths; give every token the same number"
        ) from None


def _has_booleans(values: object) -> bool:
    level = [values]
    while level:
        kinds = set(map(type, level))
        if bool in kinds:
            return True
        level = list(itertools.chain.from_iterable(x for x in level if isinstance(x, list))) if list in kinds else []
    return False


def require_shape(found: np.ndarray, shape: Sequence[int | None], what: str, where: str) -> None:
    """Raises BimedixError unless an array has this shape; None is any size."""
    fits = len(shape) == found.ndim and all(
        wanted in (None, size) for wanted, size in zip(shape, found.shape, strict=True)
    )
    if not fits:
        wanted = " x ".join("any" if size is None else str(size) for size in shape)
        given = " x ".join(map(str, found.shape)) or "a single number"
        raise BimedixError(
            f"{where} has {what} of the shape {given}, but it needs {wanted}; check the order of the axes"
        )


def token_ids(values: object, where: str) -> np.ndarray:
    """Token ids as int64 [T]; errors for others."""
    ids_N = integers(values, "token ids", where)
    require_shape(ids_N, (None,), "token ids", where)
    if ids_N.size and (ids_N.min() < 0 or ids_N.max() > 2**31 - 1):
        raise BimedixError(f"{where} has a token id out of range: {ids_N.min() if ids_N.min() < 0 else ids_N.max()}")
    return ids_N
