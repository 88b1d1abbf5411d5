"""Which documents of a corpus activate each unit most, and in which it matters most.

One streaming pass, every unit at once. ActMax and ActMin compare activations; RelMax and RelMin
(CRP's relevance maximisation; Achtibat et al. 2023, "From attribution maps to human-understandable
explanations through concept relevance propagation") compare relevance for a recorded target: the
documents in which a unit mattered, not merely fired. Deciles and random examples come from a sample
of documents that a hash decides, so that shards agree on it without talking.

The pass keeps no text: per block the extreme over a document's positions, merged into a running
top-k. Memory does not grow with the corpus. A shard is the blocks ``rank, rank + world, ...``; its
state is one file, written every minute, from which a killed scan goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float32, Int16
from torch import Tensor
from tqdm.auto import tqdm

from lenslrp.analysis.block_pass import BlockPass, Spans
from lenslrp.analysis.corpus import Corpus
from lenslrp.analysis.plan import CRITERIA, SAMPLES, Place, Plan, sampled_documents
from lenslrp.analysis.storage import (
    Form,
    canonical,
    load_tensors,
    require_forms,
    require_numbers,
    require_range,
    save_tensors,
)
from lenslrp.analysis.topk import TopK, extremes, locator, pack, require_finite, unpack
from lenslrp.errors import StorageError


@dataclass
class State:
    """What a scan knows so far.

    Attributes:
        tops: criterion -> its entries, all units.
        values: [unit, sampled document] largest activations, NaN where not seen yet.
        positions: where.
        next: how many of the shard's blocks are done.
        tokens: how many tokens were in them.
    """

    tops: dict[str, TopK]
    values: Float32[Tensor, "unit sample"]
    positions: Int16[Tensor, "unit sample"]
    next: int = 0
    tokens: int = 0

    @classmethod
    def empty(cls, plan: Plan) -> State:
        documents = min(plan.sample, plan.corpus["documents"])
        columns = documents if set(plan.criteria) & set(SAMPLES) else 0
        return cls(
            {c: TopK.empty(plan.units, plan.k) for c in plan.criteria if c in CRITERIA},
            torch.full((plan.units, columns), float("nan")),
            torch.zeros((plan.units, columns), dtype=torch.int16),
        )

    def save(self, path: Path, plan: Plan, rank: int, world: int, done: bool) -> None:
        """Write the state; 14 bytes an entry. See :func:`save_tensors`."""
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
    def load(cls, path: Path, plan: Plan) -> tuple[State, dict[str, str]]:
        """A state that :meth:`save` wrote, and its metadata.

        Raises:
            StorageError: damaged, or made under another plan.
        """
        tensors, metadata = load_tensors(path)
        _require_shard(path, tensors, metadata, plan)
        tops = {}
        for name in plan.criteria:
            if name in CRITERIA:
                docs = tensors[f"{name}/document"]
                keys = pack(tensors[f"{name}/value"].nan_to_num(), docs[0] * 0)
                keys = (keys & ~0xFFFFFFFF) | (0xFFFFFFFF - docs)
                keys = keys.masked_fill(docs < 0, torch.iinfo(torch.int64).min)
                tops[name] = TopK(keys, tensors[f"{name}/position"])
        numbers = int(metadata["next"]), int(metadata["tokens"])
        return cls(tops, tensors["sample/value"], tensors["sample/position"], *numbers), metadata

    def merge(self, others: Sequence[State]) -> State:
        """The state of one scan over all the blocks of several."""
        tops = {n: top.merge([o.tops[n] for o in others]) for n, top in self.tops.items()}
        values, positions = self.values.clone(), self.positions.clone()
        for other in others:
            theirs = ~other.values.isnan()
            values[theirs], positions[theirs] = other.values[theirs], other.positions[theirs]
        parts = (self, *others)
        return State(
            tops, values, positions, sum(s.next for s in parts), sum(s.tokens for s in parts)
        )


def _require_shard(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], plan: Plan
) -> None:
    """Refuse what :meth:`State.save` would not have written under this plan."""
    try:
        said = Plan.from_json(json.loads(metadata["plan"]), path)
    except (KeyError, ValueError, RecursionError) as error:
        raise StorageError(f"{path} is damaged: it does not say what it is part of") from error
    plan.require_same(said, str(path))
    require_numbers(path, metadata, ("rank", "world", "next", "tokens"))
    shape = plan.units, plan.k
    sampled = tuple(State.empty(plan).values.shape)
    forms: dict[str, Form] = {
        "sample/value": (torch.float32, sampled),
        "sample/position": (torch.int16, sampled),
    }
    names = [name for name in plan.criteria if name in CRITERIA]
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
        return self.work / f"shard-{rank:05d}-of-{world:05d}.safetensors"


@dataclass
class _Scanner:
    """Takes in what a block pass hands on."""

    state: State
    plan: Plan
    columns: dict[int, int]  #: sampled document -> column
    docs: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def on_activation(self, place: Place, x: Tensor, spans: Spans) -> None:
        self._compare("activation", place, x, spans)
        rows = [r for r, d in enumerate(self.docs.tolist()) if d in self.columns]
        if rows and self.state.values.shape[1]:
            some, where = x[rows], [spans[r] for r in rows]
            best = extremes(some, where, 1)
            unit = torch.arange(place.size, device=x.device).repeat_interleave(len(rows))
            row = torch.arange(len(rows), device=x.device).repeat(place.size)
            at = locator(some, where, 1)(unit, row, best.reshape(-1)).reshape(best.shape)
            column = [self.columns[int(self.docs[r])] for r in rows]
            self.state.values[place.first : place.end, column] = best.to(self.state.values)
            self.state.positions[place.first : place.end, column] = at.to(self.state.positions)

    def on_relevance(self, place: Place, x: Tensor, spans: Spans) -> None:
        self._compare("relevance", place, x, spans)

    def _compare(self, what: str, place: Place, x: Tensor, spans: Spans) -> None:
        for name, top in self.state.tops.items():
            kind, sign = CRITERIA[name]
            if kind == what:
                values = sign * extremes(x, spans, sign)
                require_finite(values, place.hook, self.docs)
                top.update(place.first, values, self.docs, locator(x, spans, sign))


def scan_shard(
    job: Job,
    rank: int = 0,
    world: int = 1,
    *,
    checkpoint_every: float = 60.0,
    progress: bool = True,
) -> Path:
    """Scan the blocks ``rank, rank + world, ...`` and leave the result in one file.

    A scan that was killed goes on from its last checkpoint, and ends with the same file as one that
    was not.

    Args:
        job: see :func:`lenslrp.analysis.job.prepare`.
        rank: which shard, from 0.
        world: how many there are.
        checkpoint_every: seconds between checkpoints: what a kill can cost.
        progress: show a bar with tokens a second and the time left.

    Returns:
        The path of the finished file.

    Raises:
        StorageError: a checkpoint of another dictionary, a damaged one, or a full disk.
    """
    if not 0 <= rank < world:
        raise StorageError(f"rank must be from 0 to {world - 1}, not {rank}")
    plan, path = job.plan, job.shard(rank, world)
    state = State.empty(plan)
    if path.exists():
        state, metadata = State.load(path, plan)
        if metadata["done"] == "True":
            return path
    blocks = range(rank, job.corpus.blocks, world)
    sampled = sampled_documents(plan.corpus["documents"], plan.sample, plan.seed).tolist()
    scanner = _Scanner(state, plan, {doc: column for column, doc in enumerate(sampled)})
    bar = tqdm(
        total=plan.corpus["tokens"] // world,
        initial=state.tokens,
        unit="tok",
        unit_scale=True,
        desc=f"scan {rank + 1}/{world}",
        disable=not progress,
    )
    saved = time.monotonic()
    with bar:
        for index in blocks[state.next :]:
            block = job.corpus.block(index)
            scanner.docs = block.docs
            relevance = scanner.on_relevance if plan.relevance else None
            job.run.run(block, scanner.on_activation, relevance)
            state.next += 1
            state.tokens += sum(block.lengths)
            bar.update(sum(block.lengths))
            if time.monotonic() - saved >= checkpoint_every:
                state.save(path, plan, rank, world, done=False)
                saved = time.monotonic()
    state.save(path, plan, rank, world, done=True)
    return path


def merge_shards(job: Job, files: Iterable[str | Path]) -> State:
    """The state of one scan over the whole corpus, from the files of all its shards.

    Raises:
        StorageError: a shard is missing, unfinished, there twice, damaged or of another dictionary.
    """
    merged: State | None = None
    seen: dict[int, Path] = {}
    worlds: set[int] = set()
    for path in sorted(map(Path, files)):
        state, metadata = State.load(path, job.plan)
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
