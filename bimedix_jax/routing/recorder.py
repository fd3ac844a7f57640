"""Records the routes of a model on data: batch by batch, part by part, so that a killed recording can resume.

record_routes(model, Data.open("sample", tokenizer, None), Path("R"), RecordSettings(gate=True))
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from bimedix_jax import __version__, distributed
from bimedix_jax.data.roles import ROLES
from bimedix_jax.data.vocabulary import require_ids
from bimedix_jax.errors import BimedixError
from bimedix_jax.inference.generate import generate
from bimedix_jax.inference.padding import bucket, packed, packed_places
from bimedix_jax.inference.planning import Planned, Planner, Tokens
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import RoutingPlan
from bimedix_jax.routing.chance import number_of
from bimedix_jax.routing.interventions import Interventions, Seen
from bimedix_jax.routing.parts import COLUMNS, PartLayout, Routes, needs_wide, write_part
from bimedix_jax.routing.random_routers import CALIBRATION_TOKENS, random_routers
from bimedix_jax.routing.recorded import APART
from bimedix_jax.routing.recorded_data import Data, Item
from bimedix_jax.routing.recording import LayerName, Manifest
from bimedix_jax.routing.recording_writer import completed_parts, finish, in_parts, unfinished
from bimedix_jax.routing.watch import Kept, Watch, nll_step, record_step, states_step, taken_from

CALIBRATION_RECORDS = 128
"""Records from which the calibration of random routers takes its tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordSettings:
    """What is recorded.

    Attributes:
      record: "choices" leaves margins and entropies out.
      norms, gate: the norms of the experts' outputs, and the NLL under shuffled routes.
      random_routers: their number.
      exact: real numbers as float32.
      rules: interventions.
      new_tokens: answers of at most this many tokens, generated without sampling, take the place of the data's.
      max_length: longest record in tokens, by default the model's context; longer ones are listed and not recorded.
      batch_tokens: tokens run at a time; it affects speed, memory and rounding only.
    """

    record: Literal["choices", "full"] = "full"
    norms: bool = False
    gate: bool = False
    random_routers: int = 0
    exact: bool = False
    rules: Interventions | None = None
    new_tokens: int | None = None
    max_length: int | None = None
    batch_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gate and self.rules is not None:
            raise BimedixError("the gate shuffles the model's own routes; record it without interventions")
        if self.random_routers < 0:
            raise BimedixError(f"{self.random_routers} random routers are not possible; give 100 or more, or 0")

    def layout(self, model: Mixtral) -> PartLayout:
        """How the files store the recording."""
        wanted = {"nll", "experts", "weights", *(["margin", "entropy"] if self.record == "full" else [])}
        wanted |= {name for name, asked in self._optional().items() if asked}
        gaps = self.rules is not None
        return PartLayout(
            layers=model.config.num_layers,
            top_k=model.config.router.top_k,
            columns=tuple(name for name in COLUMNS if name in wanted),
            wide=needs_wide(model.config.router.num_experts, gaps),
            gaps=gaps,
            exact=self.exact,
            routers=self.random_routers,
        )

    def _optional(self) -> dict[str, bool]:
        return {"norms": self.norms, "shuffled_nll": self.gate, "done": self.rules is not None}

    def to_dict(self) -> dict[str, Any]:
        """The settings for the manifest."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "rules"]
        return {name: getattr(self, name) for name in names}


def record_routes(
    model: Mixtral,
    data: Data,
    out: Path,
    settings: RecordSettings,
    hashes: dict[str, str | None] | None = None,
    options: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Writes the recording of a model on data to a folder. Started again after a kill, it gives the same bytes.

    Args:
      hashes, options: what the manifest says of the model and of how the recording was made, besides the data.

    Raises:
      BimedixError: no record fits the model's context, a rule does not fit, or the folder cannot be written.
    """
    recorder = Recorder(model, data, settings)
    rules = None if settings.rules is None else settings.rules.digest()
    hashes = {**data.hashes, "interventions": rules, **(hashes or {})}
    options = settings.to_dict() | {"limit": data.limit} | (options or {})
    identity = json.dumps([__version__, hashes, options, jax.device_count()], sort_keys=True, default=str) + "\n"
    with ExitStack() as stack:
        folder: Path | None = None
        if distributed.is_process_zero():
            folder = stack.enter_context(unfinished(out, identity, overwrite))
        done = int(distributed.broadcast_token(str(0 if folder is None else completed_parts(folder)).zfill(9)))
        recorder.write(folder, done)
        facts = recorder.facts()
        config = model.config
        layers = [LayerName(number=n, path=f"model.layers.{n}.block_sparse_moe") for n in range(config.num_layers)]
        manifest: Manifest | None = None
        if folder is not None:
            manifest = finish(
                folder,
                layers=layers,
                experts=config.router.num_experts,
                layout=recorder.layout,
                hashes=hashes,
                options=options,
                **facts,
            )
    distributed.on_process_zero(lambda: None)  # the others wait until the folder has its name
    return (
        manifest if manifest is not None else Manifest.model_validate_json((out / "manifest.json").read_text("utf-8"))
    )


