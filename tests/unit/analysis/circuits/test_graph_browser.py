"""The picture of a graph in a browser: what its script does, by mouse and by keyboard."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.gallery.graphs import numbers, shown
from lenslrp.analysis.circuits.graph.graphs import AttributionGraph
from lenslrp.analysis.circuits.graph.page import SCRIPT
from lenslrp.analysis.circuits.graph.picture import graph_svg
from lenslrp.analysis.circuits.graph.shown import drawing_order
from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from tests.conformance.dictionaries import OPTIONS
from tests.unit.analysis.circuits.test_graph_picture import made
from tests.unit.conftest import NEEDS_CHROMIUM
from tests.unit.tiny import tiny, word_tokenizer

pytestmark = NEEDS_CHROMIUM

Opened = Callable[[str], str]

DRIVER = """
const all = (q) => [...document.querySelectorAll(q)], one = (q) => document.querySelector(q);
const node = (id) => all("g.node").find((g) => g.dataset.id === id);
const seen = (e) => e.getAttribute("display") !== "none";
const tool = (name) => one(`[data-do=${name}]`);
const set = (name, value) => {
  tool(name).value = value;
  tool(name).dispatchEvent(new Event("input"));
};
const click = (id, shiftKey) => node(id).dispatchEvent(new MouseEvent("click", { shiftKey }));
const key = (id, key) =>
  node(id).dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const chosen = () => all("g.chosen").map((g) => g.dataset.id);
