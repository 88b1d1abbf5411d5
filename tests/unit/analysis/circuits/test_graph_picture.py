"""The picture of a graph: in its frame, readable, few nodes at first, pins and supernodes."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.gallery.graphs import SPACE, boxes, curves, faults, numbers, shown
from lenslrp.analysis.circuits.graph.gradients import ABSORBED, NOT_SHOWN
from lenslrp.analysis.circuits.graph.graphs import AttributionGraph, attribution_graph
from lenslrp.analysis.circuits.graph.picture import fitted, graph_svg, text_width
from lenslrp.analysis.circuits.graph.shown import drawing_order, shown_at
from lenslrp.analysis.views.drawing import DARK, LIGHT
from lenslrp.errors import InputError, StorageError
from lenslrp.targets import Logit, LogitDiff
from tests.unit.analysis.circuits.test_graph_views import HOSTILE, wide
from tests.unit.tiny import tiny, word_tokenizer


def made(k: int) -> AttributionGraph:
    model = tiny("llama", tokenizer=word_tokenizer(), num_hidden_layers=6)
    return attribution_graph(model, "a b c d a b", LogitDiff("e", "f"), k=k, node_share=1.0)


@pytest.fixture(scope="module")
def graph() -> AttributionGraph:
    return made(40)


def parsed(graph: AttributionGraph, count: int) -> ElementTree.Element:
    return ElementTree.fromstring(graph_svg(graph, count))


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("k", [4, 12, 40])
def test_everything_is_drawn_inside_the_frame_in_readable_letters(k: int, folded: bool) -> None:
    graph = made(k).folded() if folded else made(k)
    grouped = graph.group({"a group": list(graph.nodes["id"][1:4])}).pin([graph.nodes["id"][2]])
    for shown_graph in (graph, grouped):
        for count in (1, 5, 25, len(graph.nodes)):
            svg = parsed(shown_graph, count)
            width, height = numbers(svg.attrib["viewBox"])[2:]
            assert (float(svg.attrib["width"]), float(svg.attrib["height"])) == (width, height)
            assert faults(svg) == []
            texts = [text.text or "" for text in svg.iter(f"{SPACE}text")]
            assert "'e' - 'f'" in texts


def test_a_page_says_what_its_first_token_stands_for(graph: AttributionGraph) -> None:
    units = int((graph.nodes["position"] == 0).sum()) - 1
    said = f"The first token and {units} units at its position are one node"
    assert units > 1 and said in graph.to_html()
    assert said in graph.label({"token@0": "a subject"}).to_html()
    assert "at its position are one node" not in graph.to_html(first_token=True)


@pytest.mark.parametrize("start", range(0, len(HOSTILE), 5))
def test_labels_of_any_script_stay_in_their_boxes(start: int) -> None:
    tokens = [token * times for token in HOSTILE[start : start + 5] for times in (1, 9)]
    svg = parsed(wide(tokens), 99)
    assert [f for f in faults(svg) if "leaves its box" in f or "overlap" in f] == []


def test_a_fault_would_be_found(graph: AttributionGraph) -> None:
    text = graph_svg(graph, 25)
    assert faults(ElementTree.fromstring(text)) == []
    svg = ElementTree.fromstring(text)
    left, top, width, height = numbers(svg.attrib["viewBox"])
    svg.attrib["viewBox"] = f"{left + 40} {top} {width - 40} {height}"
    assert any("leaves the frame" in fault for fault in faults(svg))
    svg = ElementTree.fromstring(text)
    one, two = list(shown(svg, "g"))[:2]
    two.attrib["transform"] = one.attrib["transform"]
    assert any("overlap" in fault for fault in faults(svg))
    svg = ElementTree.fromstring(text)
    next(next(shown(svg, "g")).iter(f"{SPACE}text")).text = "W" * 20
    assert any("leaves its box" in fault for fault in faults(svg))
    svg = ElementTree.fromstring(text)
    name = next(shown(svg, "text"))
    points = next(curves(svg))[0]
    name.attrib["x"], name.attrib["y"] = (str(v) for v in points[50])
    assert any("runs through" in fault for fault in faults(svg))
    svg = ElementTree.fromstring(text)
    svg.append(next(shown(svg, "path")))
    assert "a curve is drawn over nodes" in faults(svg)


def influences(graph: AttributionGraph) -> dict[str, float]:
    """Each node's, handed down edge by edge."""
    nodes, edges = graph.nodes.set_index("id"), graph.totals
    absorbed = nodes[[*NOT_SHOWN, *ABSORBED]].abs().sum(axis=1)
    ends = edges["relevance"].abs().groupby(edges["target"]).sum().add(absorbed, fill_value=0.0)
    influence = dict.fromkeys(nodes.index, 0.0) | {"target": 1.0}
    for target in reversed(list(nodes.index)):
        into = edges[edges["target"] == target]
        for source, value in zip(into["source"], into["relevance"], strict=True):
            influence[source] += influence[target] * abs(value) / ends[target]
    return influence