class Recorder:
    """Runs a model on data, a part of the recording at a time."""

    def __init__(self, model: Mixtral, data: Data, settings: RecordSettings):
        self.model, self.data, self.settings = model, data, settings
        self.layout = settings.layout(model)
        self.graph, self.state = nnx.split(model)
        context = model.config.max_position_embeddings
        self.longest = min(settings.max_length or context, context)
        self.too_long: list[str] = []
        self.floor: float | None = None
        self.operands: Any = None
        if settings.rules is not None:
            settings.rules.check(model.config)

    def write(self, folder: Path | None, done: int) -> None:
        """Writes the parts from number `done` on. The folder is None on processes that write nothing."""
        first = 0
        with tqdm(desc="recording", unit="record", delay=2, disable=None) as bar:
            parts = in_parts(self._fitting(), lambda item: len(item.ids), self.layout.layers)
            for number, part in enumerate(parts):
                if number == 0 and self.settings.gate:
                    self.floor = self._measured_floor(part)
                if number >= done:
                    if self.settings.random_routers and self.operands is None:
                        self.operands = self._random_routers()
                    found = self._recorded(self._with_answers(part))
                    self._write_part(folder, number, first, found)
                first += len(part)
                bar.update(len(part))
        if first == 0:
            raise BimedixError(
                f"there is no record of at most {self.longest} tokens; give others or a longer --max-length"
            )

    def _write_part(self, folder: Path | None, number: int, first: int, found: Sequence[Routes]) -> None:
        def write() -> None:
            assert folder is not None  # process 0 has one
            write_part(folder, number, first, self.layout, found)

        distributed.on_process_zero(write)

    def facts(self) -> dict[str, Any]:
        """Fields of the manifest that are known at the end."""
        rules = self.settings.rules
        return {
            "too_long": tuple(self.too_long),
            "interventions": () if rules is None else tuple(rules.names),
            "nll_floor": self.floor,
        }

    def in_memory(self, shuffled: bool = True) -> list[Routes]:
        """The routes of all records that fit, and the floor of the gate as `self.floor`; nothing is written.

        `shuffled`: with the NLL under shuffled routes.
        """
        items = list(self._fitting())
        if not items:
            raise BimedixError(f"there is no record of at most {self.longest} tokens; give others")
        if shuffled:
            self.floor = self._measured_floor(items)
        return self._recorded(items, shuffled)

    def _fitting(self) -> Iterator[Item]:
        for item in self.data.items(with_prompts=self.settings.new_tokens is not None):
            if len(item.ids if item.prompt is None else item.prompt) + (self.settings.new_tokens or 0) > self.longest:
                self.too_long.append(item.source.id)
            elif len(item.ids):
                yield item

    def _with_answers(self, part: Sequence[Item]) -> Sequence[Item]:
        """The part with the model's own answers, if they are asked for."""
        if self.settings.new_tokens is None:
            return part
        assert self.data.tokenizer is not None  # the data have prompts
        prompts = [item.prompt for item in part if item.prompt is not None]
        answers: list[list[int]] = []
        for start in range(0, len(prompts), 16):
            answers += generate(
                self.model,
                prompts[start : start + 16],
                self.settings.new_tokens,
                stop_tokens=self.data.tokenizer.stop_ids,
            )
        found = []
        for item, prompt, answer in zip(part, prompts, answers, strict=True):
            roles = np.full(len(prompt) + len(answer), ROLES.index("answer"), np.uint8)
            own = item.source.roles
            if own is not None:
                roles[: len(prompt)] = own[: len(prompt)]
            ids = np.concatenate([prompt, np.array(answer, np.int32)])
            found.append(dataclasses.replace(item, ids=ids, source=dataclasses.replace(item.source, roles=roles)))
        return found

    def _recorded(self, part: Sequence[Item], shuffled: bool = True) -> list[Routes]:
        """The routes of a part's records, in their order; `shuffled`: with the gate, if the settings ask for it."""
        rows, lengths = [item.ids for item in part], [len(item.ids) for item in part]
        require_ids(rows, self.model.config.vocab_size)
        sources = [item.source for item in part]
        planner = None if self.settings.rules is None else self.settings.rules.planner(self.model.config, sources)
        batches = list(packed(rows, self.settings.batch_tokens, self.longest))
        most = max(np.bincount([line for _, line, _ in places]).max() for places, _, _ in batches)
        slots = bucket(int(most), smallest=1) if self.settings.random_routers else 0
        found: dict[int, Routes] = {}
        waiting: list[tuple[Any, ...]] = []
        for places, tokens_BT, ids_BT in batches:
            items_BT, positions_BT = packed_places(tokens_BT.shape, places, lengths)
            tokens = Tokens(tokens_BT, items_BT, np.where(ids_BT != 0, positions_BT, -1))
            group_BT = self._groups(part, places, tokens_BT.shape)
            planned = self._planned(planner, tokens, ids_BT)
            values = self._step(tokens, ids_BT, group_BT, planned.plan, slots, sources if shuffled else None)
            waiting.append((places, values, planned.done_BT))
            if len(waiting) > 1:  # one batch runs while the one before is cut up
                found |= self._cut(part, *waiting.pop(0))
        for batch in waiting:
            found |= self._cut(part, *batch)
        return [found[number] for number in range(len(part))]

    def _groups(
        self, part: Sequence[Item], places: Sequence[tuple[int, int, int]], shape: tuple[int, ...]
    ) -> np.ndarray:
        """int32 [B, T]: which record of its row a token belongs to, -1 where analyses leave it out."""
        group_BT = np.full(shape, -1, np.int32)
        apart = [ROLES.index(name) for name in APART]
        slots: dict[int, int] = {}
        for index, line, start in places:
            slot = slots[line] = slots.get(line, -1) + 1
            roles = part[index].source.roles
            counts = np.ones(len(part[index].ids), bool) if roles is None else ~np.isin(roles, apart)
            group_BT[line, start : start + len(counts)] = np.where(counts, slot, -1)
        return group_BT

    def _planned(self, planner: Planner | None, tokens: Tokens, ids_BT: np.ndarray) -> Planned:
        if planner is None:
            return Planned(RoutingPlan(), np.zeros(0, np.uint32))
        routes = {
            name: _choices(*nnx.split(reference), tokens.tokens_BT, ids_BT, planner.free)
            for name, reference in planner.references(self.model).items()
        }
        return planner.plan(tokens, routes)

    def _step(
        self, tokens: Tokens, ids_BT: np.ndarray, group_BT: np.ndarray, plan: RoutingPlan, slots: int, sources: Any
    ) -> dict[str, Any]:
        """The values of a batch. `sources` are those of the records, or None to leave the shuffled routes out."""
        kept, operands = self._kept(slots), self.operands if slots else None
        values = record_step(self.graph, self.state, tokens.tokens_BT, ids_BT, group_BT, plan, operands, kept)
        routes = values.pop("routes", None)
        if routes is not None and sources is not None:
            others_BT = shuffled_places(tokens, ids_BT, sources, self.settings.seed)
            shuffled = taken_from(routes, others_BT)
            values["shuffled_nll"] = nll_step(self.graph, self.state, tokens.tokens_BT, ids_BT, shuffled)
        return values

    def _kept(self, slots: int) -> Kept:
        watch = Watch(scores=self.settings.record == "full", norms=self.settings.norms, slots=slots)
        return Kept(self.layout, watch, self.settings.gate)

    def _cut(
        self, part: Sequence[Item], places: Sequence[tuple[int, int, int]], values: dict[str, Any], done_BT: np.ndarray
    ) -> dict[int, Routes]:
        """The routes of the records of a batch."""
        arrays = {name: distributed.on_host(value) for name, value in values.items()}
        if "done" in self.layout.columns:
            arrays["done"] = done_BT
        random = arrays.pop("random", None)
        found, slots = {}, dict[int, int]()
        for index, line, start in places:
            item, slot = part[index], slots.get(line, 0)
            slots[line] = slot + 1
            columns = {name: x[line, start : start + len(item.ids)].copy() for name, x in arrays.items()}
            for name in ("nll", "shuffled_nll"):
                if name in columns:
                    columns[name][0] = np.nan
            found[index] = Routes(
                id=item.source.id,
                ids_N=item.ids,
                columns=columns,
                about=item.about,
                roles_N=item.source.roles,
                random_RLE=None if random is None else random[line, slot].swapaxes(0, 1),
            )
        return found

    def _random_routers(self) -> tuple[jax.Array, jax.Array]:
        """Weights and biases of the random routers, fitted on tokens from the whole of the data."""
        items = [item for item in self.data.spread(CALIBRATION_RECORDS) if 0 < len(item.ids) <= self.longest]
        states, experts, tokens = [], [], 0
        for places, tokens_BT, ids_BT in packed([item.ids for item in items], self.settings.batch_tokens, self.longest):
            group_BT = self._groups(items, places, tokens_BT.shape)
            states_LBTD, experts_LBTK = states_step(self.graph, self.state, tokens_BT, ids_BT)
            rows_N = np.flatnonzero(group_BT >= 0)
            flat = [distributed.on_host(x) for x in (states_LBTD, experts_LBTK)]
            states_LND, experts_LNK = (x.reshape(len(x), -1, x.shape[-1])[:, rows_N] for x in flat)
            stride = max(len(rows_N) * len(items) // (CALIBRATION_TOKENS * max(len(places), 1)), 1)
            states.append(states_LND[:, ::stride])
            experts.append(experts_LNK[:, ::stride])
            tokens += states[-1].shape[1]
        if not tokens:
            raise BimedixError(
                "random routers need tokens besides the template and first positions; give longer records"
            )
        chosen = np.concatenate(states, 1)[:, :CALIBRATION_TOKENS]
        own = np.concatenate(experts, 1)[:, :CALIBRATION_TOKENS]
        return random_routers(self.model, chosen, own, self.settings.random_routers, self.settings.seed)

    def _measured_floor(self, part: Sequence[Item]) -> float:
        """Largest difference of a record's mean NLL between its own routes and the same routes forced by a plan."""
        rows, kept, largest = [item.ids for item in part], self._kept(slots=0), 0.0
        # the first batch only, in the shape that the recording uses
        places, tokens_BT, ids_BT = next(packed(rows, self.settings.batch_tokens, self.longest))
        group_BT = self._groups(part, places, tokens_BT.shape)
        values = record_step(self.graph, self.state, tokens_BT, ids_BT, group_BT, RoutingPlan(), None, kept)
        same_BT = np.arange(tokens_BT.size, dtype=np.int32).reshape(tokens_BT.shape)
        forced = nll_step(self.graph, self.state, tokens_BT, ids_BT, taken_from(values["routes"], same_BT))
        difference_BT = distributed.on_host(forced) - distributed.on_host(values["nll"])
        for index, line, start in places:
            own = difference_BT[line, start + 1 : start + len(rows[index])]
            largest = max(largest, abs(float(own.mean())) if own.size else 0.0)
        return largest


def shuffled_places(tokens: Tokens, ids_BT: np.ndarray, sources: Any, seed: int) -> np.ndarray:
    """int32 [B, T]: the place in the flat batch of another token of the same record; its own where there is none."""
    own_BT = np.arange(ids_BT.size).reshape(ids_BT.shape)
    numbers = np.array([number_of(source.id) for source in sources], np.uint64)
    others_BT = Seen(tokens, tuple(sources), numbers).others(ids_BT != 0, seed)
    return np.where(others_BT < 0, own_BT, others_BT).astype(np.int32)


@functools.partial(jax.jit, static_argnames="graph")
def _choices(graph: nnx.GraphDef, state: nnx.State, tokens_BT: Any, ids_BT: Any, plan: RoutingPlan) -> Any:
    return nnx.merge(graph, state).hidden(tokens_BT, ids_BT, plan, record="choices").routing
