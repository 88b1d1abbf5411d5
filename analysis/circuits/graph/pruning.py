"""Which nodes and edges of an attribution graph carry the influence on its target.

Each node hands its influence on the target down its edges in proportion to their size (Ameisen et
al. 2025, circuit tracing).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]


def influences(weights: Matrix, absorbed: Vector) -> Vector:
    """What share of the target's influence passes through each node.

    The target, which is last, has 1; every node hands its own down its edges in proportion to their
    size, less the share that no edge explains (absorbed, or from nodes that are not shown).

    Args:
        weights: relevance [downstream, upstream], numbered so that edges go from lower to higher.
        absorbed: [node], the size of what no edge explains.
    """
    parts = _normalised(weights, absorbed)
    influence = np.zeros(len(parts))
    influence[-1] = 1.0
    for node in range(len(parts) - 1, -1, -1):
        influence += influence[node] * parts[node]
    return influence


def _normalised(weights: Matrix, absorbed: Vector) -> Matrix:
    """[downstream, upstream], each edge's part of all that ends at its downstream node."""
    sizes = np.abs(weights)
    ends = np.maximum(sizes.sum(axis=1) + absorbed, np.finfo(float).tiny)
    parts: Matrix = sizes / ends[:, None]
    return parts


def _most(scores: Vector, share: float) -> Mask:
    """The fewest entries that hold `share` of the sum."""
    flat = scores.ravel()
    order = np.argsort(-flat, kind="stable")
    sums = np.cumsum(flat[order])
    enough = int((sums < share * sums[-1] * (1 - 1e-12)).sum()) + 1
    kept = np.zeros(len(flat), dtype=bool)
    kept[order[:enough]] = True
    return (kept & (flat > 0)).reshape(scores.shape)


def influential(weights: Matrix, absorbed: Vector, fixed: Mask, share: float) -> Mask:
    """[node], True for those that stay: `fixed` ones (tokens, the target), and of the others the
    fewest that hold `share` of their influence."""
    return fixed | _most(np.where(fixed, 0.0, influences(weights, absorbed)), share)


def strongest(
    weights: Matrix, absorbed: Vector, fixed: Mask, share: float, ends: Mask | None = None
) -> tuple[Mask, Mask, Vector]:
    """Edges [downstream, upstream] and nodes [node] that stay, and all nodes' influence.

    The fewest edges that hold `share` of the influence which goes along all of them. A node that
    is left without an edge into it, or out of it, goes as well, with its other edges. Where
    relevance ends (`ends`), one out of it is enough.
    """
    influence = influences(weights, absorbed)
    edges = _most(_normalised(weights, absorbed) * influence[:, None], share)
    stays = np.ones(len(weights), dtype=bool)
    ends = fixed if ends is None else ends
    while True:
        unconnected = stays & ~fixed & ~(edges.any(axis=0) & (ends | edges.any(axis=1)))
        if not unconnected.any():
            return edges, stays, influence
        stays = stays & ~unconnected
        edges &= stays[:, None] & stays[None, :]
