"""The attribution graph of a prompt: sums close, pruning keeps them closed, files say the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lenslrp
from lenslrp.analysis.circuits.graph.gradients import ABSORBED
from lenslrp.analysis.circuits.graph.graphs import AttributionGraph, attribution_graph
from lenslrp.analysis.circuits.graph.pruning import influences, influential, strongest
from lenslrp.errors import InputError
from lenslrp.hooks import CPLRP, AttnLRP, Composite, RelP
from lenslrp.targets import Activation, Logit, LogitDiff, LogProb, Sequence
from tests.unit.tiny import tiny, word_tokenizer

TOKENS = torch.tensor([[3, 17, 5, 17, 8, 11]])
WHOLE = {"node_share": 1.0, "edge_share": 1.0}


def entered(graph: AttributionGraph) -> dict[str, float]:
    return dict(graph.edges.groupby("target")["relevance"].sum())


@pytest.mark.parametrize("composite", [AttnLRP(), CPLRP(), RelP()], ids=lambda c: c.name)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi", "qwen3"])
def test_a_whole_graph_neither_loses_nor_makes_relevance(family: str, composite: Composite) -> None:
    model = tiny(family)
    graph = attribution_graph(model, TOKENS, Logit(5), composite=composite, k=20, rows=5, **WHOLE)
    _, R = lenslrp.run_with_relevance(model, TOKENS, Logit(5), composite)
    nodes = graph.nodes.set_index("id")
    out = graph.edges.groupby("source")["relevance"].sum()
    assert graph.error < 1e-9
    assert (nodes["rest"].abs() < 1e-12).all()
    for name, node in nodes.iterrows():
        if node["kind"] == "target":
            assert node["relevance"] == pytest.approx(float(R.target.value[0]), abs=1e-12)
            continue
        if node["kind"] == "token":
            expected = R.tokens if R.positions is None else R.tokens + R.positions
            value = float(expected[0, node["position"]])
        else:
            value = float(R[str(name).split("[")[0]][0, node["position"], node["unit"]].sum())
        assert node["relevance"] == pytest.approx(value, abs=1e-12), name
        near = 1e-6 if family == "gemma2" else 1e-9  # its softmax is float32's
        assert out.get(name, 0.0) == pytest.approx(value, abs=near), name
    assert set(nodes["kind"]) == {"token", "head", "neuron", "target"}
    assert graph.passes.backward == 2 + 20 and graph.passes.forward == 1 + 5


@pytest.mark.parametrize("direct", [False, True])
def test_a_pruned_graph_still_closes_and_says_what_is_not_shown(direct: bool) -> None:
    model = tiny("llama")
    given = {"k": 24, "direct": direct}
    whole = attribution_graph(model, TOKENS, Logit(5), **given, **WHOLE)
    graph = attribution_graph(model, TOKENS, Logit(5), **given, node_share=0.6, edge_share=0.7)
    assert whole.error < 1e-9 and graph.error < 1e-9
    assert 0 < len(graph.edges) < len(whole.edges) and len(graph.nodes) < len(whole.nodes)
    assert (graph.nodes["rest"].abs() > 1e-6).any()
    assert (whole.nodes["rest"].abs() > 1e-6).any() == direct
    inner = graph.nodes[~graph.nodes["kind"].isin(["token", "target"])]["id"]
    assert set(inner) <= set(graph.edges["source"]) and set(inner) <= set(graph.edges["target"])
    assert (graph.nodes["influence"] > 0).sum() > len(inner)
    kept = graph.edges.merge(whole.edges, on=["source", "target"])
    same = np.allclose(kept["relevance_x"], kept["relevance_y"], rtol=0, atol=1e-15)
    assert same == direct  # otherwise what went conducts


def test_nodes_that_go_conduct_as_if_they_had_never_been_chosen() -> None:
    model = tiny("llama")
    graph = attribution_graph(model, TOKENS, Logit(5), k=24, node_share=0.7, edge_share=1.0)
    assert 3 < len(graph.nodes) - 7 < 24
    assert (graph.nodes["rest"].abs() < 1e-12).all() and graph.error < 1e-9
    out = graph.edges.groupby("source")["relevance"].sum()
    for node in graph.nodes.iloc[:-1].to_dict("records"):
        assert out.get(node["id"], 0.0) == pytest.approx(node["relevance"], abs=1e-9)


def test_direct_edges_are_what_the_residual_stream_carries() -> None:
    """All heads and neurons chosen, both kinds of edge are the same."""
    model = tiny("llama")
    given = {"k": 10_000, "rows": 64, **WHOLE}
    folded, direct = (
        attribution_graph(model, TOKENS, Logit(5), direct=direct, **given)
        for direct in (False, True)
    )
    both = folded.edges.merge(direct.edges, on=["source", "target"])
    assert len(both) == len(folded.edges) == len(direct.edges) > 1000
    assert np.allclose(both["relevance_x"], both["relevance_y"], rtol=0, atol=1e-12)
    few = attribution_graph(model, TOKENS, Logit(5), k=10, direct=True, **WHOLE)
    some = few.edges.merge(direct.edges, on=["source", "target"])
    assert np.allclose(some["relevance_x"], some["relevance_y"], rtol=0, atol=1e-12)
    assert len(some) == len(few.edges)


def test_nodes_are_the_most_relevant_up_to_a_share_of_all() -> None:
    model = tiny("llama")
    _, R = lenslrp.run_with_relevance(model, TOKENS, Logit(5))
    names = [f"blocks.{i}.{end}" for i in (0, 1) for end in ("attn.hook_z", "mlp.hook_post")]
    sizes = torch.cat([
        (R[n].sum(-1) if R[n].ndim == 4 else R[n])[0].flatten().abs() for n in names
    ]).sort(descending=True).values  # fmt: skip
    few = attribution_graph(model, TOKENS, Logit(5), k=7, **WHOLE)
    own = few.nodes[few.nodes["kind"].isin(["head", "neuron"])]["relevance"].abs()
    assert sorted(own, reverse=True) == pytest.approx(sizes[:7].tolist(), abs=1e-12)
    half = attribution_graph(model, TOKENS, Logit(5), k=1000, share=0.5, **WHOLE)
    count = half.chosen[0]
    assert float(sizes[:count].sum()) >= 0.5 * float(sizes.sum()) > float(sizes[: count - 1].sum())
    assert half.chosen[1] == len(sizes)


@pytest.mark.parametrize(
    "target",
    [
        LogitDiff(5, 6),
        LogProb(5),
        Activation("blocks.1.mlp.hook_post", 3),
        Sequence([8, 11]),
        None,
    ],
    ids=str,
)
def test_any_target_of_one_prompt(target: object) -> None:
    # The tokens of a span follow the prompt.
    prompt = TOKENS[:, :4] if isinstance(target, Sequence) else TOKENS
    graph = attribution_graph(tiny("gpt2"), prompt, target, k=8, **WHOLE)
    last = graph.nodes.iloc[-1]
    assert graph.error < 1e-9 and last["position"] == len(graph.str_tokens) - 1
    assert last["relevance"] == pytest.approx(float(graph.explained.value[0]))
    assert (abs(last["nonlinear_target"]) > 1e-3) == isinstance(target, LogProb)
    assert (graph.token is None) == isinstance(target, LogitDiff | Activation | Sequence)
    if isinstance(target, LogProb):
        assert np.log(graph.probability) == pytest.approx(last["relevance"], abs=1e-6)


def test_whole_attention_and_mlps_as_nodes() -> None:
    graph = attribution_graph(
        tiny("llama"), TOKENS, Logit(5), components=["attention", "mlp"], k=100, **WHOLE
    )
    # The last layer is relevant at the last position only.
    assert graph.chosen == (2 * 6 + 2, 24) and graph.error < 1e-9
    assert {"attention 0", "mlp 1"} <= set(graph.nodes["label"])


def test_influence_goes_down_in_proportion_and_what_holds_most_of_it_stays() -> None:
    amounts = np.zeros((4, 4))  # 0 a token; 1 and 2 units; 3 the target
    amounts[3, 1], amounts[3, 2], amounts[2, 0], amounts[1, 0] = 3.0, -1.0, 1.0, 2.0
    sinks = np.array([0.0, 2.0, 0.0, 0.0])
    found = influences(amounts, sinks)
    assert found.tolist() == pytest.approx([0.25 + 0.75 / 2, 0.75, 0.25, 1.0])
    fixed = np.array([True, False, False, True])
    assert influential(amounts, sinks, fixed, 0.7).tolist() == [True, True, False, True]
    assert influential(amounts, sinks, fixed, 0.8).tolist() == [True] * 4
    edges, stays, _ = strongest(amounts, sinks, fixed, 0.99)
    assert edges.sum() == 4 and stays.all()
    # 3 <- 1 has .75, 1 <- 0 half of that, 3 <- 2 and 2 <- 0 a quarter each
    edges, stays, _ = strongest(amounts, sinks, fixed, 0.65)
    assert list(zip(*edges.nonzero(), strict=True)) == [(1, 0), (3, 1)]
    assert stays.tolist() == [True, True, False, True]
    edges, stays, _ = strongest(amounts, sinks, fixed, 0.4)  # 1 without what leads to it
    assert not edges.any() and stays.tolist() == fixed.tolist()


def test_edges_go_from_earlier_nodes_to_later_ones() -> None:
    """As influence is handed down: a layer's heads before its neurons."""
    graph = attribution_graph(tiny("llama"), TOKENS, Logit(5), k=30, node_share=1.0, edge_share=1.0)
    place = {node: index for index, node in enumerate(graph.nodes["id"])}
    within = [
        (edge.source, edge.target)
        for edge in graph.edges.itertuples()
        if "blocks.0.attn" in edge.source and "blocks.0.mlp" in edge.target
    ]
    assert within
    assert all(place[edge.source] < place[edge.target] for edge in graph.edges.itertuples())


