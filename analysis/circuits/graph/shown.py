"""What of an attribution graph a picture shows at first: its most influential nodes, and few edges.

A picture grows from the target: next comes the node with the most influence among those with an
edge to a node that is there, so that everything shown has a way to the target. `view.js` holds the
same rule, from each node's rank, for the reader who wants more, pins nodes or groups them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lenslrp.analysis.circuits.graph.gradients import ABSORBED, NOT_SHOWN
from lenslrp.analysis.circuits.graph.pruning import influences
from lenslrp.errors import InputError

if TYPE_CHECKING:
    from lenslrp.analysis.circuits.graph.result import AttributionGraph

NODES = 25
"""How many nodes a picture shows at first."""

FAINT = 0.05
"""Edges below this part of the largest that is shown are left out, but for a node's strongest edge
in and out."""


@dataclass(frozen=True)
class ShownNodes:
    """What is drawn.

    Attributes:
        order: ids of all nodes, in the order in which they are shown.
        boxes: id of every node that is shown -> id of the node in whose place it is drawn: for the
            members of a supernode, its first.
        edges: among boxes: `source`, `target`, `relevance`, and whether it is `drawn`.
    """

    order: list[str]
    boxes: Mapping[str, str]
    edges: pd.DataFrame


def drawing_order(graph: AttributionGraph) -> list[str]:
    """Ids of all nodes, in the order in which a picture shows them."""
    ids = list(graph.nodes["id"])
    number = {name: index for index, name in enumerate(ids)}
    edges, size = graph.totals, len(ids)
    weights = np.zeros((size, size))
    weights[edges["target"].map(number), edges["source"].map(number)] = edges["relevance"]
    unexplained = graph.nodes.reindex(columns=[*NOT_SHOWN, *ABSORBED], fill_value=0.0)
    influence = influences(weights, unexplained.abs().sum(axis=1).to_numpy())
    order, reached = [size - 1], np.zeros(size, dtype=bool)
    left = np.arange(size) < size - 1
    while left.any():
        reached |= weights[order[-1]] != 0
        order.append(int(np.lexsort((-influence, ~reached, ~left))[0]))
        left[order[-1]] = False
    return [ids[index] for index in order]


def shown_at(graph: AttributionGraph, count: int) -> ShownNodes:
    """What a picture of `count` nodes shows; pinned nodes and supernodes come on top.

    Raises:
        InputError: fewer than one node.
    """
    if count < 1:
        raise InputError(f"nodes must be at least 1, not {count}")
    order = drawing_order(graph)
    named = graph.supernode_of
    boxes, first = {}, dict[str, str]()
    for rank, node in enumerate(order):
        if node in named:
            boxes[node] = first.setdefault(named[node], node)
        elif rank < count or node in graph.pinned:
            boxes[node] = node
    edges = graph.totals
    for end in ("source", "target"):
        edges[end] = edges[end].map(boxes)
    edges = edges.dropna()[lambda frame: frame["source"] != frame["target"]]
    edges = edges.groupby(["source", "target"], sort=False, as_index=False).sum()
    sizes = edges["relevance"].abs()
    strongest = [
        sizes == sizes.groupby(edges[end]).transform("max") for end in ("source", "target")
    ]
    drawn = (sizes >= FAINT * sizes.max()) | strongest[0] | strongest[1]
    return ShownNodes(order, boxes, edges.assign(drawn=drawn))
