"""All edges among chosen nodes of one prompt, and the table of those nodes, before any is pruned.

Nodes are numbered tokens first, then heads, neurons, features and errors in the order in which the
model computes them, then the target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lenslrp.analysis.circuits.graph.candidates import Candidates
from lenslrp.analysis.circuits.graph.pruning import Mask, Matrix, Vector
from lenslrp.analysis.circuits.nodes import COMPONENTS, TARGET, Node, place_components
from lenslrp.analysis.circuits.replacement import ErrorNode, FeatureNode
from lenslrp.analysis.circuits.segments import EMBEDDINGS, SegmentedPass, segmented, unit_at
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.hooks.sites import LEDGER_TERMS
from lenslrp.hooks.structure import layer_of
from lenslrp.logits import Outputs, Target
from lenslrp.progress import progress_bar
from lenslrp.targets import Top
from lenslrp.text.spelling import str_token

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

NODE_KINDS: Mapping[str, str] = {
    "heads": "head", "neurons": "neuron", "attention": "attention", "mlp": "mlp",
    "recurrent": "recurrent head", "channels": "channel",
}  # fmt: skip
"""Component -> what a node of it is called; recurrent heads among `heads` have their own name."""

SHORT_LABELS: Mapping[str, str] = {
    "head": "H", "neuron": "N", "feature": "F", "recurrent head": "R", "channel": "C"
}  # fmt: skip

ABSORBED = (*LEDGER_TERMS, "nonlinear_target")
"""What the ledger may find absorbed in a node; the last at the target alone."""

NOT_SHOWN = ("rest", "reconstruction")
"""Where else relevance comes from: nodes and edges that are not shown, and what coders leave out
at places that are no nodes of their own."""

VIA = ("q", "k", "v")
"""How an edge may enter a head: through its query, its key or its value."""


@dataclass(frozen=True, eq=False)
class FullGraph:
    """A graph of all chosen nodes.

    Attributes:
        frame: the table of nodes, as `parts` numbers them.
        parts: how edges enter -> [downstream, upstream], the relevance that goes along each edge;
            `""` is of all that is not taken apart.
    """

    frame: pd.DataFrame
    parts: Mapping[str, Matrix]
    token: int | None
    probability: float
    passes: PassCount

    @property
    def weights(self) -> Matrix:
        """[downstream, upstream], however edges enter."""
        first, *others = self.parts.values()
        return sum(others, start=first)

    @property
    def absorbed(self) -> Vector:
        """[node], the size of what is absorbed, or comes from nodes that are not chosen."""
        sizes: Vector = self.frame[[*NOT_SHOWN, *ABSORBED]].abs().sum(axis=1).to_numpy()
        return sizes

    @property
    def fixed(self) -> Mask:
        fixed: Mask = self.frame["kind"].isin(["token", "target"]).to_numpy()
        return fixed

    @property
    def ends(self) -> Mask:
        """[node], where relevance ends."""
        ends: Mask = self.frame["kind"].isin(["token", "error"]).to_numpy()
        return ends

    def without(self, stays: Mask) -> FullGraph:
        """Only the nodes that stay; what came from the others is added to `rest`."""
        frame = self.frame.copy()
        frame["rest"] += self.weights[:, ~stays].sum(axis=1)
        kept = frame.loc[stays].reset_index(drop=True)
        parts = {via: weights[stays][:, stays] for via, weights in self.parts.items()}
        return replace(self, frame=kept, parts=parts)


@dataclass(frozen=True)
class Start:
    """A row of a backward pass: it starts at a node, and some ways into that are closed.

    Attributes:
        number: of the node.
        open: ways into a head that are open; `None` where they are not told apart.
        counts: how edges enter -> how often the row's relevance counts there.
    """

    number: int
    node: Node
    open: str | None
    counts: Mapping[str, int]


def starts(chosen: Sequence[Node], hooks: Mapping[str, str], split: bool) -> list[Start]:
    """Where backward passes start: at the target and all nodes but errors.

    With `split`, a head has four rows: with the way through its query open, its key, its value, and
    none of them, which has what is lost, or enters, before they part.
    """
    found = []
    for number, node in enumerate([*chosen, TARGET]):
        if split and node.hook in hooks and _kind(node, hooks) == "head":
            found.append(Start(number, node, "", {"": 1, **dict.fromkeys(VIA, -1)}))
            found += [Start(number, node, via, {via: 1}) for via in VIA]
        elif not isinstance(node, ErrorNode):
            found.append(Start(number, node, None, {"": 1}))
    return found


def build_graph(
    candidates: Candidates, rows: int, direct: bool, split: bool, chosen: Sequence[Node]
) -> FullGraph:
    """The edges into every chosen node and the target, `rows` of them in a backward pass.

    Args:
        candidates: of the prompt.
        direct: all nodes end an edge, and not only those that are chosen.
        split: tell edges into heads through the query, the key and the value apart.
    """
    begin = starts(chosen, candidates.hooks, split)
    copies = min(rows, len(begin))
    with nodes_cut(candidates, copies, direct, split, chosen) as segments:
        parts, columns, start_relevance = _edge_weights(segments, candidates, chosen, begin, copies)
        token, probability = _token(candidates.target, segments.run.outputs())
    value = float(candidates.cache.target.value[0])
    frame = pd.DataFrame(list(_described(candidates, chosen, token)))
    frame["relevance"] = [
        *candidates.tokens, *(candidates.relevance(node) for node in chosen), value
    ]  # fmt: skip
    for column in (*NOT_SHOWN, *ABSORBED):
        frame[column] = columns.get(column, np.zeros(len(frame)))
    frame.loc[frame.index[-1], "nonlinear_target"] = value - start_relevance
    return FullGraph(frame, parts, token, probability, PassCount(copies, len(begin)))


def nodes_cut(
    candidates: Candidates, copies: int, direct: bool, split: bool, chosen: Sequence[Node]
) -> AbstractContextManager[SegmentedPass]:
    """A pass of copies of the prompt, detached at chosen nodes (`direct`: at all)."""
    session, gated = candidates.session, []
    if split:
        layers = {layer_of(node.hook) for node in chosen}
        gated = [hook for hook in _ways(session.model) if layer_of(hook) in layers]
    return segmented(
        session,
        candidates.prepared.repeated(copies),
        candidates.target,
        candidates.hooks,
        keep=None if direct else candidates.masks(chosen),
        accounting=True,
        coders=candidates.coders,
        active=candidates.active,
        gated=gated,
    )


def _ways(model: TransformerBridge) -> dict[str, str]:
    """Hook points of queries, keys and values -> which of them."""
    return place_components(model, VIA)


def _edge_weights(
    segments: SegmentedPass,
    candidates: Candidates,
    chosen: Sequence[Node],
    begin: Sequence[Start],
    copies: int,
) -> tuple[dict[str, Matrix], dict[str, Vector], float]:
    """Relevance [downstream, upstream] by how it enters; what came from nodes that are not chosen
    and what was absorbed, by column of the table; and the relevance with which the target began.
    """
    length = len(candidates.tokens)
    size = length + len(chosen) + 1
    parts = {via: np.zeros((size, size)) for start in begin for via in start.counts}
    columns = {column: np.zeros(size) for column in NOT_SHOWN}
    ways = _ways(candidates.session.model) if len(parts) > 1 else {}
    places: dict[str, list[tuple[int, tuple[int, int]]]] = {}
    for number, node in enumerate(chosen):
        place = unit_at(node, candidates.active)
        places.setdefault(node.hook, []).append((length + number, place))
    start_relevance = 0.0
    for first in progress_bar("nodes of the graph", range(0, len(begin), copies)):
        batch = begin[first : first + copies]
        segments.gates = _gates(batch, ways, copies)
        arrived, begun = segments.into([start.node for start in batch], candidates.nodes)
        start_relevance += float(begun.sum())
        found = np.zeros((len(batch), size))
        sums: dict[str, Vector] = {
            term: value.numpy()[: len(batch)] for term, value in segments.absorbed().items()
        }
        for key, g in arrived.items():
            if key == EMBEDDINGS:
                found[:, :length] = _sums(segments.embedded() * g, (2, 3))[: len(batch)]
                continue
            relevance = _sums(segments.at(key) * g, (3,))[: len(batch)]
            column = "reconstruction" if key in candidates.errors else "rest"
            sums[column] = sums.get(column, 0.0) + relevance.sum(axis=(1, 2))
            for number, at in places.get(key, ()):
                found[:, number] = relevance[(slice(None), *at)]
                sums[column] = sums[column] - found[:, number]
        for index, start in enumerate(batch):
            row = length + start.number
            for via, times in start.counts.items():
                parts[via][row] += times * found[index]
            for column, values in sums.items():
                total = sum(start.counts.values()) * values[index]
                columns.setdefault(column, np.zeros(size))[row] += total
    return parts, columns, start_relevance


def _sums(x: Tensor, dims: tuple[int, ...]) -> Vector:
    sums: Vector = x.sum(dim=dims).double().cpu().numpy()
    return sums


def _gates(batch: Sequence[Start], ways: Mapping[str, str], rows: int) -> dict[str, Tensor]:
    """Hook point of queries, keys or values -> [row], 0 where a head's way through it is closed."""
    gates: dict[str, Tensor] = {}
    for row, start in enumerate(batch):
        if start.open is None:
            continue
        for hook, via in ways.items():
            if layer_of(hook) == layer_of(start.node.hook) and via != start.open:
                gates.setdefault(hook, torch.ones(rows))[row] = 0
    return gates


