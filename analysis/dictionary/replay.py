"""The second pass: each referenced document once more, and the windows of all units shown with it.

The first pass kept scores and positions, no text. Here each referenced document runs again in the
very same block, and what every unit shown with it did around its hit is cut out: its activation at
each token, and its relevance where that was searched. The replayed score must equal the stored one
to the last bit; otherwise something is not what it was, and nothing is published.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float32, Int16, Int64
from torch import Tensor

from lenslrp.analysis.common.storage import (
    Form,
    load_tensors,
    require_forms,
    require_numbers,
    require_range,
    save_tensors,
)
from lenslrp.analysis.dictionary.block_pass import Aims
from lenslrp.analysis.dictionary.corpus import Block
from lenslrp.analysis.dictionary.plan import TOP_CRITERIA, Place, Plan, sampled_documents
from lenslrp.analysis.dictionary.scan import Job, ScanState
from lenslrp.analysis.dictionary.schemas import STATISTICS, kinds, sampled_tokens
from lenslrp.analysis.dictionary.topk import Spans, priorities, unpack
from lenslrp.errors import StorageError
from lenslrp.progress import progress_bar

DECILES = 10
RANDOM = 10
FLUSH = 100_000
"""Windows in a file."""


class ReplayError(StorageError):
    """A replayed score is not the stored one."""


@dataclass(frozen=True)
class Entries:
    """All examples of a dictionary, as a table of [unit, slot].

    Attributes:
        slots: (criterion, rank) of each column.
        documents, positions, scores: [unit, slot].
    """

    slots: tuple[tuple[str, int], ...]
    documents: Int64[Tensor, "unit slot"]
    positions: Int16[Tensor, "unit slot"]
    scores: Float32[Tensor, "unit slot"]

    @classmethod
    def of(cls, state: ScanState, plan: Plan) -> Entries:
        """What to show of a finished scan."""
        slots: list[tuple[str, int]] = []
        columns: list[tuple[Tensor, Tensor, Tensor]] = []
        for name in plan.criteria:
            if name in TOP_CRITERIA:
                top = state.tops[name]
                scores, docs = unpack(top.keys)
                count = int((docs[0] >= 0).sum())  # fewer than k only if the corpus has fewer
                columns_of = docs, top.positions, TOP_CRITERIA[name][1] * scores
            else:
                columns_of = _sampled(state, plan, name)
                count = columns_of[0].shape[1]
            slots += [(name, rank) for rank in range(count)]
            columns.append(tuple(t[:, :count] for t in columns_of))  # type: ignore[arg-type]
        docs, positions, scores = (
            torch.cat([c[i] for c in columns], dim=1).contiguous() for i in range(3)
        )
        return cls(tuple(slots), docs, positions, scores)


def _sampled(state: ScanState, plan: Plan, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Deciles or random examples: (documents, positions, scores), each [unit, slot]."""
    docs = sampled_documents(plan.corpus["documents"], plan.sample, plan.seed)
    if name == "random":
        n = min(RANDOM, len(docs))
        units = len(state.values)
        return docs[:n].expand(units, -1), state.positions[:, :n], state.values[:, :n]
    by_doc = docs.argsort()
    values = state.values[:, by_doc]
    order = values.sort(dim=1, stable=True).indices
    n = min(DECILES, len(docs))
    picks = order[:, [int((j + 0.5) * len(docs) / n) for j in range(n)]]
    positions = state.positions[:, by_doc].gather(1, picks)
    return docs[by_doc][picks], positions, values.gather(1, picks)


@dataclass(frozen=True)
class Statistics:
    """Which tokens statistics are estimated from: one of each sampled document."""

    docs: Int64[Tensor, " column"]
    seed: int

    @classmethod
    def of(cls, plan: Plan) -> Statistics:
        return cls(sampled_documents(plan.corpus["documents"], STATISTICS, plan.seed), plan.seed)

    def columns(self, block: Block) -> list[tuple[int, int]]:
        """(column, row) of the sampled documents in a block."""
        at = {int(d): c for c, d in enumerate(self.docs)}
        return [(at[d], row) for row, d in enumerate(block.docs.tolist()) if d in at]

    def position(self, doc: int, spans: Spans, row: int) -> int:
        a, b = spans.first, spans.ends[row]
        return a + int(priorities(torch.tensor([doc]), self.seed + 2)[0]) % (b - a)


