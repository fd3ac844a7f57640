"""Bytes of HBM that a compiled decoding step reads, and those that it needs.

traffic.py has the rule for an instruction. A loop counts its trips, and a conditional its largest branch.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from bimedix_jax.costs.flops import EXPERTS
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.plan.hlo import SILENT, Computation, Program, trip_count_of
from bimedix_jax.plan.latency import cache_bytes
from bimedix_jax.plan.traffic import read


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one instruction reads.

    Attributes:
      operation: name of the JAX operation; empty if XLA added the instruction.
      bytes: of one execution.
      times: executions in a run of the program.
    """

    instruction: str
    opcode: str
    operation: str
    bytes: float
    times: int

    @property
    def total(self) -> float:
        return self.bytes * self.times


def readings(program: Program) -> list[Reading]:
    """What each instruction of the program reads on one device, those inside of loops once with their number of runs.

    Raises:
      BimedixError: the trip count of a loop depends on data, or a kernel of ours is not known.
    """
    return list(within(program, program.entry, 1))


def within(program: Program, computation: Computation, times: int) -> Iterator[Reading]:
    for instruction in computation.instructions.values():
        if instruction.opcode == "while":
            trips = trip_count_of(program, computation, instruction)
            yield from within(program, program.callee(instruction, "body"), times * trips)
        elif instruction.opcode == "conditional":
            branches = [list(within(program, program.computations[n], times)) for n in instruction.called.values()]
            yield from max(branches, key=total)
        elif instruction.opcode == "call":
            yield from within(program, program.callee(instruction, "to_apply"), times)
        elif instruction.opcode not in SILENT and not instruction.opcode.endswith("-done"):
            size = read(program, computation, instruction)
            if size:
                yield Reading(instruction.name, instruction.opcode, instruction.op_name, size, times)


def total(found: list[Reading]) -> float:
    return sum(reading.total for reading in found)


def needed(model: Mixtral, rows: int, tokens: int) -> dict[str, float]:
    """Bytes on each device that a decoding step of `rows` sequences must read: the experts that it uses, all other
    weights, and the keys and values of `tokens` tokens of each sequence.

    It uses as many experts as it can: top_k for each row, at most all. Of the embedding it uses a row for each token.

    Args:
      model: abstract, with shardings (plan.step.on_devices).
    """
    router, config = model.config.router, model.config
    share = min(router.num_experts, rows * router.top_k) / router.num_experts
    found = {"experts": 0.0, "other weights": 0.0}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        size = float(sum(map(local_bytes, jax.tree.leaves(variable.get_value()))))
        if "embed" in map(str, path) and model.lm_head is not None:
            size *= rows / config.vocab_size
        if set(EXPERTS) & set(map(str, path)):
            found["experts"] += size * share
        else:
            found["other weights"] += size
    placement: Any = model.placement
    parts = 1 if placement is None else placement.mesh.shape["tensor"]
    return found | {"cache": cache_bytes(config, rows * tokens) / parts}


def local_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
