"""An attribution graph as HTML: one SVG to zoom and drag, with nothing loaded from elsewhere.

Text comes from the prompt and is text: escaped in the SVG, and never in the script, which knows
nodes and edges by their numbers only. Where scripts do not run, the picture stands still and its
tooltips (`title` elements) remain.
"""

from __future__ import annotations

import hashlib
import math
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenslrp.analysis.circuits.graph.layout import HEIGHT, WIDEST_NODE, WIDTH, lay_out
from lenslrp.analysis.views.document import html_document, write_document
from lenslrp.text.visible_text import visible
from lenslrp.views.heatmap import card, rgba, signed, token_html

if TYPE_CHECKING:
    from lenslrp.analysis.circuits.graph.result import AttributionGraph

WIDEST = 9.0
"""Width of the edge with the most relevance, in units of the drawing."""

_LONGEST = 11
_LONGEST_TARGET = 26
_AROUND = re.compile(r"^(top )?logit( of| difference)? | at position -?\d+$")
_LISTED = 25

GRAPH_STYLE = f"""<style>
{card("lenslrp-graph")}
.lenslrp-graph{{font:14px system-ui,sans-serif}}
.lenslrp-graph .frame{{overflow-x:auto}}
.lenslrp-graph svg{{display:block;margin:0 auto;touch-action:none;cursor:grab}}
.lenslrp-graph text{{font:11px system-ui,sans-serif;fill:var(--llrp-fg);pointer-events:none}}
.lenslrp-graph .row,.lenslrp-graph .note,.lenslrp-graph summary{{fill:var(--llrp-muted);\
color:var(--llrp-muted)}}
.lenslrp-graph rect{{fill:var(--llrp-bg);stroke:var(--llrp-line)}}
.lenslrp-graph rect.tint{{stroke:var(--llrp-muted)}}
.lenslrp-graph rect.error{{stroke-dasharray:3 2}}
.lenslrp-graph path{{fill:none;stroke-opacity:.55}}
.lenslrp-graph path.plus{{stroke:rgb(214,39,55)}}
.lenslrp-graph path.minus{{stroke:rgb(43,120,205);stroke-dasharray:5 3}}
.lenslrp-graph path:hover,.lenslrp-graph .on path.near{{stroke-opacity:.95}}
.lenslrp-graph .on path{{stroke-opacity:.08}}
.lenslrp-graph table{{border-collapse:collapse;font-size:.85em;color:inherit}}
.lenslrp-graph td,.lenslrp-graph th{{padding:.15em 1.2em .15em 0;text-align:left;\
background:none;border:0;border-bottom:1px solid var(--llrp-line)}}
</style>"""

# Zoom at the pointer, drag, double click to see it all again; a node pointed at shows its edges.
ZOOM_SCRIPT = """<script>(function(){var tries=0;function start(){
var svg=document.getElementById("ID");if(!svg){if(tries++<200)setTimeout(start,50);return;}
if(svg.dataset.ready)return;svg.dataset.ready="1";
var all=svg.getAttribute("viewBox").split(" ").map(Number),box=all.slice(),held=null;
function show(){svg.setAttribute("viewBox",box.join(" "));}
function at(e){var r=svg.getBoundingClientRect(),s=Math.max(box[2]/r.width,box[3]/r.height);
return{s:s,x:box[0]+box[2]/2+(e.clientX-r.left-r.width/2)*s,
y:box[1]+box[3]/2+(e.clientY-r.top-r.height/2)*s};}
svg.addEventListener("wheel",function(e){e.preventDefault();var p=at(e),
f=Math.min(Math.max(Math.exp(e.deltaY*.0015),all[2]*.05/box[2]),all[2]*2/box[2]);
box=[p.x-(p.x-box[0])*f,p.y-(p.y-box[1])*f,box[2]*f,box[3]*f];show();},{passive:false});
svg.addEventListener("pointerdown",function(e){held=at(e);svg.setPointerCapture(e.pointerId);});
svg.addEventListener("pointermove",function(e){if(!held)return;var p=at(e);
box[0]-=p.x-held.x;box[1]-=p.y-held.y;show();});
svg.addEventListener("pointerup",function(){held=null;});
svg.addEventListener("dblclick",function(){box=all.slice();show();});
svg.querySelectorAll("g[data-n]").forEach(function(g){
g.addEventListener("mouseenter",function(){svg.classList.add("on");
svg.querySelectorAll("path").forEach(function(p){
p.classList.toggle("near",p.dataset.a===g.dataset.n||p.dataset.b===g.dataset.n);});});
g.addEventListener("mouseleave",function(){svg.classList.remove("on");});});
}start();})();</script>"""