@dataclass
class _Cutter:
    """Cuts windows out of one block after the other, until they are written."""

    plan: Plan
    entries: Entries
    statistics: Statistics
    block: Block | None = None
    ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    done: dict[str, list[Tensor]] = field(default_factory=dict)
    windows: int = 0

    def begin(self, block: Block, ids: Int64[Tensor, " entry"]) -> None:
        self.block, self.ids = block, ids
        self.cut = {
            what: torch.full((len(ids), sum(self.plan.window) + 1), float("nan"))
            for what in kinds(self.plan)
        }
        self.columns = self.statistics.columns(block)
        self.sampled = {
            what: torch.zeros(self.plan.units, len(self.columns)) for what in kinds(self.plan)
        }

    def on_activation(self, place: Place, x: Tensor, spans: Spans) -> None:
        self._take("activation", place, x, spans)

    def on_relevance(self, place: Place, x: Tensor, spans: Spans) -> None:
        self._take("relevance", place, x, spans)

    def _take(self, what: str, place: Place, x: Tensor, spans: Spans) -> None:
        assert self.block is not None
        slots = len(self.entries.slots)
        a, b = torch.searchsorted(self.ids, torch.tensor([place.first, place.end]) * slots).tolist()
        documents = self.entries.documents[self.ids[a:b] // slots, self.ids[a:b] % slots]
        row = torch.searchsorted(self.block.docs, documents)
        here = ((row >= spans.rows.start) & (row < spans.rows.stop)).nonzero()[:, 0]
        row, ids = row[here], self.ids[a:b][here]
        unit, slot = ids // slots, ids % slots
        position = self.entries.positions[unit, slot].long()
        local = unit - place.first
        row_here = row - spans.start
        hit = (t.to(x.device) for t in (row_here, position, local))
        self._require_equal(what, place, ids, x[tuple(hit)].cpu())
        index = position[:, None] - self.plan.window[0] + torch.arange(self.cut[what].shape[1])
        inside = (index >= 0) & (index < torch.tensor(self.block.lengths)[row][:, None])
        at = (row_here[:, None], index.clamp(0, x.shape[1] - 1), local[:, None])
        window = x[tuple(t.to(x.device) for t in at)].cpu()
        self.cut[what][a + here] = window.masked_fill(~inside, float("nan"))
        for n, (column, r) in enumerate(self.columns):
            if spans.rows.start <= r < spans.rows.stop:
                doc = int(self.statistics.docs[column])
                p = self.statistics.position(doc, spans, r - spans.start)
                self.sampled[what][place.first : place.end, n] = x[r - spans.start, p].cpu()

    def _require_equal(self, what: str, place: Place, ids: Tensor, replayed_scores: Tensor) -> None:
        slots = len(self.entries.slots)
        judged = torch.tensor(
            [TOP_CRITERIA.get(c, ("activation",))[0] == what for c, _ in self.entries.slots]
        )
        unit, slot = ids // slots, ids % slots
        stored = self.entries.scores[unit, slot]
        wrong = (stored != replayed_scores) & judged[slot]
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0])
            raise ReplayError(
                f"{place.hook}[{int(unit[i]) - place.first}], "
                f"{self.entries.slots[int(slot[i])][0]}, document "
                f"{int(self.entries.documents[unit[i], slot[i]])}: the scan found "
                f"{float(stored[i]):.9g}, the replay {float(replayed_scores[i]):.9g}. The model, "
                "its threads or its device are not those of the scan; replay where it was scanned"
            )

    def end(self, aims: Aims | None) -> None:
        assert self.block is not None
        columns = torch.tensor([c for c, _ in self.columns], dtype=torch.int64)
        results = {"entry": self.ids, "column": columns, "document": self.block.docs}
        for what in kinds(self.plan):
            results[what], results[f"sample/{what}"] = (
                self.cut[what],
                self.sampled[what].T.contiguous(),
            )
        if aims is not None:
            results["aim/position"], results["aim/token"] = aims.positions, aims.tokens
            results["aim/value"] = aims.values
        for name, tensor in results.items():
            self.done.setdefault(name, []).append(tensor)
        self.windows += len(self.ids)

    def flush(self, path: Path, metadata: dict[str, str]) -> None:
        if not self.done:  # more ranks than blocks
            nothing = torch.zeros(0, dtype=torch.int64)
            self.begin(Block(-1, nothing, nothing[None], nothing[None].bool()), nothing)
            self.end(None)
        joined = {name: torch.cat(some) for name, some in self.done.items()}
        order = joined["entry"].argsort()
        for name in ("entry", *kinds(self.plan)):
            joined[name] = joined[name][order]
        save_tensors(path, joined, metadata)
        self.done, self.windows = {}, 0


