"""Which documents of a corpus activate each unit most, and in which it matters most.

One streaming pass, every unit at once. ActMax and ActMin compare activations; RelMax and RelMin
(CRP's relevance maximisation; Achtibat et al. 2023, "From attribution maps to human-understandable
explanations through concept relevance propagation") compare relevance for a recorded target: the
documents in which a unit mattered, not merely fired. Deciles and random examples come from a sample
of documents that a hash decides, so that shards agree on it without talking.

The pass keeps no text: per block the extreme over a document's positions, merged into a running
top-k where the activations are; the host waits for a device once a block, to hear whether all of it
was finite. Memory does not grow with the corpus. A shard is the blocks `rank, rank + world, ...`;
its state is one file, written every minute, from which a killed scan goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from jaxtyping import Float32, Int16
from torch import Tensor

from lenslrp.analysis.common.storage import (
    Form,
    load_tensors,
    require_forms,
    require_numbers,
    require_range,
    save_tensors,
)
from lenslrp.analysis.dictionary.block_pass import BlockPass
from lenslrp.analysis.dictionary.corpus import Block, Corpus
from lenslrp.analysis.dictionary.plan import (
    SAMPLED_CRITERIA,
    TOP_CRITERIA,
    Place,
    Plan,
    sampled_documents,
)
from lenslrp.analysis.dictionary.topk import (
    EMPTY,
    Found,
    RunningTopK,
    Spans,
    extremes,
    pack,
    require_finite,
    unpack,
)
from lenslrp.analysis.dictionary.work_folder import shard_name
from lenslrp.errors import InputError, StorageError
from lenslrp.fingerprints import canonical
from lenslrp.progress import progress_bar


@dataclass
class ScanState:
    """What a scan knows so far.

    Attributes:
        tops: criterion -> its entries, all units.
        values: [unit, sampled document] largest activations, NaN where not seen yet.
        positions: where.
        next: how many of the shard's blocks are done.
        tokens: how many tokens were in them.
    """

    tops: dict[str, RunningTopK]
    values: Float32[Tensor, "unit sample"]
    positions: Int16[Tensor, "unit sample"]
    next: int = 0
    tokens: int = 0

    @classmethod
    def empty(cls, plan: Plan) -> ScanState:
        documents = min(plan.sample, plan.corpus["documents"])
        columns = documents if set(plan.criteria) & set(SAMPLED_CRITERIA) else 0
        return cls(
            {c: RunningTopK.empty(plan.units, plan.k) for c in plan.criteria if c in TOP_CRITERIA},
            torch.full((plan.units, columns), float("nan")),
            torch.zeros((plan.units, columns), dtype=torch.int16),
        )

    def save(self, path: Path, plan: Plan, rank: int, world: int, done: bool) -> None:
        """Write the state; 14 bytes an entry. See `save_tensors`."""
        tensors: dict[str, Tensor] = {
            "sample/value": self.values,
            "sample/position": self.positions,
        }
        for name, top in self.tops.items():
            values, docs = unpack(top.keys)
            tensors[f"{name}/value"], tensors[f"{name}/document"] = values, docs
            tensors[f"{name}/position"] = top.positions
        numbers = {"rank": rank, "world": world, "next": self.next, "tokens": self.tokens}
        metadata = {"plan": canonical(plan.to_json()), "done": str(done)}
        save_tensors(path, tensors, {**metadata, **{k: str(v) for k, v in numbers.items()}})

    @classmethod
    def load(cls, path: Path, plan: Plan) -> tuple[ScanState, dict[str, str]]:
        """A state that `save` wrote, and its metadata.

        Raises:
            StorageError: damaged, or made under another plan.
        """
        tensors, metadata = load_tensors(path)
        _require_shard(path, tensors, metadata, plan)
        tops = {}
        for name in plan.criteria:
            if name in TOP_CRITERIA:
                docs = tensors[f"{name}/document"]
                keys = pack(tensors[f"{name}/value"].nan_to_num(), docs.clamp_min(0))
                tops[name] = RunningTopK(
                    keys.masked_fill(docs < 0, EMPTY), tensors[f"{name}/position"]
                )
        numbers = int(metadata["next"]), int(metadata["tokens"])
        return cls(tops, tensors["sample/value"], tensors["sample/position"], *numbers), metadata

    def merge(self, others: Sequence[ScanState]) -> ScanState:
        """The state of one scan over all the blocks of several."""
        tops = {n: top.merge([o.tops[n] for o in others]) for n, top in self.tops.items()}
        values, positions = self.values.clone(), self.positions.clone()
        for other in others:
            theirs = ~other.values.isnan()
            values[theirs], positions[theirs] = other.values[theirs], other.positions[theirs]
        parts = (self, *others)
        return ScanState(
            tops, values, positions, sum(s.next for s in parts), sum(s.tokens for s in parts)
        )


def _require_shard(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], plan: Plan
) -> None:
    """Refuse what `ScanState.save` would not have written under this plan."""
    try:
        shard_plan = Plan.from_json(json.loads(metadata["plan"]), path)
    except (KeyError, ValueError, RecursionError) as error:
        raise StorageError(f"{path} is damaged: it does not say what it is part of") from error
    plan.require_same(shard_plan, str(path))
    require_numbers(path, metadata, ("rank", "world", "next", "tokens"))
    shape = plan.units, plan.k
    sampled = tuple(ScanState.empty(plan).values.shape)
    forms: dict[str, Form] = {
        "sample/value": (torch.float32, sampled),
        "sample/position": (torch.int16, sampled),
    }
    names = [name for name in plan.criteria if name in TOP_CRITERIA]
    for name in names:
        forms[f"{name}/value"] = torch.float32, shape
        forms[f"{name}/document"] = torch.int64, shape
        forms[f"{name}/position"] = torch.int16, shape
    require_forms(path, tensors, forms)
    context = int(plan.corpus["cut"]["context"])
    for name in names:
        require_range(path, f"{name}/document", tensors[f"{name}/document"], -1,
                      plan.corpus["documents"])  # fmt: skip
        require_range(path, f"{name}/position", tensors[f"{name}/position"], 0, context)
    require_range(path, "sample/position", tensors["sample/position"], 0, context)


@dataclass(frozen=True, eq=False)
class Job:
    """One dictionary in the making: how blocks are run, over which corpus, in which folder."""

    run: BlockPass
    corpus: Corpus
    folder: Path

    @property
    def plan(self) -> Plan:
        return self.run.plan

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def shard(self, rank: int, world: int) -> Path:
        return self.work / f"{shard_name(rank, world)}.safetensors"


@dataclass
class Scanner:
    """Takes in what a block pass hands on, on the devices of the model.

    Attributes:
        state: what is known so far; of the blocks taken in since then, after `collect`.
        columns: sampled document -> column.
        found: (activation or relevance, sign) and place -> what one block has there, some rows
            after the other.
        parts: the units on each device, the places where they are, and what is known of them.
    """

    state: ScanState
    plan: Plan
    columns: dict[int, int]
    found: dict[tuple[tuple[str, int], Place], list[Found]] = field(default_factory=dict)
    parts: list[tuple[slice, list[Place], ScanState]] = field(default_factory=list)

    def on_activation(self, place: Place, x: Tensor, spans: Spans) -> None:
        self._find("activation", place, x, spans)

    def on_relevance(self, place: Place, x: Tensor, spans: Spans) -> None:
        self._find("relevance", place, x, spans)

    def _find(self, what: str, place: Place, x: Tensor, spans: Spans) -> None:
        criteria = [TOP_CRITERIA[name] for name in self.state.tops if TOP_CRITERIA[name][0] == what]
        if what == "activation" and self.columns and ("activation", 1) not in criteria:
            criteria.append(("activation", 1))
        extreme = extremes(x, spans, [sign for _, sign in criteria]) if criteria else []
        for criterion, found in zip(criteria, extreme, strict=True):
            self.found.setdefault((criterion, place), []).append(found)

    def take(self, block: Block) -> None:
        """Merge what was found in a block.

        Raises:
            InputError: a value that is not finite; the message says where.
        """
        if not self.parts:
            self._divide()
        columns = enumerate(map(self.columns.get, block.docs.tolist()))
        sampled = torch.tensor([(row, column) for row, column in columns if column is not None])
        finite = []
        for _, places, state in self.parts:
            device = state.positions.device
            docs, rows = block.docs.to(device), sampled.to(device)
            for name, top in state.tops.items():
                values, positions = self._joined(TOP_CRITERIA[name], places)
                finite.append(values.isfinite().all())
                fresh = RunningTopK.of(TOP_CRITERIA[name][1] * values, positions, docs)
                state.tops[name] = top.merge([fresh], ordered=False)
            if len(rows):
                values, positions = self._joined(("activation", 1), places)
                state.values.index_copy_(1, rows[:, 1], values[rows[:, 0]].T)
                state.positions.index_copy_(1, rows[:, 1], positions[rows[:, 0]].T)
        if finite and not bool(torch.stack([f.to(finite[0].device) for f in finite]).all()):
            self.require_finite(block)
        self.found.clear()

    def _divide(self) -> None:
        """The state, in parts that lie where the model's own parts do."""
        device = {place: values.device for (_, place), ((values, _), *_) in self.found.items()}
        for where, some in groupby(self.plan.places, device.__getitem__):
            places = list(some)
            units = slice(places[0].first, places[-1].end)
            tops = {
                name: RunningTopK(top.keys[units].to(where), top.positions[units].to(where))
                for name, top in self.state.tops.items()
            }
            sample = self.state.values[units].to(where), self.state.positions[units].to(where)
            self.parts.append((units, places, ScanState(tops, *sample)))

    def _joined(self, criterion: tuple[str, int], places: list[Place]) -> Found:
        parts = [self.found[criterion, place] for place in places]
        values, positions = (
            torch.cat([torch.cat([found[i] for found in rows]) for rows in parts], dim=1)
            for i in range(2)
        )
        return values, positions

    def require_finite(self, block: Block) -> None:
        """Refuse NaN and infinities in what was found in a block, in the order of its passes.

        Raises:
            InputError: naming the hook and a document.
        """
        for (_, place), rows in self.found.items():
            values = torch.cat([values for values, _ in rows])
            require_finite(values, place.hook, block.docs)

    def collect(self) -> ScanState:
        """The state of everything that was taken in, on the host."""
        for units, _, part in self.parts:
            for name, top in part.tops.items():
                best = top.merge([])
                self.state.tops[name].keys[units] = best.keys.cpu()
                self.state.tops[name].positions[units] = best.positions.cpu()
            self.state.values[units] = part.values.cpu()
            self.state.positions[units] = part.positions.cpu()
        return self.state


