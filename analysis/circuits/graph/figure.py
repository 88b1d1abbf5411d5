"""An attribution graph as a matplotlib figure; imported when one is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lenslrp.analysis.circuits.graph.layout import HEIGHT, WIDTH
from lenslrp.analysis.circuits.graph.picture import SIZE, WIDEST, fitted, picture_of
from lenslrp.analysis.views.drawing import (
    LIGHT,
    Theme,
    drawable,
    installed_fonts,
    new_figure,
)
from lenslrp.text.visible_text import visible
from lenslrp.views.heatmap import NEGATIVE, POSITIVE, STRONGEST

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lenslrp.analysis.circuits.graph.result import AttributionGraph

INCH = 96.0
"""Units of the layout in an inch: those of a CSS pixel."""

POINT = INCH / 72
POINTS = SIZE / POINT
"""Of letters."""


def graph_figure(graph: AttributionGraph, count: int, theme: Theme | None = None) -> Figure:
    """Tokens left to right, layers bottom to top; edges as wide as their relevance."""
    theme = theme or LIGHT
    picture = picture_of(graph, count)
    layout, edges = picture.layout, picture.shown.edges
    left, top, width, height = layout.frame(picture.edges)
    figure, (axes,) = new_figure(width / INCH, height / INCH + 0.4, theme, 1)
    from matplotlib.patches import FancyBboxPatch, PathPatch
    from matplotlib.path import Path

    axes.set(xlim=(left, left + width), ylim=(top + height, top), xticks=[], yticks=[])
    limit = float(edges["relevance"].abs().max()) if len(edges) else 1.0
    drawn = edges[edges["drawn"]]
    ordered = drawn.reindex(drawn["relevance"].abs().sort_values().index)
    for source, target, value, _ in ordered.itertuples(index=False):
        curve = Path(
            layout.curve(source, target), [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
        )
        axes.add_patch(
            PathPatch(
                curve,
                fill=False,
                linewidth=max(0.6, WIDEST * abs(value) / limit) / POINT,
                linestyle="-" if value >= 0 else (0, (3, 1.5)),
                edgecolor=theme.positive if value >= 0 else theme.negative,
                alpha=0.55,
                capstyle="butt",
            )
        )
    others = graph.nodes.loc[graph.nodes["kind"] != "target", "relevance"]
    scale, font = float(others.abs().max()) or 1.0, installed_fonts()
    grouped = {node for members in graph.supernodes.values() for node in members}
    for node in graph.nodes[graph.nodes["id"].isin(layout.places)].to_dict("records"):
        x, y = layout.places[node["id"]]
        wide = layout.widths.get(node["id"], WIDTH)
        size = 0.0 if node["kind"] in ("token", "target", "error") else HEIGHT * 0.45
        marked = node["id"] in grouped or node["id"] in graph.pinned
        axes.add_patch(
            FancyBboxPatch(
                (x - wide / 2 + size, y - HEIGHT / 2 + size),
                wide - 2 * size,
                HEIGHT - 2 * size,
                boxstyle=f"round,pad={size}" if size else "square,pad=0",
                facecolor=_tint(node["relevance"] / scale, theme),
                edgecolor=theme.ink if marked else theme.muted,
                linewidth=1.5 if marked else 0.6,
            )
        )
        label = drawable(fitted(picture.labels[node["id"]], wide))
        axes.text(x, y, label, ha="center", va="center", color=theme.ink, fontsize=POINTS,
                  parse_math=False, **font)  # fmt: skip
    for row, y in layout.rows.items():
        axes.text(left + 6, y, picture.cells.names[row], va="center", color=theme.muted,
                  fontsize=POINTS, **font)  # fmt: skip
    axes.set_title(drawable(visible(str(graph.explained))), loc="left", color=theme.ink,
                   fontsize=10, parse_math=False, **font)  # fmt: skip
    return figure


def _tint(fraction: float, theme: Theme) -> tuple[float, ...]:
    """The colour of a box, which is opaque: that of the page's picture over the paper."""
    from matplotlib.colors import to_rgb

    fraction = max(-1.0, min(1.0, fraction))
    colour, opacity = POSITIVE if fraction >= 0 else NEGATIVE, STRONGEST * abs(fraction)
    return tuple(
        opacity * part / 255 + (1 - opacity) * paper
        for part, paper in zip(colour, to_rgb(theme.paper), strict=True)
    )