def replay(
    job: Job,
    entries: Entries,
    rank: int = 0,
    world: int = 1,
    *,
    checkpoint_every: float = 60.0,
    progress: bool = True,
) -> list[Path]:
    """Replay the blocks `rank, rank + world, ...` of all that are referenced.

    Files are written every minute; a replay that was killed goes on after the last of them.

    Returns:
        The files, in order: windows sorted by entry, [entry, window], NaN outside the document.

    Raises:
        ReplayError: a score is not what the scan found.
    """
    plan, statistics = job.plan, Statistics.of(job.plan)
    blocks, ids, bounds = _by_block(job, entries, statistics)
    files = replayed(job, rank, world)
    start = rank
    for path in files:
        start = require_part(path, plan, entries)
    cutter = _Cutter(plan, entries, statistics)
    saved = time.monotonic()
    mine = range(rank, len(blocks), world)
    name = f"replay {rank + 1}/{world}"
    bar = progress_bar(name, total=len(mine), shown=progress, unit="block")
    with bar, job.run.open() as runner:
        bar.update(len(range(rank, start, world)))
        for n in range(start, len(blocks), world):
            block = job.corpus.block(int(blocks[n]))
            cutter.begin(block, ids[bounds[n] : bounds[n + 1]].sort().values)
            cutter.end(runner.run(block, cutter.on_activation, cutter.on_relevance))
            bar.update(1)
            last = n + world >= len(blocks)
            if last or cutter.windows >= FLUSH or time.monotonic() - saved >= checkpoint_every:
                files.append(_flush(job, cutter, rank, world, n + world, len(blocks)))
                saved = time.monotonic()
    if not files:
        files.append(_flush(job, cutter, rank, world, start, len(blocks)))
    return files


def require_part(path: Path, plan: Plan, entries: Entries) -> int:
    """Refuse a file that no replay of these entries wrote; return the block that follows it.

    Raises:
        StorageError: naming the file.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("plan") != plan.fingerprint():
        raise StorageError(f"{path} was made for another dictionary; delete it")
    require_numbers(path, metadata, ("next",))
    count, width = entries.documents.numel(), sum(plan.window) + 1
    forms: dict[str, Form] = {
        "entry": (torch.int64, (None,)),
        "column": (torch.int64, (None,)),
        "document": (torch.int64, (None,)),
    }
    rows = [len(tensors[name]) if name in tensors else None for name in ("entry", "column")]
    for kind in kinds(plan):
        forms[kind] = torch.float32, (rows[0], width)
        forms[f"sample/{kind}"] = torch.float32, (rows[1], plan.units)
    if "aim/value" in tensors:
        documents = (len(tensors["document"]) if "document" in tensors else None,)
        forms["aim/position"] = forms["aim/token"] = torch.int64, documents
        forms["aim/value"] = tensors["aim/value"].dtype, documents
    require_forms(path, tensors, forms)
    require_range(path, "entry", tensors["entry"], 0, count)
    require_range(path, "column", tensors["column"], 0, sampled_tokens(plan))
    if bool((tensors["entry"].diff() <= 0).any()):
        raise StorageError(f"{path} is damaged: its windows are not sorted")
    return int(metadata["next"])


def _flush(job: Job, cutter: _Cutter, rank: int, world: int, following: int, blocks: int) -> Path:
    number = f"{len(replayed(job, rank, world)):06d}"
    path = job.work / _file_name(rank, world, number)
    about = {"plan": job.plan.fingerprint(), "next": following, "done": following >= blocks}
    cutter.flush(path, {name: str(value) for name, value in about.items()})
    return path


def replayed(job: Job, rank: int, world: int) -> list[Path]:
    """The files that a replay has written so far."""
    return sorted(job.work.glob(_file_name(rank, world, "*")))


def _file_name(rank: int, world: int, number: str) -> str:
    return f"replay-{rank:05d}-of-{world:05d}-{number}.safetensors"


def _by_block(
    job: Job, entries: Entries, statistics: Statistics
) -> tuple[Tensor, Tensor, list[int]]:
    """The referenced blocks, all entries sorted by block, and where each block's begin."""
    documents, inverse = torch.unique(entries.documents, return_inverse=True)
    block = job.corpus.block_of(documents)
    of_entry = block[inverse.reshape(-1)]
    ids = of_entry.argsort(stable=True)
    blocks = torch.unique(torch.cat([block, job.corpus.block_of(statistics.docs)]))
    bounds = torch.searchsorted(of_entry[ids], torch.cat([blocks, blocks[-1:] + 1])).tolist()
    return blocks, ids, bounds