def test_what_cannot_be_drawn_is_refused_by_name() -> None:
    model = tiny("llama")

    def refuses(text: str, **given: object) -> None:
        with pytest.raises(InputError, match=text):
            attribution_graph(model, **{"input": TOKENS, "target": Logit(5), **given})

    refuses("one prompt; 2 were given", input=TOKENS.repeat(2, 1))
    refuses(
        "components are some of heads, neurons, attention, mlp, recurrent, channels, not",
        components=["residual"],
    )
    refuses(r"components is a list of names, not one name: \['heads'\]", components="heads")
    refuses("k and rows must be at least 1, not 0 and 8", k=0)
    refuses("share must be above 0 and at most 1, not 0", share=0.0)
    refuses("node_share must be above 0 and at most 1, not 2", node_share=2.0)


def test_networkx_has_the_same_nodes_and_edges() -> None:
    import networkx as nx

    graph = attribution_graph(tiny("llama", tokenizer=word_tokenizer()), "a b c d", k=12)
    made = graph.to_networkx()
    assert set(made.nodes) == set(graph.nodes["id"]) and nx.is_directed_acyclic_graph(made)
    found = nx.to_pandas_edgelist(made).set_index(["source", "target"])["relevance"]
    expected = graph.edges.set_index(["source", "target"])["relevance"]
    assert found.sort_index().equals(expected.sort_index())
    assert made.nodes["token@1"]["label"] == graph.str_tokens[1]
    assert graph.top(2)["source_label"].notna().all()
    named = list(graph.top(2).columns)  # a narrow terminal leaves out those in the middle
    assert (*named[:2], named[-1]) == ("source_label", "relevance", "target_label")
    assert list(graph.nodes.columns[-len(ABSORBED) :]) == list(ABSORBED)
