"""What a graph will cost, measured on one row of the pass that it is made from."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lenslrp.analysis.circuits.graph.candidates import Candidates
from lenslrp.analysis.circuits.graph.gradients import nodes_cut, starts
from lenslrp.analysis.circuits.nodes import TARGET, Node
from lenslrp.errors import InputError

_MATRICES = 5
"""Matrices of float64 [node, node] that pruning has at a time, beside those of the graph."""

_OVERHEAD = 1.7
"""What a process holds for a byte that autograd keeps: gradients on their way, what watches the
pass, what the allocator does not give back (`benchmarks/circuits/feature_graphs.py`)."""


@dataclass(frozen=True)
class GraphEstimate:
    """What a graph will take.

    Attributes:
        nodes: how many are chosen, tokens and the target among them.
        candidates: among how many.
        backward: backward passes of one row.
        rows: how many of them are made at once.
        row_bytes: memory of a row, about: what autograd keeps for one, and more than half as much
            again for what else is there.
        graph_bytes: memory of the graph and of what pruning needs.
        seconds: the whole, as a single row suggests; a graph that is made anew after pruning takes
            up to twice that.
    """

    nodes: int
    candidates: int
    backward: int
    rows: int
    row_bytes: int
    graph_bytes: int
    seconds: float

    @property
    def memory(self) -> int:
        """Bytes beside the model and the coders; a row more is what the passes before took."""
        return (self.rows + 1) * self.row_bytes + self.graph_bytes

    def within(self, limit: float) -> GraphEstimate:
        """The same with as many rows at once as fit into `limit` bytes.

        Raises:
            InputError: one row does not fit.
        """
        if self._fitting(limit) < 1:
            least = replace(self, rows=1).memory / 1e9
            raise InputError(
                f"a graph of {self.nodes:,} nodes needs {least:.2f} GB with one row at a time, "
                f"more than max_memory, {limit / 1e9:.2f} GB: choose fewer nodes (k), or a shorter "
                "prompt"
            )
        return self.near(limit)

    def near(self, limit: float) -> GraphEstimate:
        """The same, but with one row where none fits."""
        return replace(self, rows=max(1, min(self.rows, self._fitting(limit))))

    def _fitting(self, limit: float) -> int:
        return int((limit - self.graph_bytes) // self.row_bytes) - 1

    def __str__(self) -> str:
        return (
            f"{self.nodes:,} nodes of {self.candidates:,}, {self.backward:,} backward passes, "
            f"{self.rows} at a time: {self.memory / 1e9:.2f} GB, {self.seconds:.0f} s"
        )


def estimated(
    candidates: Candidates, rows: int, direct: bool, split: bool, chosen: Sequence[Node]
) -> GraphEstimate:
    """The cost of `gradients.build_graph`, from one row of its pass, to the target."""
    begin = starts(chosen, candidates.hooks, split)
    copies = min(rows, len(begin))
    weights = {w.untyped_storage().data_ptr() for w in candidates.session.model.parameters()}
    started = time.perf_counter()
    with (
        _kept_for_backward(weights) as kept,
        nodes_cut(candidates, 1, direct, split, chosen) as segments,
    ):
        forward = time.perf_counter() - started
        segments.into([TARGET], candidates.nodes)
        backward = time.perf_counter() - started - forward
        # What is detached is kept once more, and a gradient comes for each leaf.
        leaves = sum(x.numel() * x.element_size() for x in segments.leaves.values())
    size = len(candidates.tokens) + len(chosen) + 1
    matrices = _MATRICES + len({via for start in begin for via in start.counts})
    return GraphEstimate(
        nodes=size,
        candidates=len(candidates),
        backward=len(begin),
        rows=copies,
        row_bytes=int(_OVERHEAD * (sum(kept.values()) + 3 * leaves)),
        graph_bytes=8 * size**2 * matrices,
        seconds=copies * forward + len(begin) * backward,
    )


@contextmanager
def _kept_for_backward(weights: set[int]) -> Iterator[dict[int, int]]:
    """Address -> bytes of every storage that autograd keeps inside, but for those of `weights`."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept
