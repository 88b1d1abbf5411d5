"""An attribution graph as a matplotlib figure; imported when one is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lenslrp.analysis.circuits.graph.layout import HEIGHT, WIDTH, lay_out
from lenslrp.analysis.views.drawing import (
    LIGHT,
    Theme,
    colour_map,
    installed_fonts,
    new_figure,
    short_label,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lenslrp.analysis.circuits.graph.result import AttributionGraph

INCH = 78.0
"""Units of the layout in an inch."""


def graph_figure(graph: AttributionGraph, theme: Theme | None = None) -> Figure:
    """Tokens left to right, layers bottom to top; edges as wide as their relevance."""
    theme = theme or LIGHT
    layout = lay_out(graph.nodes)
    figure, (axes,) = new_figure(layout.width / INCH, layout.height / INCH + 0.4, theme, 1)
    from matplotlib.patches import FancyBboxPatch, PathPatch
    from matplotlib.path import Path

    edges = graph.totals
    left, _, width, height = layout.frame(edges[["source", "target"]].itertuples(index=False))
    axes.set(xlim=(left, left + width), ylim=(height, 0), xticks=[], yticks=[])
    limit = float(edges["relevance"].abs().max()) if len(edges) else 1.0
    ordered = edges.reindex(edges["relevance"].abs().sort_values().index)
    for source, target, value in ordered.itertuples(index=False):
        curve = Path(
            layout.curve(source, target), [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
        )
        axes.add_patch(
            PathPatch(
                curve,
                fill=False,
                linewidth=max(0.4, 6 * abs(value) / limit),
                linestyle="-" if value >= 0 else (0, (3, 1.5)),
                edgecolor=theme.positive if value >= 0 else theme.negative,
                alpha=0.55,
            )
        )
    others = graph.nodes.loc[graph.nodes["kind"] != "target", "relevance"]
    scale, colours, font = float(others.abs().max()) or 1.0, colour_map(theme), installed_fonts()
    for node in graph.nodes.to_dict("records"):
        x, y = layout.places[node["id"]]
        size = 0.0 if node["kind"] in ("token", "target", "error") else HEIGHT * 0.45
        shade = colours(0.5 + 0.26 * max(-1.0, min(1.0, node["relevance"] / scale)))
        axes.add_patch(
            FancyBboxPatch(
                (x - WIDTH / 2 + size, y - HEIGHT / 2 + size),
                WIDTH - 2 * size,
                HEIGHT - 2 * size,
                boxstyle=f"round,pad={size}" if size else "square,pad=0",
                facecolor=shade,
                edgecolor=theme.muted,
                linewidth=0.6,
            )
        )
        label = short_label(node["label"])
        axes.text(x, y, label, ha="center", va="center", color=theme.ink, fontsize=7,
                  parse_math=False, **font)  # fmt: skip
    for name, y in layout.rows:
        axes.text(2, y, name, va="center", color=theme.muted, fontsize=7, **font)
    axes.set_title(str(graph.explained), loc="left", color=theme.ink, fontsize=10,
                   parse_math=False, **font)  # fmt: skip
    return figure