def _short(label: str, longest: int = _LONGEST) -> str:
    text = visible(label)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def target_name(graph: AttributionGraph) -> str:
    """What is explained, without the words around it: ``' Paris' - ' Rome'``."""
    return _AROUND.sub("", graph.explained.text)


def graph_svg(graph: AttributionGraph) -> str:
    """The picture alone; its id is made from what it shows, so two pictures do not meet."""
    layout = lay_out(graph.nodes)
    numbers = {name: index for index, name in enumerate(graph.nodes["id"])}
    labels = dict(zip(graph.nodes["id"], graph.nodes["label"], strict=True))
    edges = graph.totals
    limit = float(edges["relevance"].abs().max()) if len(edges) else 0.0
    parts = [
        f'<text class="row" x="4" y="{y + 4:.1f}">{escape(name)}</text>' for name, y in layout.rows
    ]
    ordered = edges.reindex(edges["relevance"].abs().sort_values().index)
    for edge in ordered.to_dict("records"):
        points = layout.curve(edge["source"], edge["target"])
        curve = [f"{x:.1f} {y:.1f}" for x, y in points]
        value = edge["relevance"]
        width = max(0.6, WIDEST * abs(value) / limit)
        title = (
            f"{visible(labels[edge['source']])} → {visible(labels[edge['target']])}: "
            f"{signed(value, limit)}"
        )
        parts.append(
            f'<path class="{"plus" if value >= 0 else "minus"}" '
            f'data-a="{numbers[edge["source"]]}" data-b="{numbers[edge["target"]]}" '
            f'stroke-width="{width:.2f}" d="M{curve[0]}C{" ".join(curve[1:])}">'
            f"<title>{escape(title)}</title></path>"
        )
    scale = float(graph.nodes.loc[graph.nodes["kind"] != "target", "relevance"].abs().max())
    parts += [
        _node(node, layout.places[node["id"]], numbers[node["id"]], scale, graph)
        for node in graph.nodes.to_dict("records")
    ]
    inside = "".join(parts)
    left, top, width, height = layout.frame(edges[["source", "target"]].itertuples(index=False))
    name = "lenslrp-graph-" + hashlib.sha256(inside.encode()).hexdigest()[:12]
    label = escape(f"Attribution graph of {graph.explained}")
    return (
        f'<svg id="{name}" xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" '
        f'width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="{left:.0f} {top:.0f} {width:.0f} {height:.0f}">{inside}</svg>'
    )