def test_the_first_nodes_are_the_most_influential_that_reach_the_target(
    graph: AttributionGraph,
) -> None:
    order = drawing_order(graph)
    assert sorted(order) == sorted(graph.nodes["id"]) and order[0] == "target"
    influence = influences(graph)
    pairs = set(zip(graph.edges["source"], graph.edges["target"], strict=True))
    for place, node in enumerate(order[1:], 1):
        before, later = set(order[:place]), order[place + 1 :]
        reaching = [n for n in order[place:] if any((n, seen) in pairs for seen in before)]
        assert node in reaching or not reaching
        assert (
            influence[node]
            >= max((influence[n] for n in reaching if n in later), default=0) - 1e-12
        )
    assert len(boxes(parsed(graph, 25))) == 25 < len(graph.nodes)
    assert len(boxes(parsed(graph, 999))) == len(graph.nodes)
    assert graph.to_html().count("data-id=") == len(graph.folded().nodes)  # the others are hidden
    with pytest.raises(InputError, match="nodes must be at least 1, not 0"):
        graph.to_html(nodes=0)


def test_every_node_keeps_its_strongest_edges(graph: AttributionGraph) -> None:
    found = shown_at(graph, 25)
    drawn = found.edges[found.edges["drawn"]]
    for end in ("source", "target"):
        assert set(drawn[end]) == set(found.edges[end])
    left_out = found.edges[~found.edges["drawn"]]["relevance"].abs()
    assert len(left_out) > 0 and left_out.max() < 0.05 * found.edges["relevance"].abs().max()


def test_pins_and_supernodes_are_in_every_picture(graph: AttributionGraph) -> None:
    last = drawing_order(graph)[-3:]
    with pytest.raises(InputError, match="pinned: the graph has no node 'x'"):
        graph.pin(["x"])
    with pytest.raises(InputError, match="pinned is a list of nodes, not 'target'"):
        graph.pin("target")
    pinned = graph.pin(last[:1])
    assert len(boxes(parsed(pinned, 5))) == 6 and not graph.pinned
    grouped = graph.group({"last two": last[1:]})
    svg = parsed(grouped, 5)
    labels = [label for _, _, label in boxes(svg)]
    assert len(labels) == 6 and "last two" in labels
    group = [g for g in shown(svg, "g") if "grouped" in g.attrib["class"]]
    assert [g.attrib["data-id"] for g in group] == last[1:2]
    merged = grouped.merged().set_index(["source", "target"])["relevance"]
    edges = shown_at(grouped, 5).edges
    names = {last[1]: "last two"}
    for source, target, value, _ in edges.itertuples(index=False):
        pair = names.get(source, source), names.get(target, target)
        assert merged[pair] == pytest.approx(value)


def test_folding_keeps_pins_supernodes_and_names(graph: AttributionGraph) -> None:
    tower = graph.nodes[(graph.nodes["position"] == 0) & (graph.nodes["kind"] != "target")]
    inside, outside = list(tower["id"]), [n for n in graph.nodes["id"] if n not in set(tower["id"])]
    marked = graph.label({"token@0": "sink"}).pin([inside[1], inside[2], outside[0]])
    marked = marked.group({"one": [inside[1], outside[1]], "two": ["token@0", outside[2]]})
    folded = marked.folded()
    assert folded.pinned == ("token@0", outside[0])
    assert folded.supernodes == {"one": ("token@0", outside[1]), "two": (outside[2],)}
    assert folded.nodes["label"][0] == f"sink +{len(inside) - 1}"


def test_a_file_for_papers_shows_what_the_page_shows(
    graph: AttributionGraph, tmp_path: Path
) -> None:
    for theme in (LIGHT, DARK):
        text = graph.to_svg(tmp_path / "graph.svg", theme=theme)
        assert (tmp_path / "graph.svg").read_text(encoding="utf-8") == text
        svg, page = ElementTree.fromstring(text), parsed(graph.folded(), 25)
        assert faults(svg) == [] and [b[2] for b in boxes(svg)] == [b[2] for b in boxes(page)]
        assert [p.attrib["d"] for p in svg.iter(f"{SPACE}path")] == [
            path.attrib["d"] for path in shown(page, "path")
        ]
        assert 'display="none"' not in text and "<script" not in text and "var(" not in text
        assert theme.paper in text and theme.ink in text
    (tmp_path / "other.svg").write_text("<svg/>", encoding="utf-8")
    with pytest.raises(StorageError, match="not made by LensLRP"):
        graph.to_svg(tmp_path / "other.svg")


def test_a_picture_with_one_node() -> None:
    alone = attribution_graph(tiny("llama", tokenizer=word_tokenizer()), "a", Logit("f"), k=1)
    assert faults(parsed(alone, 1)) == [] and len(boxes(parsed(alone, 1))) == 1


def test_texts_are_cut_to_fit() -> None:
    assert fitted("N13.1033", 76.0) == "N13.1033"
    cut = fitted("internationalisation", 76.0)
    assert cut.endswith("…") and text_width(cut) <= 68 and len(cut) > 7
    assert text_width("漢字") > text_width("ab") > text_width("il")
