"""An attribution graph as SVG: in a page, where `view.js` brings it to life, or as a file.

Text comes from the prompt and is text: escaped here, and set as text by the script. What is not
shown at first is in a page's SVG too, hidden; where scripts do not run, the picture stands still
and its tooltips (`title` elements) remain. Colours and fonts are attributes and one style sheet,
in a file with nothing that SVG 1.1 does not know, for viewers of papers.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenslrp.analysis.circuits.graph.layout import (
    GAP,
    HEIGHT,
    LINE,
    MARGIN,
    RISE,
    SWINGS,
    WIDEST_NODE,
    WIDTH,
    Grid,
    Layout,
    grid,
    lay_out,
)
from lenslrp.analysis.circuits.graph.shown import FAINT, ShownNodes, shown_at
from lenslrp.analysis.views.drawing import LIGHT, Theme
from lenslrp.files import whole
from lenslrp.text.visible_text import visible
from lenslrp.views.heatmap import NEGATIVE, POSITIVE, STRONGEST, signed

if TYPE_CHECKING:
    from lenslrp.analysis.circuits.graph.result import AttributionGraph

WIDEST = 9.0
"""Width of the edge with the most relevance, in units of the drawing."""

FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif'
SIZE = 11.0
"""Of letters, in units of the drawing, which are CSS pixels."""

MARK = "<desc>LensLRP</desc>"
"""What every SVG file of ours holds near its beginning."""

_PADDING = 8.0
SIZES = {
    "width": WIDTH, "height": HEIGHT, "gap": GAP, "line": LINE, "rise": RISE, "margin": MARGIN,
    "padding": _PADDING, "swings": SWINGS.tolist(), "faint": FAINT, "widest": WIDEST,
}  # fmt: skip
"""What `view.js` is told."""

_AROUND = re.compile(r"^(top )?logit( of| difference)? | at position -?\d+$")
_ROUND = {"token": 2.0, "target": 2.0, "error": 2.0, "head": 4.0, "recurrent head": 4.0}


def svg_rules(scope: str, colours: Mapping[str, str], font: str = FONT) -> str:
    """The style rules of the picture below the selector `scope`.

    Args:
        scope: such as `".lenslrp-graph "`, or `""` for all.
        colours: of `ink`, `muted`, `paper`, `positive` and `negative`: those of a `Theme`.
        font: of all letters.
    """
    rules = f"""text{{font:{SIZE:.0f}px {font};fill:{colours["ink"]};pointer-events:none}}
