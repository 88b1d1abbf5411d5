"""All edges among chosen nodes of one prompt, and the table of those nodes, before any is pruned.

Nodes are numbered tokens first, then heads and neurons in the order in which the model computes
them, then the target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lenslrp.analysis.circuits.graph.pruning import Mask, Matrix, Vector
from lenslrp.analysis.circuits.nodes import COMPONENTS, TARGET, Node
from lenslrp.analysis.circuits.segments import EMBEDDINGS, SegmentedPass, segmented
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.batch import Batch
from lenslrp.cache import RelevanceCache
from lenslrp.hooks.sites import LEDGER_TERMS
from lenslrp.hooks.structure import layer_of
from lenslrp.logits import Outputs, Target
from lenslrp.sessions import Session
from lenslrp.targets import Top
from lenslrp.text.spelling import str_token

NODE_KINDS: Mapping[str, str] = {
    "heads": "head", "neurons": "neuron", "attention": "attention", "mlp": "mlp",
    "recurrent": "recurrent head", "channels": "channel",
}  # fmt: skip
"""Component -> what a node of it is called; recurrent heads among `heads` have their own name."""

SHORT_LABELS: Mapping[str, str] = {
    "head": "H", "neuron": "N", "recurrent head": "R", "channel": "C"
}  # fmt: skip

ABSORBED = (*LEDGER_TERMS, "nonlinear_target")
"""What the ledger may find absorbed in a node; the last at the target alone."""

_Nodes = Mapping[str, tuple[Tensor, Tensor]]
"""Hook point -> activation and coefficient."""


@dataclass(frozen=True, eq=False)
class FullGraph:
    """A graph of all chosen nodes.

    Attributes:
        frame: the table of nodes, as `weights` numbers them.
        weights: [downstream, upstream], the relevance that goes along each edge.
    """

    frame: pd.DataFrame
    weights: Matrix
    token: int | None
    probability: float
    passes: PassCount

    @property
    def absorbed(self) -> Vector:
        """[node], the size of what is absorbed, or comes from nodes that are not chosen."""
        sizes: Vector = self.frame[["rest", *ABSORBED]].abs().sum(axis=1).to_numpy()
        return sizes

    @property
    def fixed(self) -> Mask:
        fixed: Mask = self.frame["kind"].isin(["token", "target"]).to_numpy()
        return fixed

    def without(self, stays: Mask) -> FullGraph:
        """Only the nodes that stay; what came from the others is added to `rest`."""
        frame = self.frame.copy()
        frame["rest"] += self.weights[:, ~stays].sum(axis=1)
        kept = frame.loc[stays].reset_index(drop=True)
        return replace(self, frame=kept, weights=self.weights[stays][:, stays])


def build_graph(
    session: Session,
    prepared: Batch,
    target: Target,
    hooks: Mapping[str, str],
    nodes: _Nodes,
    cache: RelevanceCache,
    rows: int,
    direct: bool,
    chosen: Sequence[Node],
) -> FullGraph:
    """The edges into every chosen node and the target, `rows` of them in a backward pass.

    Args:
        nodes: hook point -> activation and coefficient, of the run of `cache`.
        direct: all nodes end an edge, and not only those that are chosen.
    """
    copies = min(rows, len(chosen) + 1)
    keep = None if direct else node_masks(chosen, nodes)
    model, tokens = session.model, cache.str_tokens[0]
    layers = int(model.cfg.n_layers)
    with segmented(
        session, prepared.repeated(copies), target, hooks, keep=keep, accounting=True
    ) as segments:
        weights, columns, start_relevance = _edge_weights(
            segments, chosen, nodes, copies, len(tokens)
        )
        token, probability = _token(target, segments.run.outputs())
    leaves = cache.tokens if cache.positions is None else cache.tokens + cache.positions
    value = float(cache.target.value[0])
    position = prepared.column(getattr(target, "position", -1))
    label = "target"
    if token is not None:
        label = str(token) if model.tokenizer is None else str_token(model.tokenizer, token)
    frame = pd.DataFrame(list(_described(chosen, hooks, nodes, tokens, layers, position, label)))
    frame["relevance"] = [
        *leaves[0].double().tolist(), *(_relevance(nodes, node) for node in chosen), value
    ]  # fmt: skip
    for column in ("rest", *ABSORBED):
        frame[column] = columns.get(column, np.zeros(len(frame)))
    frame.loc[frame.index[-1], "nonlinear_target"] = value - start_relevance
    return FullGraph(frame, weights, token, probability, PassCount(copies, 1 + len(chosen)))


def choose_nodes(nodes: _Nodes, k: int, share: float) -> list[Node]:
    """The most relevant nodes, in the order in which the model computes them."""
    sizes = {hook: (x * g)[0].sum(dim=-1).abs().double().cpu() for hook, (x, g) in nodes.items()}
    flat = torch.cat([size.flatten() for size in sizes.values()])
    best = flat.sort(descending=True, stable=True)
    enough = int((best.values.cumsum(0) < share * float(flat.sum())).sum()) + 1
    candidates = [
        Node(hook, unit, position)
        for hook, size in sizes.items()
        for position in range(size.shape[0])
        for unit in range(size.shape[1])
    ]
    # A backward pass came to them, last ones first: inside a layer this is the order to reverse.
    order = {hook: (layer_of(hook) or 0, -i) for i, hook in enumerate(nodes)}
    chosen = [candidates[index] for index in best.indices[: min(k, enough)].tolist()]
    return sorted(chosen, key=lambda n: (order[n.hook], n.position or 0, n.unit))


def node_masks(chosen: Sequence[Node], nodes: _Nodes) -> dict[str, Tensor]:
    masks = {hook: torch.zeros(x.shape[1:3], dtype=torch.bool) for hook, (x, _) in nodes.items()}
    for node in chosen:
        masks[node.hook][node.position, node.unit] = True
    return masks


def _edge_weights(
    segments: SegmentedPass, chosen: Sequence[Node], nodes: _Nodes, copies: int, length: int
) -> tuple[Matrix, dict[str, Vector], float]:
    """Relevance [downstream, upstream]; what came from nodes that are not chosen and what was
    absorbed, by column of the table; and the relevance with which the target began.

    Nodes are numbered tokens first, then those that are chosen, then the target.
    """
    downs = [*chosen, TARGET]
    size = length + len(downs)
    weights, columns = np.zeros((size, size)), {"rest": np.zeros(size)}
    start_relevance = 0.0
    for start in range(0, len(downs), copies):
        batch = downs[start : start + copies]
        rows = slice(length + start, length + start + len(batch))
        arrived, begun = segments.into(batch, nodes)
        start_relevance += float(begun.sum())
        for hook, g in arrived.items():
            if hook == EMBEDDINGS:
                relevance = (segments.embedded() * g).sum(dim=(2, 3)).double().cpu().numpy()
                weights[rows, :length] = relevance[: len(batch)]
                continue
            relevance = (segments.at(hook) * g).sum(dim=3).double().cpu().numpy()[: len(batch)]
            columns["rest"][rows] += relevance.sum(axis=(1, 2))
            for index, node in enumerate(chosen):
                if node.hook == hook:
                    part = relevance[:, node.position, node.unit]
                    weights[rows, length + index] = part
                    columns["rest"][rows] -= part
        for term, value in segments.absorbed().items():
            columns.setdefault(term, np.zeros(size))[rows] = value.numpy()[: len(batch)]
    return weights, columns, start_relevance


def _relevance(nodes: _Nodes, node: Node) -> float:
    x, g = nodes[node.hook]
    at = (0, node.position, node.unit)
    return float((x[at].double() * g[at].double()).sum())


def _token(target: Target, outputs: Outputs) -> tuple[int | None, float]:
    """The token that is explained, where it is one, and its probability."""
    token, position = getattr(target, "token", None), getattr(target, "position", -1)
    rows = outputs.rows_at(position).detach().float() if outputs.logits.ndim == 3 else None
    if rows is None or (token is None and not isinstance(target, Top)):
        return None, 0.0
    index = int(rows[0].argmax()) if token is None else outputs.token(token)
    return index, float(rows[0].softmax(dim=0)[index])


def _described(
    chosen: Sequence[Node],
    hooks: Mapping[str, str],
    nodes: _Nodes,
    tokens: Sequence[str],
    layers: int,
    position: int,
    label: str,
) -> Iterator[dict[str, Any]]:
    for place, token in enumerate(tokens):
        yield {"id": f"token@{place}", "kind": "token", "layer": -1, "position": place,
               "unit": 0, "label": token, "activation": np.nan}  # fmt: skip
    for node in chosen:
        recurrent = node.hook.endswith(COMPONENTS["recurrent"].hook)
        kind = NODE_KINDS["recurrent" if recurrent else hooks[node.hook]]
        layer = layer_of(node.hook)
        x = nodes[node.hook][0][0, node.position, node.unit]
        one = COMPONENTS[hooks[node.hook]].kind == "entry"
        yield {"id": str(node), "kind": kind, "layer": layer, "position": node.position,
               "unit": node.unit,
               "label": f"{SHORT_LABELS[kind]}{layer}.{node.unit}" if kind in SHORT_LABELS
               else f"{kind} {layer}",
               "activation": float(x) if one else float(x.norm())}  # fmt: skip
    yield {"id": "target", "kind": "target", "layer": layers, "position": position, "unit": 0,
           "label": label, "activation": np.nan}  # fmt: skip
