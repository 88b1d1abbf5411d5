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
from numpy.typing import NDArray

from lenslrp.analysis.circuits.pairs import Pairs
from lenslrp.analysis.circuits.pruning import Verdict, between, prune, verify
from lenslrp.analysis.circuits.scores import NodeScores
from lenslrp.errors import InputError
from lenslrp.views.cards import Face, Shown

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SHARES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The ten sizes of MIB's circuits, and nothing at all."""


@dataclass(frozen=True, eq=False, repr=False)
class FaithfulnessCurve(Shown):
    """Faithfulness of circuits of growing size.

    Attributes:
        table: `share`, `nodes`, `faithfulness`, `low` and `high` (95%).
        verdict: what the circuits do on each pair.
        cpr: area under faithfulness over the share of nodes kept (higher is better).
        cmd: area between it and 1 (lower is better).
    """

    table: pd.DataFrame
    verdict: Verdict

    def face(self) -> Face:
        return Face(
            "Faithfulness over the share of nodes kept",
            {"CPR": self.cpr, "CMD": self.cmd, "pairs": len(self.verdict.clean)},
            self.table,
            notes=["CPR: area under faithfulness; CMD: area between it and 1."],
        )

    @property
    def cpr(self) -> float:
        return self.interval("cpr")[0]

    @property
    def cmd(self) -> float:
        return self.interval("cmd")[0]

    def resampled(self, measure: str, seed: int = 0) -> NDArray[np.float64]:
        """One of the areas, [1 + n]: over all pairs, then over bootstrap samples of them.

        The samples depend on the seed and the number of pairs only, so that curves over the same
        pairs can be compared sample by sample.
        """
        if measure not in ("cpr", "cmd"):
            raise InputError(f"measure must be 'cpr' or 'cmd', not {measure!r}")
        kept = np.stack([self.verdict.resampled(i, seed) for i in range(len(self.table))])
        heights = kept if measure == "cpr" else np.abs(1 - kept)
        areas: NDArray[np.float64] = np.trapezoid(heights, self.table["share"], axis=0)
        return areas

    def interval(self, measure: str = "cpr", seed: int = 0) -> tuple[float, float, float]:
        """CPR or CMD with its 95% bootstrap interval over pairs.

        Args:
            measure: `"cpr"` or `"cmd"`.
            seed: of the bootstrap.

        Raises:
            InputError: no such measure.
        """
        return between(self.resampled(measure, seed))


def faithfulness_curve(
    model: TransformerBridge,
    pairs: Pairs,
    scores: NodeScores,
    *,
    shares: Sequence[float] = SHARES,
    by: str = "score",
    pooled: bool = False,
    seed: int = 0,
    **options: Any,
) -> FaithfulnessCurve:
    """Faithfulness over size: more and more of the best nodes are kept.

    Args:
        model, pairs: as for `verify`.
        scores: of nodes at all positions.
        shares: how much of each class to keep, from 0 to 1; MIB's curves are over `SHARES[1:]`.
        by, seed: as for `prune`.
        pooled: keep that much of all nodes together, as MIB does, and not of each class.
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
    total = sum(value.shape[-1] for value in scores.values.values())
    sizes = [{"nodes": int(share * total)} if pooled else {"share": share} for share in shares]
    circuits = [prune(scores, **size, by=by, seed=seed) for size in sizes]
    verdict = verify(model, pairs, circuits, **options)
    intervals = [verdict.interval(index) for index in range(len(circuits))]
    kept = [sum(n for n, _ in circuit.sizes().values()) for circuit in circuits]
    table = pd.DataFrame(intervals, columns=["faithfulness", "low", "high"])
    table.insert(0, "share", list(shares))
    table.insert(1, "nodes", kept)
    return FaithfulnessCurve(table, verdict)