.row{{fill:{colours["muted"]}}}
.paper{{fill:{colours["paper"]}}}
.tint{{stroke:{colours["muted"]}}}
.tint.error{{stroke-dasharray:3 2}}
.pinned .tint,.grouped .tint{{stroke:{colours["ink"]};stroke-width:2}}
.grouped .tint{{fill-opacity:0}}
path{{fill:none;stroke-opacity:.55}}
.plus{{stroke:{colours["positive"]}}}
.minus{{stroke:{colours["negative"]};stroke-dasharray:5 3}}"""
    return re.sub(r"^|(?<=,)(?=\.grouped)", scope, rules, flags=re.MULTILINE)


@dataclass(frozen=True)
class Picture:
    """A graph, what of it is shown, and where."""

    graph: AttributionGraph
    shown: ShownNodes
    cells: Grid
    layout: Layout
    labels: Mapping[str, str]

    @property
    def edges(self) -> list[tuple[str, str]]:
        """Source and target of the edges that are drawn."""
        drawn = self.shown.edges[self.shown.edges["drawn"]]
        return list(zip(drawn["source"], drawn["target"], strict=True))


def picture_of(graph: AttributionGraph, count: int) -> Picture:
    """The picture of `count` nodes, at most."""
    shown = shown_at(graph, count)
    labels = dict(zip(graph.nodes["id"], map(visible, graph.nodes["label"]), strict=True))
    last, widths = str(graph.nodes["id"].iloc[-1]), dict[str, float]()
    if labels[last] == "target":
        labels[last] = target_name(graph)
        room = text_width(labels[last]) + 2 * _PADDING
        widths[last] = float(min(WIDEST_NODE, max(WIDTH, math.ceil(room))))
    cells = grid(graph.nodes, shown.order)
    layout = lay_out(graph.nodes, cells, set(shown.boxes.values()), widths)
    named = graph.supernode_of
    labels |= {node: visible(named[node]) for node in shown.boxes.values() if node in named}
    return Picture(graph, shown, cells, layout, labels)


def target_name(graph: AttributionGraph) -> str:
    """What is explained, without the words around it: ``' Paris' - ' Rome'``."""
    return visible(_AROUND.sub("", graph.explained.text))


def text_width(text: str) -> float:
    """About how wide a text is, in units of the drawing, in a wide font."""

    def ems(char: str) -> float:
        if unicodedata.combining(char):
            return 0.0
        if char in "MWmw@%" or ord(char) >= 0x2000:  # signs, Chinese, pictures
            return 1.0
        return 0.4 if char in "iljtfrI.,:;'|!()[] ·" else 0.67

    return SIZE * sum(map(ems, text))


def fitted(text: str, width: float) -> str:
    """A text cut where it would leave a box of this width."""
    if text_width(text) <= width - _PADDING:
        return text
    while text and text_width(text + "…") > width - _PADDING:
        text = text[:-1]
    return text + "…"


def graph_svg(graph: AttributionGraph, count: int, notes: Mapping[str, str] | None = None) -> str:
    """The picture in a page, with what is hidden at first.

    Args:
        graph: what is shown, folded or not.
        count: how many nodes are shown at first.
        notes: id -> a line about the node.
    """
    picture = picture_of(graph, count)
    left, top, width, height = picture.layout.frame(picture.edges)
    label = escape(visible(f"Attribution graph of {graph.explained}"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" '
        f'data-count="{count}" data-sizes="{escape(json.dumps(SIZES))}" '
        f'width="{width:.1f}" height="{height:.1f}" '
        f'viewBox="{left:.1f} {top:.1f} {width:.1f} {height:.1f}">'
        f"{''.join(_rows(picture, left))}{''.join(_edges(picture))}"
        f"{''.join(_nodes(picture, notes or {}))}</svg>"
    )


def svg_file(graph: AttributionGraph, count: int, theme: Theme) -> str:
    """The picture as an SVG document of its own: what is shown, in the colours of a theme."""
    picture = picture_of(graph, count)
    left, top, width, height = picture.layout.frame(picture.edges)
    box = f'x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"'
    font = 'Helvetica,Arial,"DejaVu Sans",sans-serif'
    rules = svg_rules("", asdict(theme), font)
    parts = [*_rows(picture, left), *_edges(picture), *_nodes(picture, {})]
    inside = "\n".join(part for part in parts if ' display="none"' not in part.split(">", 1)[0])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.1f}" height="{height:.1f}" '
        f'viewBox="{left:.1f} {top:.1f} {width:.1f} {height:.1f}">\n'
        f"<title>{escape(visible(str(graph.explained)))}</title>{MARK}\n<style>{rules}</style>\n"
        f'<rect class="paper" {box}/>\n{inside}\n</svg>\n'
    )


def write_svg(
    graph: AttributionGraph, count: int, theme: Theme | None, path: str | Path | None
) -> str:
    """What `AttributionGraph.to_svg` returns, and writes."""
    text = svg_file(graph, count, theme or LIGHT)
    if path is not None:
        with whole(Path(path), ours=MARK.encode()) as part:
            part.write_text(text, encoding="utf-8")
    return text


def _hidden(hidden: bool) -> str:
    return ' display="none"' if hidden else ""


def _rows(picture: Picture, left: float) -> list[str]:
    rows = picture.layout.rows
    return [
        f'<text class="row" data-row="{row}"{_hidden(row not in rows)} x="{left + 6:.1f}" '
        f'y="{rows.get(row, 0.0) + 4:.1f}">{escape(name)}</text>'
        for row, name in enumerate(picture.cells.names)
    ]


def _edges(picture: Picture) -> list[str]:
    """Every edge of the graph; of those that become one between boxes, the first is drawn."""
    boxes, layout = picture.shown.boxes, picture.layout
    merged = picture.shown.edges.set_index(["source", "target"]).to_dict("index")
    limit = float(picture.shown.edges["relevance"].abs().max()) if merged else 0.0
    edges = picture.graph.totals
    ordered = edges.reindex(edges["relevance"].abs().sort_values(kind="stable").index)
    parts, seen = [], set[tuple[str | None, str | None]]()
    for source, target, value in ordered.itertuples(index=False):
        ends = boxes.get(source), boxes.get(target)
        edge = None if ends in seen else merged.get(ends)
        look = ""
        if edge is not None and edge["drawn"]:
            seen.add(ends)
            curve = [f"{x:.1f} {y:.1f}" for x, y in layout.curve(*map(str, ends))]
            width = max(0.6, WIDEST * abs(edge["relevance"]) / limit)
            look = f' stroke-width="{width:.2f}" d="M{curve[0]}C{" ".join(curve[1:])}"'
        shown = value if edge is None else edge["relevance"]
        title = f"{picture.labels[source]} → {picture.labels[target]}: {signed(shown, abs(shown))}"
        parts.append(
            f'<path class="{"plus" if shown >= 0 else "minus"}"{_hidden(not look)} '
            f'data-a="{layout.numbers[source]}" data-b="{layout.numbers[target]}" '
            f'data-value="{value:.6g}"{look}><title>{escape(title)}</title></path>'
        )
    return parts


def _nodes(picture: Picture, notes: Mapping[str, str]) -> list[str]:
    graph, layout = picture.graph, picture.layout
    ranks = {node: rank for rank, node in enumerate(picture.shown.order)}
    groups = graph.supernode_of
    scale = float(graph.nodes.loc[graph.nodes["kind"] != "target", "relevance"].abs().max())
    parts = []
    for node in graph.nodes.to_dict("records"):
        name = node["id"]
        looks = "node" + " grouped" * (name in groups) + " pinned" * (name in graph.pinned)
        tint = "tint" + " error" * (node["kind"] == "error")
        wide = layout.widths.get(name, WIDTH)
        fraction = max(-1.0, min(1.0, node["relevance"] / scale)) if scale else 0.0
        x, y = layout.places.get(name, (0.0, 0.0))
        box = (
            f'x="{-wide / 2:.1f}" y="{-HEIGHT / 2:.1f}" width="{wide:.1f}" '
            f'height="{HEIGHT:.1f}" rx="{_ROUND.get(node["kind"], HEIGHT / 2):.0f}"'
        )
        colour = POSITIVE if fraction >= 0 else NEGATIVE
        lines = [*_lines(graph, node), *filter(None, [notes.get(name)])]
        group = f' data-group="{escape(visible(groups[name]))}"' if name in groups else ""
        own = target_name(graph) if name in layout.widths else visible(node["label"])
        parts.append(
            f'<g class="{looks}"{_hidden(name not in layout.places)} '
            f'data-id="{escape(name)}" data-label="{escape(own)}" data-rank="{ranks[name]}" '
            f'data-column="{json.dumps(picture.cells.columns[name])}" '
            f'data-row="{json.dumps(picture.cells.rows[name])}"{group} '
            f'transform="translate({x:.1f} {y:.1f})"><title>{escape(chr(10).join(lines))}</title>'
            f'<rect class="paper" {box}/><rect class="{tint}" {box} fill="rgb{colour}" '
            f'fill-opacity="{STRONGEST * abs(fraction):.3f}"/>'
            f'<text y="4" text-anchor="middle">{escape(fitted(picture.labels[name], wide))}</text>'
            "</g>"
        )
    return parts


def _lines(graph: AttributionGraph, node: Mapping[str, Any]) -> list[str]:
    """What is known of a node, a line each."""
    token = visible(graph.str_tokens[node["position"]])
    where = f"position {node['position']} ({token})"
    lines = [visible(node["label"]), node["id"], where, f"relevance {node['relevance']:+.4g}"]
    if math.isfinite(node["activation"]):
        lines.append(f"activation {node['activation']:+.4g}")
    if node["kind"] not in ("token", "error"):
        came = entered(graph, node["id"])
        absorbed = node["relevance"] - node["rest"] - came - node["reconstruction"]
        lines.append(
            f"from edges {came:+.4g}, from what is not in the graph {node['rest']:+.4g}, "
            f"absorbed {absorbed:+.4g}"
        )
        if graph.coders:
            lines.append(f"from errors that are not shown {node['reconstruction']:+.4g}")
    return lines


def entered(graph: AttributionGraph, name: str) -> float:
    """The relevance that reaches a node along its edges."""
    return float(graph.edges.loc[graph.edges["target"] == name, "relevance"].sum())