def _node(
    node: dict[str, Any],
    place: tuple[float, float],
    number: int,
    scale: float,
    graph: AttributionGraph,
) -> str:
    x, y = place
    square = {"token": 2.0, "target": 2.0, "error": 2.0, "head": 4.0, "recurrent head": 4.0}
    round_ = square.get(node["kind"], HEIGHT / 2)
    label, wide = _short(node["label"]), WIDTH
    if node["kind"] == "target" and node["label"] == "target":
        label = _short(target_name(graph), _LONGEST_TARGET)
        wide = min(WIDEST_NODE, max(WIDTH, 6.0 * len(label) + 10))
    fraction = max(-1.0, min(1.0, node["relevance"] / scale)) if scale else 0.0
    box = (
        f'x="{x - wide / 2:.1f}" y="{y - HEIGHT / 2:.1f}" width="{wide:.0f}" '
        f'height="{HEIGHT:.0f}" rx="{round_:.0f}"'
    )
    tint = "tint error" if node["kind"] == "error" else "tint"
    token = visible(graph.str_tokens[node["position"]])
    lines = [visible(node["label"]), f"position {node['position']} ({token})",
            f"relevance {node['relevance']:+.4g}"]  # fmt: skip
    if math.isfinite(node["activation"]):
        lines.append(f"activation {node['activation']:+.4g}")
    if node["kind"] not in ("token", "error"):
        absorbed = node["relevance"] - node["rest"] - _entered(graph, node["id"])
        absorbed -= node["reconstruction"]
        lines.append(f"from edges {_entered(graph, node['id']):+.4g}")
        lines.append(f"from what is not shown {node['rest']:+.4g}, absorbed {absorbed:+.4g}")
    if graph.coders and node["kind"] not in ("token", "error"):
        lines.append(f"from errors that are not shown {node['reconstruction']:+.4g}")
    return (
        f'<g data-n="{number}"><rect {box}/><rect class="{tint}" {box} '
        f'style="fill:{rgba(fraction)}"/><title>{escape(" · ".join(lines))}</title>'
        f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">'
        f"{escape(label)}</text></g>"
    )


def _entered(graph: AttributionGraph, name: str) -> float:
    return float(graph.edges.loc[graph.edges["target"] == name, "relevance"].sum())


def graph_html(graph: AttributionGraph) -> str:
    """A fragment that displays itself anywhere, light or dark."""
    svg = graph_svg(graph)
    name = svg.split('"', 2)[1]
    last = graph.nodes.iloc[-1]
    value = float(graph.explained.value[0])
    residual = float(last["rest"]) + float(last["reconstruction"])
    entered = _entered(graph, last["id"])
    note = (
        f"{len(graph.nodes)} nodes and {len(graph.edges)} edges of {graph.chosen[0]} chosen among "
        f"{graph.chosen[1]:,} ({graph.settings['composite']}). The target's {value:.4g} is "
        f"{entered:+.4g} along the edges shown, {residual:+.4g} from what is not shown, "
        f"{value - entered - residual:+.4g} absorbed. Red and solid is positive evidence, "
        "blue and dashed negative; width by relevance. Wheel to zoom, drag to move, double click "
        "to see all."
    )
    return (
        f'<div class="lenslrp-graph">{GRAPH_STYLE}'
        '<div style="font-weight:600;margin-bottom:.4em"><bdi>'
        f"{escape(visible(str(graph.explained)))}</bdi></div>"
        f'<div class="frame">{svg}</div>'
        f'<div class="note" style="font-size:.85em">{escape(note)}</div>{_table(graph)}</div>'
        f"{ZOOM_SCRIPT.replace('ID', name, 1)}"
    )


def _table(graph: AttributionGraph) -> str:
    top = graph.top(_LISTED)
    rows = "".join(
        f"<tr><td>{token_html(str(edge['source_label']))}</td>"
        f"<td>{token_html(str(edge['target_label']))}</td><td>{edge['relevance']:+.4g}</td></tr>"
        for edge in top.to_dict("records")
    )
    return (
        f'<details style="margin-top:.4em"><summary>The {len(top)} largest edges</summary><table>'
        '<thead><tr><th scope="col">from</th><th scope="col">to</th><th scope="col">relevance</th>'
        f"</tr></thead><tbody>{rows}</tbody></table></details>"
    )


def write_graph_page(graph: AttributionGraph, path: Path) -> str:
    """A whole page at `path`; returns it."""
    page = html_document(
        str(graph.explained), graph_html(graph), allow="; script-src 'unsafe-inline'"
    )
    write_document(path, page)
    return page