def _token(target: Target, outputs: Outputs) -> tuple[int | None, float]:
    """The token that is explained, where it is one, and its probability."""
    token, position = getattr(target, "token", None), getattr(target, "position", -1)
    rows = outputs.rows_at(position).detach().float() if outputs.logits.ndim == 3 else None
    if rows is None or (token is None and not isinstance(target, Top)):
        return None, 0.0
    index = int(rows[0].argmax()) if token is None else outputs.token(token)
    return index, float(rows[0].softmax(dim=0)[index])


def _described(
    candidates: Candidates, chosen: Sequence[Node], token: int | None
) -> Iterator[dict[str, Any]]:
    model, target = candidates.session.model, candidates.target
    for place, text in enumerate(candidates.cache.str_tokens[0]):
        yield {"id": f"token@{place}", "kind": "token", "hook": "", "layer": -1, "position": place,
               "unit": 0, "label": text, "activation": np.nan}  # fmt: skip
    for node in chosen:
        coder = candidates.coder(node.hook)
        layer = layer_of(node.hook if coder is None else coder.written_at)
        kind = _kind(node, candidates.hooks)
        yield {"id": str(node), "kind": kind, "hook": node.hook, "layer": layer,
               "position": node.position, "unit": node.unit,
               "label": default_label(kind, layer, node.unit),
               "activation": candidates.activation(node)}  # fmt: skip
    label = "target"
    if token is not None:
        label = str(token) if model.tokenizer is None else str_token(model.tokenizer, token)
    yield {"id": "target", "kind": "target", "hook": "", "layer": int(model.cfg.n_layers),
           "position": candidates.prepared.column(getattr(target, "position", -1)), "unit": 0,
           "label": label, "activation": np.nan}  # fmt: skip


def _kind(node: Node, hooks: Mapping[str, str]) -> str:
    if isinstance(node, FeatureNode):
        return "feature"
    if isinstance(node, ErrorNode):
        return "error"
    recurrent = node.hook.endswith(COMPONENTS["recurrent"].hook)
    return NODE_KINDS["recurrent" if recurrent else hooks[node.hook]]


def default_label(kind: str, layer: int | None, unit: int) -> str:
    """What a node is labelled where nobody has named it."""
    return f"{SHORT_LABELS[kind]}{layer}.{unit}" if kind in SHORT_LABELS else f"{kind} {layer}"
