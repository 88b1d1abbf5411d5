"""An attribution graph as HTML, figure and Neuronpedia's JSON; patterns weighted by relevance."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pandas as pd
import pytest
import torch

import lenslrp
from lenslrp.analysis.circuits.graph.export import pairing
from lenslrp.analysis.circuits.graph.graphs import AttributionGraph, attribution_graph
from lenslrp.analysis.circuits.graph.layout import HEIGHT, SLOTS, WIDTH, Layout, grid, lay_out
from lenslrp.analysis.circuits.graph.picture import graph_svg
from lenslrp.analysis.circuits.graph.shown import shown_at
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.analysis.views.circuitsvis import attention_relevance
from lenslrp.analysis.views.drawing import DARK
from lenslrp.errors import InputError
from lenslrp.targets import Explained, Logit, LogitDiff
from lenslrp.text.visible_text import visible
from tests.unit.fake_relevance import NASTY
from tests.unit.tiny import tiny, word_tokenizer

# Half a character is no text that a table can hold, and no tokenizer's token.
HOSTILE = ["<bos>", "</script><script>alert(1)</script>", *(t for t in NASTY if t != "\udc80")]

# What github.com/hijohnnylin/neuronpedia asks of a graph (apps/webapp/app/api/graph/
# graph-schema.json, of April 2026, read in November): what is required, and the types of what we
# write.
STRING, NUMBER, INTEGER = {"type": "string"}, {"type": "number"}, {"type": "integer"}
OPTIONAL = {"type": ["number", "null"]}


def an_object(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required.split(), "properties": properties}


def a_list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


CONTRIBUTOR = {"type": "array", "minItems": 2, "maxItems": 2, "items": [STRING, NUMBER]}

SCHEMA = an_object(
    "metadata qParams nodes links",
    metadata=an_object(
        "slug scan prompt_tokens prompt",
        slug=STRING,
        scan=STRING,
        prompt_tokens=a_list(STRING),
        prompt=STRING,
        node_threshold=NUMBER,
        info=an_object(
            "", description=STRING, generator=an_object("", name=STRING, version=STRING)
        ),
        transcoder_list=a_list(STRING),
        feature_details=an_object("", neuronpedia_source_set=STRING),
        generation_settings={"type": "object"},
        pruning_settings=an_object("", node_threshold=NUMBER, edge_threshold=NUMBER),
    ),
    qParams=an_object(
        "",
        pinnedIds=a_list(STRING),
        supernodes=a_list({**a_list(STRING), "minItems": 2}),
        linkType=STRING,
        clickedId=STRING,
        sg_pos=STRING,
    ),
    nodes=a_list(
        an_object(
            "node_id feature layer ctx_idx feature_type jsNodeId clerp",
            node_id=STRING,
            feature={"type": ["integer", "null"]},
            layer={"type": ["string", "integer"]},
            ctx_idx=INTEGER,
            feature_type=STRING,
            jsNodeId=STRING,
            clerp=STRING,
            influence=OPTIONAL,
            activation=OPTIONAL,
            qk_tracing_results=an_object(
                "pair_wise_contributors top_q_marginal_contributors top_k_marginal_contributors",
                pair_wise_contributors=a_list({"type": "array"}),
                top_q_marginal_contributors=a_list(CONTRIBUTOR),
                top_k_marginal_contributors=a_list(CONTRIBUTOR),
            ),
            token_prob=NUMBER,
            is_target_logit={"type": "boolean"},
            run_idx=INTEGER,
        )
    ),
    links=a_list(an_object("source target weight", source=STRING, target=STRING, weight=NUMBER)),
)


@pytest.fixture(scope="module")
def graph() -> AttributionGraph:
    model = tiny("llama", tokenizer=word_tokenizer())
    return attribution_graph(model, "a b c d e", Logit("f"), k=16)


def wide(tokens: list[str]) -> AttributionGraph:
    """A graph of tokens alone, with one edge each."""
    nodes = pd.DataFrame(
        {"id": [f"token@{i}" for i in range(len(tokens))] + ["target"],
         "kind": ["token"] * len(tokens) + ["target"], "hook": "",
         "layer": [-1] * len(tokens) + [2],
         "position": [*range(len(tokens)), len(tokens) - 1], "unit": 0,
         "label": [*tokens, tokens[0]], "relevance": 1.0, "activation": float("nan"),
         "influence": 0.5, "rest": 0.0, "reconstruction": 0.0}
    )  # fmt: skip
    edges = pd.DataFrame(
        {"source": nodes["id"][:-1], "target": "target", "relevance": -1.0, "via": ""}
    )
    explained = Explained(tokens[0], torch.tensor([1.0]))
    settings = {"composite": "AttnLRP", "node_share": 1.0, "edge_share": 1.0}
    return AttributionGraph(nodes, edges, tokens, list(range(len(tokens))), explained, None, 0.0,
                            2, (0, 0), "<b>model</b>", settings, PassCount())  # fmt: skip


def laid_out(nodes: pd.DataFrame) -> Layout:
    """Of all nodes, in their own order."""
    return lay_out(nodes, grid(nodes, list(nodes["id"])), nodes["id"], {})


def test_the_file_is_what_neuronpedias_schema_asks_for(
    graph: AttributionGraph, tmp_path: Path
) -> None:
    path = graph.to_neuronpedia(tmp_path / "graph.json", slug="a/b c", model_id="tiny-llama")
    made = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.Draft7Validator(SCHEMA).validate(made)
    assert made["metadata"]["slug"] == "a_b_c" and made["metadata"]["scan"] == "tiny-llama"
    assert made["metadata"]["prompt_tokens"] == graph.str_tokens
    nodes = {node["node_id"]: node for node in made["nodes"]}
    assert len(nodes) == len(graph.nodes) == len({node["jsNodeId"] for node in made["nodes"]})
    for ours, node in zip(graph.nodes.to_dict("records"), made["nodes"], strict=True):
        assert node["ctx_idx"] == ours["position"]
        assert node["is_target_logit"] == (ours["kind"] == "target")
        assert 0 < node["influence"] <= 1 + 1e-12
        if ours["kind"] == "neuron":
            assert node["node_id"] == f"{ours['layer']}_{ours['unit']}_{ours['position']}"
            assert node["feature"] == pairing(ours["layer"], ours["unit"])
            assert node["activation"] == pytest.approx(ours["activation"])
    ids = dict(zip(graph.nodes["id"], nodes, strict=True))
    expected = [
        {"source": ids[e["source"]], "target": ids[e["target"]], "weight": e["relevance"]}
        for e in graph.edges.to_dict("records")
    ]
    assert made["links"] == expected and expected
    target = made["nodes"][-1]
    assert target["feature"] == graph.token and target["layer"] == "3"
    assert target["token_prob"] == pytest.approx(graph.probability) and target["token_prob"] > 0
    assert made["nodes"][0]["node_id"] == f"E_{graph.token_ids[0]}_0"
    assert [pairing(*pair) for pair in ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1))] == [0, 1, 2, 3, 4]


def test_a_target_that_is_no_token_has_a_name_and_no_probability(tmp_path: Path) -> None:
    model = tiny("llama", tokenizer=word_tokenizer())
    graph = attribution_graph(model, "a b c", LogitDiff("e", "f"), k=4)
    made = json.loads(graph.to_neuronpedia(tmp_path / "graph.json").read_text(encoding="utf-8"))
    jsonschema.Draft7Validator(SCHEMA).validate(made)
    assert made["nodes"][-1]["token_prob"] == 0 and "difference" in made["nodes"][-1]["clerp"]


def test_the_picture_shows_every_edge_with_its_sign_and_width(graph: AttributionGraph) -> None:
    svg = ElementTree.fromstring(graph_svg(graph, len(graph.nodes)))
    space = "{http://www.w3.org/2000/svg}"
    paths = svg.findall(f"{space}path")
    assert len(paths) == len(graph.edges)
    ids = list(graph.nodes["id"])
    limit = graph.edges["relevance"].abs().max()
    by_ends = graph.edges.set_index(["source", "target"])["relevance"]
    for path in paths:
        value = by_ends[ids[int(path.attrib["data-a"])], ids[int(path.attrib["data-b"])]]
        assert path.attrib["class"] == ("plus" if value >= 0 else "minus")
        assert float(path.attrib["data-value"]) == pytest.approx(value, rel=1e-5)
        if "display" not in path.attrib:
            assert float(path.attrib["stroke-width"]) == pytest.approx(
                max(0.6, 9 * abs(value) / limit), abs=0.006
            )
        assert re.search(r": [+-]", path.findtext(f"{space}title") or "")
    groups = svg.findall(f"{space}g")
    assert len(groups) == len(graph.nodes)
    titles = [group.findtext(f"{space}title") or "" for group in groups]
    assert all("relevance" in title and "position" in title for title in titles)
    assert graph_svg(graph, 9) == graph_svg(graph, 9)


def test_tokens_go_left_to_right_and_layers_bottom_to_top(graph: AttributionGraph) -> None:
    places = laid_out(graph.nodes).places
    nodes = graph.nodes.to_dict("records")
    for a in nodes:
        for b in nodes:
            (xa, ya), (xb, yb) = places[a["id"]], places[b["id"]]
            if a["position"] < b["position"]:
                assert xa + WIDTH <= xb
            if a["layer"] < b["layer"]:
                assert ya >= yb + HEIGHT
            if a["id"] != b["id"]:
                assert abs(xa - xb) >= WIDTH or abs(ya - yb) >= HEIGHT
    crowd = wide(["a"]).nodes.loc[[0] * (len(SLOTS) + 2)].reset_index(drop=True)
    crowd["id"] = [str(i) for i in range(len(crowd))]
    assert len(set(laid_out(crowd).places.values())) == len(SLOTS) + 2


@pytest.mark.parametrize("start", range(0, len(HOSTILE), 5))
def test_tokens_are_text_wherever_they_are_shown(start: int, tmp_path: Path) -> None:
    tokens = HOSTILE[start : start + 5]
    graph = wide(tokens)
    html = graph.to_html()
    svg = html[html.index("<svg ") : html.index("</svg>") + 6]
    ElementTree.fromstring(svg)
    assert html.count("<script>") == 1 and html.count("</script>") == 1
    assert not re.search(r"<(img|b|bos)\b|javascript:|https?://(?!www\.w3\.org/2000/svg)", html)
    for token in tokens:
        assert visible(token) in unescape(svg), token
    graph.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and html in page
    made = graph.to_neuronpedia(tmp_path / "graph.json").read_text(encoding="utf-8")
    assert json.loads(made)["metadata"]["prompt_tokens"] == tokens
    graph.draw()


def test_the_first_tokens_tower_is_one_node_and_sums_stay() -> None:
    model = tiny("llama", tokenizer=word_tokenizer(), num_hidden_layers=4)
    graph = attribution_graph(model, "a b c", LogitDiff("e", "f"), k=60, node_share=1.0)
    tower = graph.nodes[(graph.nodes["position"] == 0) & (graph.nodes["kind"] != "target")]
    assert len(tower) >= 3  # the token and two heads
    folded = graph.folded()
    assert len(folded.nodes) == len(graph.nodes) - len(tower) + 1
    assert folded.error == pytest.approx(graph.error, abs=1e-9)
    one = folded.nodes.iloc[0]
    units = (tower["kind"] != "token").sum()
    assert one["kind"] == "token" and one["label"] == f"{graph.str_tokens[0]} +{units}"
    inside = set(tower["id"])
    leaving = graph.edges[graph.edges["source"].isin(inside) & ~graph.edges["target"].isin(inside)]
    assert one["relevance"] == pytest.approx(leaving["relevance"].sum())
    into = folded.edges[folded.edges["source"] == one["id"]].set_index("target")["relevance"]
    expected = leaving.groupby("target")["relevance"].sum()
    assert into.to_dict() == pytest.approx(expected.to_dict())
    assert len(folded.folded().nodes) == len(folded.nodes)
    assert graph.to_html(first_token=True).count('<g class="node') == len(graph.nodes)
    assert graph.to_html().count('<g class="node') == len(folded.nodes)


def test_the_card_follows_the_page_and_the_system(graph: AttributionGraph) -> None:
    html = graph._repr_html_()
    rules = ["@media (prefers-color-scheme:dark){.lenslrp-graph{", ".vscode-dark .lenslrp-graph",
             '[data-jp-theme-light="false"] .lenslrp-graph']  # fmt: skip
    for rule in rules:
        assert rule in html


def test_the_figure_has_a_line_for_each_edge_in_both_themes(graph: AttributionGraph) -> None:
    from matplotlib.patches import FancyBboxPatch, PathPatch

    folded = graph.folded()
    for figure, shown in (
        (graph.draw(first_token=True), graph),
        (graph.draw(theme=DARK, first_token=True), graph),
        (graph.draw(), folded),
    ):
        patches = figure.axes[0].patches
        assert (
            sum(isinstance(p, PathPatch) for p in patches)
            == shown_at(shown, 25).edges["drawn"].sum()
        )
        assert sum(isinstance(p, FancyBboxPatch) for p in patches) == len(shown.nodes)
        figure.canvas.draw()
    assert graph.draw().get_facecolor() != graph.draw(theme=DARK).get_facecolor()


def test_patterns_weighted_by_relevance_are_those_of_the_hook_point() -> None:
    model = tiny("llama")
    tokens = torch.tensor([[3, 17, 5, 17, 8, 11], [2, 9, 2, 21, 9, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    _, R = lenslrp.run_with_relevance(
        model, tokens, Logit(5), names_filter="attn.hook_pattern", attention_mask=mask
    )
    view = attention_relevance(R, 1, row=1)
    found = torch.tensor(view.props["attention"], dtype=torch.float64)
    pattern = R["blocks.1.attn.hook_pattern"][1]
    assert torch.equal(found, pattern[:, :5, :5].double())
    assert view.props["tokens"][0] == "\u20682\u2069" and len(view.props["tokens"]) == 5
    sums = [f"1.{head}: {float(pattern[head].sum()):+.3g}" for head in range(2)]
    assert view.props["attentionHeadNames"] == sums
    assert float(pattern.abs().sum()) > 1e-3
    with pytest.raises(InputError, match="no relevance was read at 'blocks.7"):
        attention_relevance(R, 7)
    _, R = lenslrp.run_with_relevance(
        model, tokens, Logit(5), names_filter="attn.hook_pattern", reduce="sum"
    )
    with pytest.raises(InputError, match="patterns were reduced"):
        attention_relevance(R, 0)
