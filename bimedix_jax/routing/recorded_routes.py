"""The routes of a recording by record and position, for the rule `freeze` with `recording`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bimedix_jax import files
from bimedix_jax.errors import BimedixError
from bimedix_jax.routing.recording import MANIFEST, Recording


class RecordedRoutes:
    """All routes of a recording, in memory.

    Raises:
      BimedixError: there is no complete recording of single tokens, it lacks weights, or slots without an expert.
    """

    def __init__(self, folder: str | Path):
        self.recording = Recording.open(folder)
        self.digest = files.sha256(Path(folder) / MANIFEST)
        manifest = self.recording.manifest
        found = self.recording.tokens("id", "experts", "weights")
        self.ids_N, self.experts_NLK, self.weights_NLK = found["id"], found["experts"], found["weights"]
        if (self.experts_NLK < 0).any():
            raise BimedixError(
                f"{folder} has tokens without all k experts, whose routes cannot be forced; record others"
            )
        ends = np.cumsum(self.recording.records["tokens"])
        starts = ends - self.recording.records["tokens"]
        names = self.recording.records["id"]
        self.span = {name: (int(start), int(end)) for name, start, end in zip(names, starts, ends, strict=True)}
        self.shape = (len(manifest.layers), manifest.experts, manifest.top_k)

    def problem(self, layers: int, experts: int, top_k: int) -> str | None:
        """What does not fit a model; None if all does."""
        numbers = self.recording.layer_numbers
        if numbers == list(range(layers)) and self.shape == (layers, experts, top_k):
            return None
        found = f"{self.shape[0]} layers, {self.shape[1]} experts and k = {self.shape[2]}"
        return (
            f"names the recording {self.recording.folder} with {found}, but this model has {layers}, {experts} and "
            f"{top_k}; record its base model"
        )

    def at(
        self,
        names: Sequence[str],
        items_BT: np.ndarray,
        positions_BT: np.ndarray,
        tokens_BT: np.ndarray,
        mask_BT: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Experts and weights [L, B, T, K] of the tokens of the mask; others have any.

        Args:
          names: the id of each record. items_BT, positions_BT: record and position of each token.

        Raises:
          BimedixError: the recording lacks a record or a position, or has another token there.
        """
        place_BT = np.zeros(mask_BT.shape, np.int64)
        for item in np.unique(items_BT[mask_BT]):
            own_BT = mask_BT & (items_BT == item)
            place_BT[own_BT] = self._places(names[int(item)], positions_BT[own_BT], tokens_BT[own_BT])
        experts_BTLK, weights_BTLK = self.experts_NLK[place_BT], self.weights_NLK[place_BT].astype(np.float32)
        return np.moveaxis(experts_BTLK, 2, 0), np.moveaxis(weights_BTLK, 2, 0)

    def _places(self, name: str, position_X: np.ndarray, token_X: np.ndarray) -> np.ndarray:
        if name not in self.span:
            raise BimedixError(f"freeze: {self.recording.folder} has no record {name!r}; record the same data")
        start, end = self.span[name]
        place_X = start + position_X.astype(np.int64)
        known_X = (place_X < end) & (self.ids_N[np.minimum(place_X, end - 1)] == token_X)
        if not known_X.all():
            position = int(position_X[~known_X][0])
            raise BimedixError(
                f"freeze: record {name!r} has another token at position {position} than in {self.recording.folder}; "
                "record the same data with the same tokenizer and template, or leave such tokens out with `where`"
            )
        return place_X
