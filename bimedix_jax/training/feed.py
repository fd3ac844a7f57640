"""Reads the rows of a step and puts them on the devices. Each process reads only the rows of its own devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bimedix_jax.experiment import BatchConfig, Experiment
from bimedix_jax.sharding.layout import Layout
from bimedix_jax.sharding.rules import BATCH_AXES
from bimedix_jax.training.rows import NumpyBatch, Rows, micro_batches

KINDS = {"tokens_BT": jnp.int32, "segment_ids_BT": jnp.int32, "loss_mask_BT": jnp.bool_}


def batch_kinds(groups: bool) -> dict[str, Any]:
    """Name and dtype of each array of a batch; with `groups` it has the group of each token."""
    return KINDS | ({"group_BT": jnp.int32} if groups else {})


@dataclasses.dataclass(frozen=True)
class Feed:
    """The rows of a run, and how they are sharded.

    Attributes:
      layout: of the model on a mesh; None on one device.
    """

    rows: Rows
    batch: BatchConfig
    length: int
    layout: Layout | None

    @classmethod
    def of(cls, experiment: Experiment, rows: Rows, layout: Layout | None) -> "Feed":
        return cls(rows, experiment.batch, experiment.data.sequence_length, layout)

    def sharding(self, *lead: None) -> NamedSharding | None:
        """The sharding of rows, with these axes before the axis of rows."""
        return None if self.layout is None else NamedSharding(self.layout.mesh, P(*lead, BATCH_AXES))

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a step's batch, [A, B, T], for the compiler."""
        shape = (self.batch.accumulation, self.batch.rows, self.length)
        kinds = batch_kinds(bool(self.rows.groups.pairs)).items()
        return {name: jax.ShapeDtypeStruct(shape, kind, sharding=self.sharding(None)) for name, kind in kinds}

    def own_rows(self) -> np.ndarray:
        """Indices of the rows of a micro-batch on the devices of this process, ascending."""
        sharding = self.sharding()
        if sharding is None:
            return np.arange(self.batch.rows)
        indices = sharding.addressable_devices_indices_map((self.batch.rows, self.length)).values()
        return np.unique(np.concatenate([np.arange(self.batch.rows)[index[0]] for index in indices if index]))

    def read(self, step: int) -> NumpyBatch:
        """Reads this process's rows of all micro-batches of a step, [A * own rows, T]."""
        starts = np.arange(self.batch.accumulation) * self.batch.rows
        return self.rows.batch(step, (starts[:, None] + self.own_rows()[None]).reshape(-1))

    def to_devices(self, batch: NumpyBatch) -> dict[str, jax.Array]:
        """The result of `read` as sharded arrays, [A, B, T]."""
        parts, sharding = micro_batches(batch, self.batch.accumulation), self.sharding(None)
        if sharding is None:
            return jax.tree.map(jnp.asarray, parts)
        position = {row: number for number, row in enumerate(self.own_rows().tolist())}

        def own(x: np.ndarray, index: Any) -> np.ndarray:
            return x[:, [position[row] for row in range(self.batch.rows)[index[1]]]]

        return {
            name: jax.make_array_from_callback(
                (self.batch.accumulation, self.batch.rows, self.length), sharding, lambda index, x=x: own(x, index)
            )
            for name, x in parts.items()
        }

    def whole_to_devices(self, batch: NumpyBatch) -> dict[str, jax.Array]:
        """Rows [B, T] that every process has read completely, as sharded arrays."""
        sharding = self.sharding()
        if sharding is None:
            return jax.tree.map(jnp.asarray, batch)
        return {
            name: jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index])
            for name, x in batch.items()
        }