const near = () => all("path.near").map((p) => [+p.dataset.a, +p.dataset.b]);
const drawn = () => ({
  viewBox: one("svg").getAttribute("viewBox"), width: one("svg").getAttribute("width"),
  nodes: all("g.node").filter(seen).map((g) => [g.dataset.id, g.getAttribute("class"),
    g.getAttribute("transform")]),
  rows: all("text.row").filter(seen).map((t) => [t.textContent, t.getAttribute("x"),
    t.getAttribute("y")]),
  paths: all("svg path").filter(seen).map((p) => [p.dataset.a, p.dataset.b, p.getAttribute("class"),
    p.getAttribute("d"), p.getAttribute("stroke-width")].join(" ").replace(" near", "")),
});
"""


def driven(opened: Opened, html: str, script: str) -> Any:
    """What `script` returns in a page that shows `html`."""
    dom = opened(
        f'<!DOCTYPE html><body>{html}<pre id="out"></pre><script>{DRIVER}'
        f"one('#out').textContent = JSON.stringify((() => {{{script}}})());</script>"
    )
    return json.loads(unescape(dom.split('<pre id="out">')[1].split("</pre>")[0]))


@pytest.fixture(scope="module")
def graph() -> AttributionGraph:
    return made(40).folded()


def assert_as_python_draws(found: Any, graph: AttributionGraph, count: int) -> None:
    svg = ElementTree.fromstring(graph_svg(graph, count))
    assert numbers(found["viewBox"]) == pytest.approx(numbers(svg.attrib["viewBox"]), abs=0.11)
    nodes = [[g.attrib[k] for k in ("data-id", "class", "transform")] for g in shown(svg, "g")]
    rows = [[t.text, t.attrib["x"], t.attrib["y"]] for t in shown(svg, "text")]
    paths = [
        " ".join(p.attrib[k] for k in ("data-a", "data-b", "class", "d", "stroke-width"))
        for p in shown(svg, "path")
    ]
    for ours, theirs in ((nodes, found["nodes"]), (rows, found["rows"])):
        assert [row[:-1] for row in ours if row[0] != "x"] == [row[:-1] for row in theirs]
        for mine, its in zip(ours, theirs, strict=True):
            assert numbers(its[-1]) == pytest.approx(numbers(mine[-1]), abs=0.11)
    assert len(paths) == len(found["paths"])
    for mine, its in zip(paths, found["paths"], strict=True):
        assert its.split()[:3] == mine.split()[:3]
        assert numbers(its) == pytest.approx(numbers(mine), abs=0.11)


def test_the_slider_draws_what_python_draws(opened: Opened, graph: AttributionGraph) -> None:
    counts = [25, 2, 9, len(graph.nodes)]
    script = f"return {counts}.map((n) => {{ set('count', n); return drawn(); }});"
    for count, found in zip(counts, driven(opened, graph.to_html(), script), strict=True):
        assert len(found["nodes"]) == count
        assert_as_python_draws(found, graph, count)


def test_pins_groups_and_names_are_read_out_as_python(
    opened: Opened, graph: AttributionGraph
) -> None:
    order = drawing_order(graph)
    a, b, named, pinned = order[3], order[6], order[4], order[9]
    script = f"""click({a!r}); click({b!r}, true); set("name", 'a "pair"'); tool("group").click();
    click({named!r}); set("name", "näme"); tool("rename").click();
    click({pinned!r}); tool("pin").click(); set("count", 5);
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {{key: "Escape"}}));
    return {{...drawn(), state: one(".state").textContent, hidden: one(".state").hidden,
      names: all("g.node").filter(seen).map((g) => g.getAttribute("aria-label"))}};"""
    found = driven(opened, graph.to_html(), script)
    assert not found["hidden"]
    again = eval(found["state"], {"graph": graph})  # noqa: S307
    assert set(again.supernodes['a "pair"']) == {a, b} and again.pinned == (pinned,)
    assert again.nodes.set_index("id")["label"][named] == "näme"
    for entry in found["nodes"]:
        entry[1] = entry[1].replace(" chosen", "")
    assert_as_python_draws(found, again, 5)
    assert any(name.startswith('a "pair"') for name in found["names"])
    # In a picture that begins with groups and pins they can be taken away again.
    script = f"""const first = [drawn().nodes.length, one(".state").textContent];
    click({a!r}); tool("ungroup").click(); click({pinned!r}); tool("pin").click();
    return [...first, one(".state").textContent];"""
    boxes, before, after = driven(opened, again.to_html(nodes=5), script)
    assert boxes == len(found["nodes"]) and before.startswith("graph.group({")
    assert eval(after, {"graph": again}).supernodes == {}  # noqa: S307
    assert after == "graph.group({}).pin([])"


def test_a_node_that_is_pointed_at_shows_its_edges_and_numbers(
    opened: Opened, graph: AttributionGraph
) -> None:
    edges = graph.totals
    middle = edges[edges["source"] != "token@0"]["target"].mode()[0]
    script = f"""const parts = () => [near(), one(".panel").innerText, one("svg").matches(".on")];
    const before = parts();
    node({middle!r}).dispatchEvent(new PointerEvent("pointerenter"));
    const pointed = parts();
    node({middle!r}).dispatchEvent(new PointerEvent("pointerleave"));
    const after = parts();
    node({middle!r}).focus();
    return [before, pointed, after, parts()];"""
    before, pointed, after, focused = driven(opened, graph.to_html(nodes=99), script)
    assert before == after and before[0] == [] and not before[2]
    assert pointed == focused and pointed[2]
    ids = list(graph.nodes["id"])
    assert pointed[0] and all(ids.index(middle) in ends for ends in pointed[0])
    node = graph.nodes.set_index("id").loc[middle]
    assert middle in pointed[1] and f"relevance {node['relevance']:+.4g}" in pointed[1]
    into = edges[edges["target"] == middle].set_index("source")["relevance"]
    labels = graph.nodes.set_index("id")["label"]
    strongest = into.abs().nlargest(1).index[0]
    row = re.search(rf"{re.escape(labels[strongest])}\s+([+-][\d.e-]+)", pointed[1])
    assert row and float(row[1]) == pytest.approx(into[strongest], rel=6e-3)


def test_the_keyboard_does_what_the_mouse_does(opened: Opened, graph: AttributionGraph) -> None:
    a, b = drawing_order(graph)[1:3]
    script = f"""const found = [];
    key({a!r}, "Enter"); found.push(chosen());
    key({b!r}, " "); found.push(chosen());
    key({b!r}, " "); found.push(chosen());
    key({b!r}, "Enter"); found.push(chosen());
    key({b!r}, "Escape"); found.push(chosen());
    const controls = all(".tools button, .tools input, g.node, .frame, summary");
    return {{found, pressed: node({b!r}).getAttribute("aria-pressed"),
      unreachable: controls.filter((e) => e.tabIndex < 0).length,
      nameless: all("g.node").filter((g) => !g.getAttribute("aria-label")).length
        + all(".tools button, .tools input").filter((e) =>
            !(e.textContent || e.getAttribute("aria-label") || e.closest("label"))).length,
      role: one("svg").getAttribute("role")}};"""
    found = driven(opened, graph.to_html(), script)
    order = list(graph.nodes["id"])
    assert found["found"] == [[a], sorted([a, b], key=order.index), [a], [b], []]
    assert found["pressed"] == "false" and found["role"] == "group"
    assert found["unreachable"] == found["nameless"] == 0


def test_a_page_runs_our_script_and_no_other(
    opened: Opened, graph: AttributionGraph, tmp_path: Path
) -> None:
    page = graph.to_html(tmp_path / "graph.html")
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy and f"; script-src 'sha256-{digest}'" in policy[1]
    assert policy[1].startswith("default-src 'none'") and page.count(f"<script>{SCRIPT}") == 1
    evil = "<script>document.documentElement.id='owned'</script>"
    dom = opened(
        page.replace("</body>", f"{evil}<img src=x onerror=document.title='owned'></body>")
    )
    assert 'data-ready="1"' in dom
    assert 'id="owned"' not in dom and "<title>owned" not in dom
    assert '<div class="tools" hidden' not in dom
    # Without scripts the picture stands, and what would do nothing is not there.
    dom = opened(page.replace(SCRIPT, ""))
    assert "data-ready" not in dom.split("</style>")[-1]
    for part in ('class="tools"', 'class="panel" role="status"', 'class="state"'):
        assert f"{part} hidden" in dom
    svg = ElementTree.fromstring(dom[dom.index("<svg") : dom.index("</svg>") + 6])
    assert len(list(shown(svg, "g"))) == 25 and svg.attrib["role"] == "img"


def test_the_page_of_a_chosen_unit_opens(opened: Opened, tmp_path: Path) -> None:
    model = tiny("llama", tokenizer=word_tokenizer(), num_hidden_layers=6)
    (tmp_path / "corpus.txt").write_text("a b c d e f\n\nb c d\n\nf e d c", encoding="utf-8")
    dictionary = NeuronDictionary.build(
        model, tmp_path / "corpus.txt", tmp_path / "d", **{**OPTIONS, "progress": False}
    )
    graph = made(40)
    neuron = graph.nodes[graph.nodes["kind"] == "neuron"].iloc[-1]["id"]
    html = graph.to_html(nodes=99, dictionary=dictionary, model=model)
    script = f"""const open = () => all("details[open][data-unit]").map((d) => d.dataset.unit);
    const found = [all("details[data-unit]").length, open()];
    key({neuron!r}, "Enter"); found.push(open(), one(".panel").innerText);
    click("token@1"); return [...found, open()];"""
    pages, before, chosen, panel, after = driven(opened, html, script)
    kinds = graph.nodes["kind"].isin(["neuron", "head"])
    units = {node.split("@")[0] for node in graph.nodes.loc[kinds, "id"]}
    assert pages == len(units) and before == after == []
    assert chosen == [neuron.split("@")[0]] and "writes" in panel and "reads" in panel
