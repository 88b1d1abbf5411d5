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
from lenslrp.analysis.circuits.segments import EMBEDDINGS, CutPass, cut
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.batch import Batch
from lenslrp.cache import RelevanceCache
from lenslrp.hooks.sites import LEDGER_TERMS
from lenslrp.hooks.structure import layer_of
from lenslrp.logits import Outputs, Target
from lenslrp.sessions import Session
from lenslrp.targets import Top
from lenslrp.text.spelling import str_token

KINDS: Mapping[str, str] = {
    "heads": "head", "neurons": "neuron", "attention": "attention", "mlp": "mlp"
}  # fmt: skip
"""Component -> what a node of it is called."""

ABSORBED = (*LEDGER_TERMS, "nonlinear_target")
"""What the ledger may find absorbed in a node; the last at the target alone."""

_Here = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Made:
    """A graph of all chosen nodes: what goes from each to each, [downstream, upstream], and the
    table of nodes, as ``amounts`` numbers them."""

    frame: pd.DataFrame
    amounts: Matrix
    token: int | None
    probability: float
    passes: PassCount

    @property
    def sinks(self) -> Vector:
        """[node], the size of what ends there: absorbed, or from elsewhere."""
        found: Vector = self.frame[["rest", *ABSORBED]].abs().sum(axis=1).to_numpy()
        return found

    @property
    def fixed(self) -> Mask:
        found: Mask = self.frame["kind"].isin(["token", "target"]).to_numpy()
        return found

    def without(self, stays: Mask) -> Made:
        """Only the nodes that stay; what the others gave is rest."""
        frame = self.frame.copy()
        frame["rest"] += self.amounts[:, ~stays].sum(axis=1)
        kept = frame.loc[stays].reset_index(drop=True)
        return replace(self, frame=kept, amounts=self.amounts[stays][:, stays])


def build_graph(
    session: Session,
    prepared: Batch,
    target: Target,
    hooks: Mapping[str, str],
    here: _Here,
    cache: RelevanceCache,
    rows: int,
    direct: bool,
    chosen: Sequence[Node],
) -> Made:
    """The edges into every chosen node and the target, ``rows`` of them in a backward pass.

    Args:
        here: hook point -> activation and coefficient, of the run of ``cache``.
        direct: all nodes end an edge, and not only those that are chosen.
    """
    copies = min(rows, len(chosen) + 1)
    keep = None if direct else node_masks(chosen, here)
    model, tokens = session.model, cache.str_tokens[0]
    layers = int(model.cfg.n_layers)
    with cut(session, prepared.repeated(copies), target, hooks, keep=keep, books=True) as passed:
        amounts, columns, begun = _amounts(passed, chosen, here, copies, len(tokens))
        token, probability = _token(target, passed.run.outputs())
    leaves = cache.tokens if cache.positions is None else cache.tokens + cache.positions
    value = float(cache.target.value[0])
    position = prepared.column(getattr(target, "position", -1))
    label = "target"
    if token is not None:
        label = str(token) if model.tokenizer is None else str_token(model.tokenizer, token)
    frame = pd.DataFrame(list(_described(chosen, hooks, here, tokens, layers, position, label)))
    frame["relevance"] = [
        *leaves[0].double().tolist(), *(_relevance(here, node) for node in chosen), value
    ]  # fmt: skip
    for column in ("rest", *ABSORBED):
        frame[column] = columns.get(column, np.zeros(len(frame)))
    frame.loc[frame.index[-1], "nonlinear_target"] = value - begun
    return Made(frame, amounts, token, probability, PassCount(copies, 1 + len(chosen)))


def choose_nodes(here: _Here, k: int, share: float) -> list[Node]:
    """The most relevant nodes, in the order in which the model computes them."""
    sizes = {hook: (x * g)[0].sum(dim=-1).abs().double().cpu() for hook, (x, g) in here.items()}
    flat = torch.cat([size.flatten() for size in sizes.values()])
    best = flat.sort(descending=True, stable=True)
    enough = int((best.values.cumsum(0) < share * float(flat.sum())).sum()) + 1
    nodes = [
        Node(hook, unit, position)
        for hook, size in sizes.items()
        for position in range(size.shape[0])
        for unit in range(size.shape[1])
    ]
    order = {hook: (layer_of(hook) or 0, i) for i, hook in enumerate(here)}
    found = [nodes[index] for index in best.indices[: min(k, enough)].tolist()]
    return sorted(found, key=lambda n: (order[n.hook], n.position or 0, n.unit))


def node_masks(chosen: Sequence[Node], here: _Here) -> dict[str, Tensor]:
    masks = {hook: torch.zeros(x.shape[1:3], dtype=torch.bool) for hook, (x, _) in here.items()}
    for node in chosen:
        masks[node.hook][node.position, node.unit] = True
    return masks


def _amounts(
    passed: CutPass, chosen: Sequence[Node], here: _Here, copies: int, length: int
) -> tuple[Matrix, dict[str, Vector], float]:
    """Relevance [downstream, upstream]; what came from elsewhere and what was absorbed, by column
    of the table; and the relevance with which the target began.

    Nodes are numbered tokens first, then those that are chosen, then the target.
    """
    downs = [*chosen, TARGET]
    size = length + len(downs)
    amounts, columns = np.zeros((size, size)), {"rest": np.zeros(size)}
    begun_at = 0.0
    for start in range(0, len(downs), copies):
        batch = downs[start : start + copies]
        rows = slice(length + start, length + start + len(batch))
        arrived, begun = passed.into(batch, here)
        begun_at += float(begun.sum())
        for hook, g in arrived.items():
            if hook == EMBEDDINGS:
                found = (passed.embedded() * g).sum(dim=(2, 3)).double().cpu().numpy()
                amounts[rows, :length] = found[: len(batch)]
                continue
            found = (passed.at(hook) * g).sum(dim=3).double().cpu().numpy()[: len(batch)]
            columns["rest"][rows] += found.sum(axis=(1, 2))
            for index, node in enumerate(chosen):
                if node.hook == hook:
                    part = found[:, node.position, node.unit]
                    amounts[rows, length + index] = part
                    columns["rest"][rows] -= part
        for term, value in passed.absorbed().items():
            columns.setdefault(term, np.zeros(size))[rows] = value.numpy()[: len(batch)]
    return amounts, columns, begun_at


def _relevance(here: _Here, node: Node) -> float:
    x, g = here[node.hook]
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
    here: _Here,
    tokens: Sequence[str],
    layers: int,
    position: int,
    label: str,
) -> Iterator[dict[str, Any]]:
    for place, token in enumerate(tokens):
        yield {"id": f"token@{place}", "kind": "token", "layer": -1, "position": place,
               "unit": 0, "label": token, "activation": np.nan}  # fmt: skip
    for node in chosen:
        kind, layer = KINDS[hooks[node.hook]], layer_of(node.hook)
        x = here[node.hook][0][0, node.position, node.unit]
        one = COMPONENTS[hooks[node.hook]].kind == "entry"
        shown = {"head": f"H{layer}.{node.unit}", "neuron": f"N{layer}.{node.unit}"}
        yield {"id": str(node), "kind": kind, "layer": layer, "position": node.position,
               "unit": node.unit, "label": shown.get(kind, f"{kind} {layer}"),
               "activation": float(x) if one else float(x.norm())}  # fmt: skip
    yield {"id": "target", "kind": "target", "layer": layers, "position": position, "unit": 0,
           "label": label, "activation": np.nan}  # fmt: skip
