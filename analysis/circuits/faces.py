"""How results of circuits show themselves: facts of the runs, and strips of units."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lenslrp.views.heatmap import rgba

if TYPE_CHECKING:
    from lenslrp.analysis.circuits.edges import EdgeScores
    from lenslrp.analysis.circuits.scores import NodeScores

WIDTH, LINE, LABEL = 480, 14, 190
"""Of the strips, in pixels: units, a line, the hook point's name."""
HOVERED = 2.0
"""Pixels of a unit from which on each has a title; narrower ones are one path a line."""


def facts_of(scores: NodeScores | EdgeScores) -> dict[str, Any]:
    """The runs that scores compare, and what they cost."""
    facts: dict[str, Any] = {
        "pairs": len(scores.clean),
        f"{scores.metric.replace('_', ' ')}, clean": float(scores.clean.mean()),
        "corrupted": float(scores.corrupt.mean()),
    }
    if scores.correct is not None:
        facts["model is right in"] = f"{float(scores.correct.double().mean()):.0%}"
    return facts


def strips(keep: Mapping[str, Tensor]) -> str:
    """One line a hook point, with a mark for each unit that is kept, as SVG without a script.

    Args:
        keep: hook point -> [unit], True where a unit is kept.
    """
    lines = []
    for row, (hook, kept) in enumerate(keep.items()):
        y, step = row * LINE, WIDTH / max(1, len(kept))
        units = kept.nonzero()[:, 0].tolist()
        top, high = y + 2, LINE - 4
        if step >= HOVERED:
            marks = "".join(
                f'<rect x="{LABEL + unit * step:.1f}" y="{top}" width="{max(step - 0.5, 1):.1f}" '
                f'height="{high}" fill="{rgba(1.0)}"><title>{escape(hook)}[{unit}]</title></rect>'
                for unit in units
            )
        else:
            places = dict.fromkeys(round(LABEL + unit * step) for unit in units)
            path = "".join(f"M{x} {top}v{high}" for x in places)
            marks = f'<path d="{path}" stroke="{rgba(1.0)}"></path>'
        lines.append(
            f'<text x="{LABEL - 8}" y="{y + 11}" text-anchor="end" font-size="11" '
            f'fill="currentColor">{escape(hook)}</text><rect x="{LABEL}" y="{y + 6}" '
            f'width="{WIDTH}" height="1" fill="currentColor" opacity=".25"></rect>{marks}'
        )
    height = max(1, len(keep)) * LINE
    return (
        f'<svg role="img" aria-label="Units of the circuit by hook point" '
        f'viewBox="0 0 {LABEL + WIDTH} {height}" width="{LABEL + WIDTH}" '
        f'style="display:block;max-width:100%;height:auto" '
        f'font-family="system-ui,sans-serif">{"".join(lines)}</svg>'
    )
