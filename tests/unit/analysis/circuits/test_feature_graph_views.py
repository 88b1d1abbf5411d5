"""Graphs of features: supernodes, names, pictures, Neuronpedia's JSON, refusals, what they cost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pandas as pd
import pytest
import torch

from lenslrp.analysis import Feature, SparseCoder, attribution_graph, estimate_graph, writes
from lenslrp.analysis.circuits.graph import options
from lenslrp.analysis.circuits.graph.export import pairing
from lenslrp.analysis.circuits.graph.picture import graph_svg
from lenslrp.analysis.circuits.graph.result import AttributionGraph
from lenslrp.analysis.circuits.graph.supernodes import clusters
from lenslrp.analysis.units import readability
from lenslrp.errors import InputError
from lenslrp.targets import Logit
from tests.unit.analysis.circuits.test_graph_views import SCHEMA
from tests.unit.tiny import tiny, word_tokenizer

FEATURES = 40


def coder(hook: str, out: str | None = None, *, name: str = "tc", seed: int = 0) -> SparseCoder:
    made = torch.Generator().manual_seed(seed)
    sizes = {"W_enc": (16, FEATURES), "b_enc": (FEATURES,), "W_dec": (FEATURES, 16), "b_dec": (16,)}
    weights = {
        key: torch.randn(*size, generator=made, dtype=torch.float64) * 0.4
        for key, size in sizes.items()
    }
    return SparseCoder(hook, **weights, hook_out=out, name=name)


CODERS = [
    coder("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"),
    coder("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out", seed=1),
    coder("blocks.1.hook_resid_pre", name="sae", seed=2),
]


@pytest.fixture(scope="module")
def graph() -> AttributionGraph:
    model = tiny("llama", tokenizer=word_tokenizer())
    given = {"coders": CODERS, "components": ["heads"], "node_share": 1.0, "edge_share": 1.0}
    return attribution_graph(model, "a b c d e", Logit("f"), k=130, attention="qkv", **given)


def test_nodes_say_what_they_are(graph: AttributionGraph) -> None:
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    errors = graph.nodes[graph.nodes["kind"] == "error"]
    assert len(features) > 5 and len(errors) > 3
    for node in features.to_dict("records"):
        own = next(c for c in CODERS if node["hook"] == f"{c.hook}[{c.name}]")
        assert node["id"] == f"{Feature(own, node['unit'])}@{node['position']}"
        assert node["label"] == f"F{node['layer']}.{node['unit']}" and node["activation"] > 0
    assert set(errors["label"]) <= {"error 0", "error 1"}
    assert not set(errors["id"]) & set(graph.edges["target"])
    assert set(errors["id"]) <= set(graph.edges["source"])
    order = {hook: i for i, hook in enumerate(dict.fromkeys(graph.nodes["hook"]))}
    assert order["blocks.1.hook_resid_pre[sae]"] < order["blocks.1.attn.hook_z"]
    assert order["blocks.1.attn.hook_z"] < order["blocks.1.mlp.hook_in[tc]"]


def test_nodes_are_units_that_are_steered(graph: AttributionGraph) -> None:
    kinds = graph.nodes.set_index("id")["kind"]
    for node, kind in kinds[kinds.isin(["feature", "head"])].items():
        assert str(graph.unit(node)) == node.rpartition("@")[0]
        assert isinstance(graph.unit(node), Feature) == (kind == "feature")
    for other, message in (("token@0", "'token' is no neuron"), ("H0.1", "has no node 'H0.1'")):
        with pytest.raises(InputError, match=message):
            graph.unit(other)


def test_supernodes_hold_the_edges_of_their_members(graph: AttributionGraph) -> None:
    one, two, three = graph.nodes["id"][graph.nodes["kind"] == "feature"].tolist()[:3]
    grouped = graph.group({"pair": [one, two], "tokens": ["token@0", "token@1"]})
    assert grouped.supernodes == {"pair": (one, two), "tokens": ("token@0", "token@1")}
    merged = grouped.merged().set_index(["source", "target"])["relevance"]
    totals = graph.totals.set_index(["source", "target"])["relevance"]
    for source, target in merged.index:
        ups = grouped.supernodes.get(source, (source,))
        downs = grouped.supernodes.get(target, (target,))
        expected = sum(totals.get((u, d), 0.0) for u in ups for d in downs)
        assert merged[source, target] == pytest.approx(expected, abs=1e-12)
    inside = sum(totals.get((u, d), 0.0) for u in (one, two) for d in (one, two))
    assert merged.sum() == pytest.approx(totals.sum() - inside, abs=1e-12)
    assert not graph.supernodes and "pair" in set(merged.index.get_level_values("source"))
    for text, groups in (
        ("supernode 'x': the graph has no node 'y'", {"x": ["y"]}),
        (f"{one} is in two supernodes, 'x' and 'z'", {"x": [one], "z": [three, one]}),
        ("supernode 'x' is a list of nodes, at least one", {"x": []}),
        ("supernode 'x' is a list of nodes, at least one", {"x": one}),
    ):
        with pytest.raises(InputError) as error:
            graph.group(groups)
        assert str(error.value) == text


def test_similar_nodes_write_alike_or_act_alike(graph: AttributionGraph) -> None:
    same: dict[str, list[str]] = {}
    for node in graph.nodes[graph.nodes["kind"] == "feature"].to_dict("records"):
        same.setdefault(node["id"].rpartition("@")[0], []).append(node["id"])
    expected = {tuple(nodes) for nodes in same.values() if len(nodes) > 1}
    assert {tuple(nodes) for nodes in graph.similar(threshold=1 - 1e-9).values()} == expected
    assert expected and graph.group(graph.similar(threshold=1 - 1e-9)).supernodes
    wide = graph.similar(threshold=0.3)
    assert sum(len(nodes) for nodes in wide.values()) > sum(len(nodes) for nodes in expected)
    alike = graph.similar("influence", 0.5)
    members = [node for nodes in alike.values() for node in nodes]
    assert members and len(members) == len(set(members))
    assert not {"target", "token@0"} & set(members)
    for given in ({"by": "colour"}, {"threshold": 2.0}):
        with pytest.raises(InputError, match="alike by one of decoder, influence|0 to 1, not 2.0"):
            graph.similar(**given)


def test_average_linkage() -> None:
    similarity = np.array([[1, 0.9, 0.5, 0], [0.9, 1, 0.1, 0], [0.5, 0.1, 1, 0.2], [0, 0, 0.2, 1]])
    assert clusters(similarity, 0.95) == [[0], [1], [2], [3]]
    assert clusters(similarity, 0.35) == [[0, 1], [2], [3]]
    assert clusters(similarity, 0.3) == [[0, 1, 2], [3]]  # (.5 + .1) / 2
    assert clusters(similarity, 0.06) == [[0, 1, 2, 3]]  # (0 + 0 + .2) / 3


def test_names_come_from_tables_and_from_the_vocabulary(
    graph: AttributionGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", tokenizer=word_tokenizer())
    assert graph.vocabulary_labels(model, 2) == {}  # random rows: nothing can be read
    monkeypatch.setattr(readability, "CHANCE", 45)  # all tokens of a list are related
    labels = graph.vocabulary_labels(model, 2)
    node = graph.nodes[graph.nodes["kind"] == "feature"].to_dict("records")[0]
    text = node["id"].rpartition("@")[0]
    unit = Feature(next(c for c in CODERS if text.startswith(f"{c.hook}[{c.name} ")), node["unit"])
    assert labels[text] == ", ".join(writes(model, unit).top(2)["token"])
    named = graph.label(labels)
    shown = named.nodes.set_index("id")["label"]
    assert shown[node["id"]] == labels[text] and shown["token@0"] == graph.str_tokens[0]
    table = pd.DataFrame({"unit": [text, "token@0"], "label": ["cities", "the <first>"]})
    both = graph.label(dict(zip(table["unit"], table["label"], strict=True)))
    assert set(both.nodes["label"][both.nodes["id"].str.startswith(f"{text}@")]) == {"cities"}
    assert "the &lt;first&gt;" in graph_svg(both, 99) and "cities" in graph_svg(both, 99)
    with pytest.raises(InputError, match="the graph has no node or unit 'blocks.9'"):
        graph.label({"blocks.9": "x"})


def test_the_file_holds_features_errors_and_supernodes(
    graph: AttributionGraph, tmp_path: Path
) -> None:
    first = graph.nodes[graph.nodes["kind"] == "feature"].iloc[0]
    grouped = graph.group({"a pair": [first["id"], "token@0"]}).label({first["id"]: "cities"})
    path = grouped.to_neuronpedia(tmp_path / "graph.json", source_set="mine")
    made = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.Draft7Validator(SCHEMA).validate(made)
    assert made["metadata"]["transcoder_list"] == ["tc", "tc", "sae"]
    assert made["metadata"]["feature_details"] == {"neuronpedia_source_set": "mine"}
    ours = grouped.nodes.to_dict("records")
    ids = {node["id"]: theirs["node_id"] for node, theirs in zip(ours, made["nodes"], strict=True)}
    assert len(set(ids.values())) == len(ours)
    assert len({node["jsNodeId"] for node in made["nodes"]}) == len(ours)
    assert made["qParams"]["supernodes"] == [["a pair", ids[first["id"]], ids["token@0"]]]
    assert made["qParams"]["pinnedIds"] == [ids[first["id"]], ids["token@0"]]
    seen = set()
    for node, theirs in zip(ours, made["nodes"], strict=True):
        layer, unit, place = node["layer"], node["unit"], node["position"]
        if node["kind"] == "feature":
            assert theirs["feature_type"] == "cross layer transcoder"
            assert theirs["feature"] == pairing(layer, unit)
            seen.add(theirs["node_id"] == f"{layer}_{unit}_{place}")
        if node["kind"] == "error":
            assert theirs["feature_type"] == "mlp reconstruction error"
            assert theirs["feature"] == -1 and theirs["node_id"].startswith(f"{layer}_-1_")
        heads = node["kind"] == "head"
        assert heads == ("qk_tracing_results" in theirs)
        for via in "qk" if heads else "":
            traced = theirs["qk_tracing_results"][f"top_{via}_marginal_contributors"]
            edges = graph.edges[(graph.edges["target"] == node["id"]) & (graph.edges["via"] == via)]
            sizes = [abs(weight) for _, weight in traced]
            assert sizes == sorted(sizes, reverse=True) and len(traced) == min(10, len(edges))
            known = dict(zip(edges["source"].map(ids), edges["relevance"], strict=True))
            assert all(known[source] == weight for source, weight in traced)
    assert seen == {True, False}  # the second coder of layer 1 has ids of its own
    texts = {theirs["clerp"] for theirs in made["nodes"]}
    assert "cities" in texts and "error 1.0" in texts
    sums = {(link["source"], link["target"]): link["weight"] for link in made["links"]}
    assert len(sums) == len(made["links"]) == len(graph.totals) < len(graph.edges)


def test_pictures_show_features_and_errors(graph: AttributionGraph) -> None:
    svg = ElementTree.fromstring(graph_svg(graph, 99))
    space = "{http://www.w3.org/2000/svg}"
    assert len(svg.findall(f"{space}path")) == len(graph.totals)
    titles = [group.findtext(f"{space}title") or "" for group in svg.findall(f"{space}g")]
    assert any(title.startswith("F1.") for title in titles)
    errors = [title for title in titles if title.startswith("error ")]
    assert errors and not any("from edges" in title for title in errors)
    assert any("from errors that are not shown" in title for title in titles)
    rows = [text.text for text in svg.findall(f"{space}text")]
    assert rows.count("features 1") == 2 and "errors 0" in rows  # two coders write in layer 1
    assert svg.findall(f".//{space}rect[@class='tint error']")
    graph.draw()
    html = graph.to_html()
    assert "from what is not in the graph" in html


def test_networkx_has_one_edge_a_pair_and_its_ways_in(graph: AttributionGraph) -> None:
    made = graph.to_networkx()
    assert made.number_of_edges() == len(graph.totals)
    split = graph.edges[graph.edges["via"] != ""].iloc[0]
    edge = made.edges[split["source"], split["target"]]
    assert edge[split["via"]] == split["relevance"]
    ways = [edge[via] for via in ("q", "k", "v") if via in edge]
    assert edge["relevance"] == pytest.approx(sum(ways), abs=1e-12)


def test_what_a_graph_costs_is_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    tokens = torch.tensor([[3, 17, 5, 17, 8, 11]])
    given = {"coders": CODERS, "k": 30, "rows": 4}
    cost = estimate_graph(model, tokens, Logit(5), **given)
    graph = attribution_graph(model, tokens, Logit(5), node_share=1.0, edge_share=1.0, **given)
    assert (cost.nodes, cost.candidates) == (30 + 6 + 1, graph.chosen[1])
    assert cost.backward == graph.passes.backward - 2 and cost.rows == 4
    # What one row holds grows with the prompt, and twice the rows hold twice as much.
    longer = estimate_graph(model, tokens.repeat(1, 3), Logit(5), **given)
    assert 2 < longer.row_bytes / cost.row_bytes < 9
    assert cost.memory == 5 * cost.row_bytes + cost.graph_bytes
    fit = cost.within(cost.graph_bytes + 3.5 * cost.row_bytes)
    assert fit.rows == 2 and cost.within(1e12).rows == 4
    assert "37 nodes of" in str(cost) and "GB" in str(cost)
    less = attribution_graph(
        model, tokens, Logit(5), max_memory=cost.graph_bytes + 3.5 * cost.row_bytes, **given,
        node_share=1.0, edge_share=1.0,
    )  # fmt: skip
    assert less.passes.forward == graph.passes.forward - 2 + 1
    both = less.edges.merge(graph.edges, on=["source", "target"])
    assert np.allclose(both["relevance_x"], both["relevance_y"], rtol=0, atol=1e-12)
    rowless = {key: value for key, value in given.items() if key != "rows"}
    assert estimate_graph(model, tokens, Logit(5), **rowless).rows == options.ROWS == 8
    monkeypatch.setattr(options, "MEMORY", cost.graph_bytes + 4.5 * cost.row_bytes)
    assert estimate_graph(model, tokens, Logit(5), **rowless).rows == 3
    third = attribution_graph(model, tokens, Logit(5), node_share=1.0, edge_share=1.0, **rowless)
    assert third.passes.forward == 2 + 1 + 3  # the candidates, the estimate, three rows
    monkeypatch.setattr(options, "MEMORY", 1.0)
    assert estimate_graph(model, tokens, Logit(5), **rowless).rows == 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'lines'"):
        estimate_graph(model, tokens, Logit(5), lines=3)
    with pytest.raises(InputError) as error:
        replace(cost, row_bytes=2_000_000_000, graph_bytes=0).within(1e9)
    assert str(error.value) == (
        "a graph of 37 nodes needs 4.00 GB with one row at a time, more than max_memory, 1.00 GB: "
        "choose fewer nodes (k), or a shorter prompt"
    )


def test_coders_that_cannot_stand_are_refused_by_name() -> None:
    model, tokens = tiny("llama"), torch.tensor([[3, 17, 5]])

    def refuses(text: str, *coders: object, **given: object) -> None:
        with pytest.raises(InputError) as error:
            attribution_graph(model, tokens, Logit(5), coders=coders, **given)
        assert text in str(error.value)

    mlp = CODERS[0]
    refuses("attention is one of composite, frozen, qkv, not 'cold'", attention="cold")
    narrow = replace(mlp, W_dec=torch.zeros(FEATURES, 7), b_dec=torch.zeros(7), hook_out=None)
    refuses("tc reads 16 values a position at blocks.0.mlp.hook_in and writes 7: give hook_out, "
            "where it writes", narrow)  # fmt: skip
    refuses("tc writes 7 values a position, blocks.0.hook_mlp_out is [1, 3, 16]",
            replace(narrow, hook_out="blocks.0.hook_mlp_out"))  # fmt: skip
    refuses("no hook point 'blocks.7.mlp.hook_in'", replace(mlp, hook="blocks.7.mlp.hook_in"))
    refuses("tc and b both stand at blocks.0.hook_mlp_out", mlp,
            replace(mlp, name="b"))  # fmt: skip
    refuses("tc and tc both stand at blocks.0.mlp.hook_in[tc]", mlp,
            replace(mlp, hook_out="blocks.1.hook_mlp_out"))  # fmt: skip
    refuses("tc writes at blocks.0.hook_mlp_out, which runs before blocks.1.mlp.hook_in, that it "
            "reads", replace(mlp, hook="blocks.1.mlp.hook_in"))  # fmt: skip
    refuses("in this model blocks.0.hook_resid_mid is the input of",
            coder("blocks.0.hook_resid_mid"))  # fmt: skip
    refuses("components are some of", components=())
