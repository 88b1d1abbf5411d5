"""A circuit chosen node by node, each time by what the circuit keeps without it, or with it.

Scores rank nodes by what each does alone. A greedy search starts from that ranking and measures:
from more nodes than are wanted, the one whose ablation costs least goes; from fewer, the one that
helps most comes. As `verify` does, it sets what is outside to the corrupted run or to means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from lenslrp.analysis.circuits.ablation import Ablation, ablations
from lenslrp.analysis.circuits.faces import strips
from lenslrp.analysis.circuits.masks import OBJECTIVES, nothing_to_keep
from lenslrp.analysis.circuits.metrics import Metric, MetricFunction, metric_of
from lenslrp.analysis.circuits.nodes import Node, outputs_before
from lenslrp.analysis.circuits.pairs import PAIRS_AT_ONCE, Pairs
from lenslrp.analysis.circuits.pruning import Circuit, mean_scores, prune, ranking
from lenslrp.analysis.circuits.scores import NodeScores
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.errors import InputError
from lenslrp.hooks.structure import layer_of, unchanged
from lenslrp.views.cards import Face, Shown

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

MAX_PASSES = 2000
"""Forward passes of each pair that a search may take unless more are allowed."""


@dataclass(frozen=True, eq=False, repr=False)
class GreedySelection(Shown):
    """A circuit that was chosen node by node.

    Attributes:
        circuit: of the nodes that are left.
        table: one row a step, from where the search began: `nodes` (how many are in the circuit),
            `node` (which one came or went; empty in the first row), `faithfulness` on the pairs
            that were searched with, and `loss`, what is made small.
        passes: of all pairs through the model, of one pair each.
    """

    circuit: Circuit
    table: pd.DataFrame
    passes: PassCount

    def face(self) -> Face:
        first, last = self.table.iloc[0], self.table.iloc[-1]
        facts = {
            "nodes": f"{first.nodes:,} to {last.nodes:,}",
            "faithfulness": f"{first.faithfulness:.3f} to {last.faithfulness:.3f}",
            "forward passes of a pair": self.passes.forward,
        }
        note = "On the pairs that were searched with: verify on others."
        return Face("Greedy selection", facts, self.table, notes=[note],
                    body=strips(self.circuit.keep))  # fmt: skip


def greedy_circuit(
    model: TransformerBridge,
    pairs: Pairs,
    scores: NodeScores,
    nodes: int,
    *,
    start: int | None = None,
    pool: int = 8,
    by: str = "score",
    components: Sequence[str] | None = None,
    metric: str | Metric | MetricFunction | None = None,
    objective: str = "cmd",
    ablation: str = "corrupt",
    reference: Pairs | None = None,
    max_passes: int = MAX_PASSES,
    chunk: int = PAIRS_AT_ONCE,
) -> GreedySelection:
    """Nodes that keep a metric together: a search that starts from the ranking of scores.

    Each step runs every pair once for each of `pool` candidates, and once more: the search takes
    `|start - nodes| * (pool + 1) + 1` forward passes of each pair, beside those of `verify`. Blocks
    below a candidate are not run again.

    Args:
        model: a `TransformerBridge` of a decoder, in eval mode.
        pairs: to search with; what the nodes of all of them are set to is held in memory.
        scores: of nodes at all positions.
        nodes: how many to end with, of all classes together.
        start: how many of the best-ranked to begin with: more than `nodes`, and nodes go; fewer,
            and nodes come. Twice `nodes` if not given, or all there are.
        pool: how many are tried in each step: the worst-ranked that are in the circuit, or the
            best-ranked that are not.
        by, components: as for `prune`.
        metric: what is measured of a run; that of `scores` if not given.
        objective: as for `learn_masks`.
        ablation, reference: as for `verify`.
        max_passes: of each pair, that the search may take.
        chunk: how many pairs run at once.

    Raises:
        InputError: numbers out of range, a search of more passes than `max_passes`, nothing of the
            metric to keep, or as for `verify`.

    Examples:
        >>> scores = score_nodes(model, find, components=["heads", "mlp"])
        >>> found = greedy_circuit(model, find, scores, 12)
        >>> verify(model, held_out, [found.circuit, prune(scores, nodes=12)]).faithfulness
        [0.93, 0.71]
    """
    if objective not in OBJECTIVES:
        raise InputError(f"objective must be one of {', '.join(OBJECTIVES)}, not {objective!r}")
    ranked = _ranked(scores, by, components)
    begin = min(2 * nodes, len(ranked)) if start is None else start
    for what, number in (("nodes", nodes), ("start", begin)):
        if not 0 <= number <= len(ranked):
            raise InputError(f"{what} must be from 0 to {len(ranked)}, not {number}")
    if pool < 1 or chunk < 1:
        raise InputError(f"pool and chunk must be at least 1, not {pool} and {chunk}")
    cost = abs(begin - nodes) * (pool + 1) + 1
    if cost > max_passes:
        raise InputError(
            f"from {begin} nodes to {nodes} with {pool} candidates a step takes {cost:,} forward "
            f"passes of each pair, more than max_passes, {max_passes:,}: start nearer to {nodes}, "
            "try fewer (pool), or allow more"
        )
    circuit = prune(scores, nodes=begin, components=components, by=by)
    measured = metric_of(metric, [scores.metric])
    with unchanged(model):
        parts = list(
            ablations(model, pairs, circuit.components, measured, ablation, reference, chunk)
        )
        search = _Search(parts, objective)
        if search.total <= 0:
            raise InputError(nothing_to_keep(measured, search.clean, search.floor))
        value, outputs = search.recorded(circuit)
        rows = [search.row(circuit, "", value)]
        for _ in range(abs(begin - nodes)):
            goes = begin > nodes
            order = reversed(ranked) if goes else ranked
            tried = [node for node in order if bool(circuit.keep[node.hook][node.unit]) == goes]
            losses = {
                node: search.loss(search.run(_switched(circuit, node), outputs, node))
                for node in tried[:pool]
            }
            best = min(losses, key=losses.__getitem__)
            circuit = _switched(circuit, best)
            value, outputs = search.recorded(circuit)
            rows.append(search.row(circuit, str(best), value))
    return GreedySelection(circuit, pd.DataFrame(rows), search.passes)


def _ranked(scores: NodeScores, by: str, components: Sequence[str] | None) -> list[Node]:
    """All nodes of some classes, the best first."""
    names = list(dict.fromkeys(scores.components.values() if components is None else components))
    means = torch.cat([mean_scores(scores, name) for name in names])
    every = [
        Node(hook, unit)
        for name in names
        for hook, component in scores.components.items()
        if component == name
        for unit in range(scores.values[hook].shape[-1])
    ]
    return [every[i] for i in ranking(means, by, torch.Generator().manual_seed(0)).tolist()]


def _switched(circuit: Circuit, node: Node) -> Circuit:
    """The circuit with one node more or one less."""
    mask = circuit.keep[node.hook].clone()
    mask[node.unit] = ~mask[node.unit]
    return replace(circuit, keep={**circuit.keep, node.hook: mask})


class _Search:
    """What is measured of circuits: [pair], the metric of all pairs."""

    def __init__(self, parts: Sequence[Ablation], objective: str) -> None:
        self.parts, self.objective = parts, OBJECTIVES[objective]
        self.clean = torch.cat([part.clean for part in parts])
        self.floor = torch.cat([part.floor for part in parts])
        self.total = float((self.clean - self.floor).mean())
        self.passes = PassCount()

    def recorded(self, circuit: Circuit) -> tuple[Tensor, list[dict[int, Any]]]:
        """The metric, and what every block returns, by part."""
        outputs: list[dict[int, Any]] = [{} for _ in self.parts]
        values = [
            part.run(circuit.keep, record=record)
            for part, record in zip(self.parts, outputs, strict=True)
        ]
        self.passes.forward += sum(len(part.rows) for part in self.parts)
        return torch.cat(values), outputs

    def run(self, circuit: Circuit, outputs: Sequence[dict[int, Any]], node: Node) -> Tensor:
        """The metric of a circuit that differs in one node from the one that was recorded."""
        values = []
        for part, record in zip(self.parts, outputs, strict=True):
            replay = outputs_before(record, node.hook)
            keep = {hook: x for hook, x in circuit.keep.items() if layer_of(hook) not in replay}
            values.append(part.run(keep, replay=replay))
        self.passes.forward += sum(len(part.rows) for part in self.parts)
        return torch.cat(values)

    def kept(self, value: Tensor) -> Tensor:
        """[pair], the share of the metric that is kept."""
        return (value - self.floor) / self.total

    def loss(self, value: Tensor) -> float:
        return float(self.objective(self.kept(value)))

    def row(self, circuit: Circuit, node: str, value: Tensor) -> dict[str, Any]:
        return {
            "nodes": sum(int(keep.sum()) for keep in circuit.keep.values()),
            "node": node,
            "faithfulness": float(self.kept(value).mean()),
            "loss": self.loss(value),
        }