def scan_shard(
    job: Job,
    rank: int = 0,
    world: int = 1,
    *,
    checkpoint_every: float = 60.0,
    progress: bool = True,
) -> Path:
    """Scan the blocks `rank, rank + world, ...` and leave the result in one file.

    A scan that was killed goes on from its last checkpoint, and ends with the same file as one that
    was not.

    Args:
        job: see `lenslrp.analysis.dictionary.job.prepare`.
        rank: which shard, from 0.
        world: how many there are.
        checkpoint_every: seconds between checkpoints: what a kill can cost.
        progress: show a bar with tokens a second and the time left.

    Returns:
        The path of the finished file.

    Raises:
        InputError: an activation or a relevance that is not finite.
        StorageError: a checkpoint of another dictionary, a damaged one, or a full disk.

    Examples:
        >>> scan_shard(job, 0, 2).name
        'shard-00000-of-00002.safetensors'
    """
    if not 0 <= rank < world:
        raise StorageError(f"rank must be from 0 to {world - 1}, not {rank}")
    plan, path = job.plan, job.shard(rank, world)
    state = ScanState.empty(plan)
    if path.exists():
        state, metadata = ScanState.load(path, plan)
        if metadata["done"] == "True":
            return path
    blocks = range(rank, job.corpus.blocks, world)
    scanner = Scanner(state, plan, sampled_columns(plan))
    bar = progress_bar(
        f"scan {rank + 1}/{world}",
        total=plan.corpus["tokens"] // world,
        shown=progress,
        initial=state.tokens,
        unit="tok",
        unit_scale=True,
    )
    saved = time.monotonic()
    with bar, job.run.open() as runner:
        for index in blocks[state.next :]:
            block = job.corpus.block(index)
            tokens = sum(block.lengths)
            try:
                runner.run(block, scanner.on_activation, scanner.on_relevance)
            except InputError:
                scanner.require_finite(block)  # where it began tells more than where it ended
                raise
            scanner.take(block)
            state.next += 1
            state.tokens += tokens
            bar.update(tokens)
            if time.monotonic() - saved >= checkpoint_every:
                scanner.collect().save(path, plan, rank, world, done=False)
                saved = time.monotonic()
    scanner.collect().save(path, plan, rank, world, done=True)
    return path


def sampled_columns(plan: Plan) -> dict[int, int]:
    """Which column of a state each sampled document has; none where no criterion samples."""
    if not set(plan.criteria) & set(SAMPLED_CRITERIA):
        return {}
    docs = sampled_documents(plan.corpus["documents"], plan.sample, plan.seed)
    return {doc: column for column, doc in enumerate(docs.tolist())}


def merge_shards(job: Job, files: Iterable[str | Path]) -> ScanState:
    """The state of one scan over the whole corpus, from the files of all its shards.

    Raises:
        StorageError: a shard is missing, unfinished, there twice, damaged or of another dictionary.
    """
    merged: ScanState | None = None
    seen: dict[int, Path] = {}
    worlds: set[int] = set()
    for path in sorted(map(Path, files)):
        state, metadata = ScanState.load(path, job.plan)
        rank, world = int(metadata["rank"]), int(metadata["world"])
        if metadata["done"] != "True":
            raise StorageError(
                f"{path} is a checkpoint of a scan that has not ended: finish it first"
            )
        if rank in seen:
            raise StorageError(f"{path} and {seen[rank]} are both shard {rank}")
        seen[rank] = path
        worlds.add(world)
        merged = state if merged is None else merged.merge([state])
    if merged is None or worlds != {len(seen)} or set(seen) != set(range(len(seen))):
        raise StorageError(
            f"the shards do not make a whole: given are ranks {sorted(seen)} of "
            f"{sorted(worlds) or 'none'}"
        )
    return merged
