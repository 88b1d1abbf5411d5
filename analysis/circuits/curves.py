"""Faithfulness of circuits of growing size, with MIB's two measures (Mueller et al. 2025).

CPR is the area under faithfulness over the share of nodes that are kept, CMD the area between it
and 1, by the trapezoid rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lenslrp.analysis.circuits.pairs import Pairs
from lenslrp.analysis.circuits.pruning import prune, verify
from lenslrp.analysis.circuits.scores import NodeScores
from lenslrp.analysis.common.statistics import area

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SHARES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve:
    """Faithfulness of circuits of growing size.

    Attributes:
        table: `share`, `nodes`, `faithfulness`, `low` and `high` (95%).
        cpr: area under faithfulness over the share of nodes kept (higher is better).
        cmd: area between it and 1 (lower is better).
    """

    table: pd.DataFrame
    cpr: float
    cmd: float


def faithfulness_curve(
    model: TransformerBridge,
    pairs: Pairs,
    scores: NodeScores,
    *,
    shares: Sequence[float] = SHARES,
    by: str = "score",
    **options: Any,
) -> FaithfulnessCurve:
    """Faithfulness over size: more and more of the best nodes of every class are kept.

    CPR and CMD are of MIB (Mueller et al. 2025).

    Args:
        model, pairs: as for `verify`.
        scores: of nodes at all positions.
        shares: how much of each class to keep, from 0 to 1.
        by: as for `prune`.
        options: as for `verify`.

    Returns:
        A curve with one row a share, and its areas.

    Raises:
        InputError: as `prune` and `verify`.

    Examples:
        >>> curve = faithfulness_curve(model, held_out, scores, shares=[0.0, 0.1, 1.0])
        >>> list(curve.table.columns), len(curve.table)
        (['share', 'nodes', 'faithfulness', 'low', 'high'], 3)
    """
    circuits = [prune(scores, share, by=by) for share in shares]
    verdict = verify(model, pairs, circuits, **options)
    intervals = [verdict.interval(index) for index in range(len(circuits))]
    kept = [sum(n for n, _ in circuit.sizes().values()) for circuit in circuits]
    table = pd.DataFrame(intervals, columns=["faithfulness", "low", "high"])
    table.insert(0, "share", list(shares))
    table.insert(1, "nodes", kept)
    values, at = table["faithfulness"].to_numpy(), np.array(shares)
    return FaithfulnessCurve(table, area(values, at), area(np.abs(1 - values), at))
