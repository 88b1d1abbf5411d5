"""The page of an attribution graph: its picture, what a reader does with it, and tables.

The same `<div>` is shown in a notebook, in a file and by `to_html`. Its one script, `view.js`, is
constant, so that a file's policy names it by its hash. Controls are hidden until the script has
come to life: where scripts do not run, there is the picture, the table and the units' pages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from lenslrp.analysis.circuits.graph.picture import FONT, entered, graph_svg, svg_rules
from lenslrp.analysis.circuits.graph.supernodes import unit_text, units_of, vocabulary_notes
from lenslrp.analysis.views.document import html_document, write_document
from lenslrp.analysis.views.drawing import DARK, LIGHT
from lenslrp.errors import InputError
from lenslrp.text.visible_text import visible
from lenslrp.views.heatmap import card, themed, token_html

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.analysis.circuits.graph.result import AttributionGraph
    from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary

SCRIPT = (files(__package__) / "view.js").read_text(encoding="utf-8")

_LISTED = 25
_TOKENS = 5

_EDGES = [f"--positive:{theme.positive};--negative:{theme.negative}" for theme in (LIGHT, DARK)]
_COLOURS = {
    "ink": "var(--llrp-fg)", "muted": "var(--llrp-muted)", "paper": "var(--llrp-bg)",
    "positive": "var(--positive)", "negative": "var(--negative)",
}  # fmt: skip

GRAPH_STYLE = f"""<style>
{card("lenslrp-graph")}
{themed("lenslrp-graph", *_EDGES)}
.lenslrp-graph{{font:14px/1.45 {FONT};max-width:none}}
{svg_rules(".lenslrp-graph ", _COLOURS)}
.lenslrp-graph .frame{{overflow-x:auto}}
.lenslrp-graph svg{{display:block;margin:0 auto}}
.lenslrp-graph[data-ready] .node{{cursor:pointer}}
.lenslrp-graph .node:focus{{outline:none}}
.lenslrp-graph .node:focus .tint,.lenslrp-graph .chosen .tint{{stroke:var(--llrp-fg);\
stroke-width:3}}
.lenslrp-graph .on path{{stroke-opacity:.1}}
.lenslrp-graph .on path.near,.lenslrp-graph path:hover{{stroke-opacity:.95}}
.lenslrp-graph .muted,.lenslrp-graph summary,.lenslrp-graph th{{color:var(--llrp-muted)}}
.lenslrp-graph .tools{{display:flex;flex-wrap:wrap;gap:.4em;align-items:center;\
margin:.6em 0;font-size:.9em}}
.lenslrp-graph .tools label{{display:flex;align-items:center;gap:.4em}}
.lenslrp-graph button,.lenslrp-graph input{{font:inherit;color:inherit;\
background:var(--llrp-bg);border:1px solid var(--llrp-muted);border-radius:6px;padding:.1em .5em}}
.lenslrp-graph button{{cursor:pointer}}
.lenslrp-graph .panel{{position:sticky;bottom:0;background:var(--llrp-bg);\
border-top:1px solid var(--llrp-line);padding:.6em 0;min-height:9.5em;display:grid;gap:.2em 1.5em;\
grid-template-columns:repeat(auto-fit,minmax(12em,1fr));font-size:.93em;overflow-wrap:anywhere}}
.lenslrp-graph .panel table{{width:auto}}
.lenslrp-graph .state{{white-space:pre-wrap;overflow-wrap:anywhere;margin:.4em 0;\
font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}}
.lenslrp-graph table{{border-collapse:collapse;font-size:.92em;color:inherit;\
font-variant-numeric:tabular-nums}}
.lenslrp-graph td,.lenslrp-graph th{{padding:.1em 1.2em .1em 0;text-align:left;\
background:none;border:0;border-bottom:1px solid var(--llrp-line);color:inherit}}
.lenslrp-graph [hidden]{{display:none!important}}
</style>"""

_TOOLS = """<div class="tools" hidden>
<label>Nodes <input type="range" data-do="count" min="1" max="{total}" value="{count}">\
<output>{shown} of {total}</output></label>
<label><input type="checkbox" data-do="faint"> faint edges</label>
<label>Name <input data-do="name" size="8" autocomplete="off"></label>
<button type="button" data-do="rename">Rename</button>
<button type="button" data-do="group">Group</button>
<button type="button" data-do="ungroup">Ungroup</button>
<button type="button" data-do="pin">Pin</button>
<button type="button" data-do="out" aria-label="Smaller">−</button>
<button type="button" data-do="in" aria-label="Larger">+</button>
<button type="button" data-do="fit">Fit</button>
<button type="button" data-do="copy">Copy as Python</button>
</div>"""


def graph_html(
    graph: AttributionGraph,
    count: int,
    notes: Mapping[str, str] | None = None,
    pages: Mapping[str, str] | None = None,
) -> str:
    """A fragment that displays itself anywhere, light or dark.

    Args:
        graph: what is shown, folded or not.
        count: how many nodes are shown at first.
        notes: id of a node -> a line about it.
        pages: text of a unit -> markup of its page.
    """
    svg = graph_svg(graph, count, notes)
    prompt = graph.prompt or "".join(graph.str_tokens)
    tools = _TOOLS.format(total=len(graph.nodes), count=count, shown=min(count, len(graph.nodes)))
    return (
        f'<div><div class="lenslrp-graph">{GRAPH_STYLE}'
        f'<div style="font-weight:600"><bdi>{escape(visible(str(graph.explained)))}</bdi></div>'
        f'<div class="muted"><bdi>{escape(visible(prompt))}</bdi></div>{tools}'
        f'<div class="frame">{svg}</div><div class="panel" role="status" hidden></div>'
        '<pre class="state" hidden></pre>'
        f'<div class="muted" style="font-size:.85em">{escape(_note(graph))}</div>'
        f"{_table(graph)}</div>{_pages(graph, pages or {})}</div><script>{SCRIPT}</script>"
    )


def _note(graph: AttributionGraph) -> str:
    last = graph.nodes.iloc[-1]
    value = float(graph.explained.value[0])
    residual, came = float(last["rest"]) + float(last["reconstruction"]), entered(graph, last["id"])
    return (
        f"{len(graph.nodes)} nodes and {len(graph.edges)} edges of {graph.chosen[0]} chosen among "
        f"{graph.chosen[1]:,} ({graph.settings['composite']}). The target's {value:.4g} is "
        f"{came:+.4g} along the edges into it, {residual:+.4g} from what is not in the graph, "
        f"{value - came - residual:+.4g} absorbed. Red and solid is positive evidence, "
        "blue and dashed negative; width by relevance. Nodes are shown by influence on the target."
        f"{_tower(graph)}"
    )


def _tower(graph: AttributionGraph) -> str:
    """What a first token that stands for its units (`folded_first_token`) is."""
    first = graph.nodes[(graph.nodes["kind"] == "token") & (graph.nodes["position"] == 0)]
    units = re.search(r"(?<=.) \+(\d+)$", str(first["label"].iloc[0])) if len(first) else None
    if units is None:
        return ""
    return (
        f" The first token and {units[1]} units at its position are one node; first_token=True "
        "shows each."
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


def _pages(graph: AttributionGraph, pages: Mapping[str, str]) -> str:
    labels = dict(zip(map(unit_text, graph.nodes["id"]), graph.nodes["label"], strict=True))
    return "".join(
        f'<details data-unit="{escape(unit)}"><summary>{token_html(labels[unit])} '
        f"<code>{escape(unit)}</code></summary>{page}</details>"
        for unit, page in pages.items()
    )


def graph_page(
    graph: AttributionGraph,
    count: int,
    path: str | Path | None,
    *,
    dictionary: NeuronDictionary | None,
    model: TransformerBridge | None,
) -> str:
    """What `AttributionGraph.to_html` returns, and writes."""
    notes = {} if model is None else vocabulary_notes(graph, model, _TOKENS)
    pages = {} if dictionary is None else unit_pages(graph, dictionary)
    shown = graph_html(graph, count, notes, pages)
    if path is None:
        return shown
    page = html_document(str(graph.explained), shown, scripts=[SCRIPT])
    write_document(Path(path), page)
    return page


def unit_pages(graph: AttributionGraph, dictionary: NeuronDictionary) -> dict[str, str]:
    """Text -> the page of every unit of the graph that the dictionary has."""
    pages = {}
    for unit in units_of(graph):
        with suppress(InputError):  # a dictionary need not have every hook point
            pages[unit] = dictionary[unit]._repr_html_()
    return pages
