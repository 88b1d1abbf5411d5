"""Files of MIB's circuit track: names against a published file's, and scores written and read."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from lenslrp import InputError, StorageError
from lenslrp.analysis.circuits.edges import EdgeScores, score_edges
from lenslrp.analysis.circuits.mib import from_mib, to_mib
from lenslrp.analysis.circuits.nodes import TARGET, Node
from lenslrp.analysis.circuits.pruning import prune
from lenslrp.analysis.circuits.scores import NodeScores, score_nodes
from tests.unit.analysis.circuits.test_circuits import some_pairs
from tests.unit.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore:the model does not do the task:UserWarning")

NODES = ("tokens", "heads", "mlp")
PUBLISHED = {
    "nodes": "b3f109a2b123d44b495596060f496ff43849c6742042e815a710083d0b5d3067",
    "edges": "6672d04286447197e3765fcba06723573c823578e901c828f9a91fb35cdb8f95",
}
"""SHA-256 of the sorted names, one a line, in circuits/ioi-eap-ig.json of
github.com/hannamw/MIB-circuit-track (GPT-2 small: 158 nodes, 32,491 edges)."""


def names(layers: int, heads: int, parallel: bool = False) -> dict[str, list[str]]:
    """Every node, and every edge from one that comes before the other."""
    order: list[tuple[float, str]] = [(-1.0, "input")]
    for layer in range(layers):
        order += [(layer, f"a{layer}.h{head}") for head in range(heads)]
        order.append((layer if parallel else layer + 0.5, f"m{layer}"))
    order.append((float(layers), "logits"))
    edges = [
        f"{up}->{down}{part}"
        for at, up in order
        for place, down in order
        if at < place
        for part in (["<q>", "<k>", "<v>"] if down.startswith("a") else [""])
    ]
    return {"nodes": sorted(name for _, name in order), "edges": sorted(edges)}


def test_the_names_are_those_of_a_published_file() -> None:
    for kind, each in names(12, 12).items():
        assert sha256("\n".join(each).encode()).hexdigest() == PUBLISHED[kind]


@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_nodes_and_a_circuit_are_written_and_read(family: str, tmp_path: Path) -> None:
    model, pairs = tiny(family), some_pairs()
    scores = score_nodes(model, pairs, components=["heads", "mlp"])
    circuit = prune(scores, nodes=3)
    path = to_mib(scores, model, tmp_path / "importances.json", circuit=circuit)
    content = json.loads(path.read_text())
    parallel = family == "phi"  # attention and MLP side by side
    shape = {"n_layers": 2, "n_heads": 2, "d_model": 16, "parallel_attn_mlp": parallel}
    assert content["cfg"] == {**shape, "generator": "LensLRP"}
    assert {kind: sorted(content[kind]) for kind in PUBLISHED} == names(2, 2, parallel)
    outside = {"a0.h0", "a0.h1", "a1.h0", "a1.h1", "m0", "m1"} - {
        f"a{n.hook[7]}.h{n.unit}" if "attn" in n.hook else f"m{n.hook[7]}" for n in circuit.nodes()
    }
    assert len(outside) == 3
    assert {n for n, node in content["nodes"].items() if not node["in_graph"]} == outside
    for name, edge in content["edges"].items():
        up, down = name.split("<")[0].split("->")
        assert edge == {"score": 0.0, "in_graph": not {up, down} & outside}
    assert set(content["nodes"]["input"]) == set(content["nodes"]["logits"]) == {"in_graph"}
    read, kept = from_mib(path)
    assert isinstance(read, NodeScores)
    for hook, value in scores.values.items():
        assert torch.allclose(read.values[hook][0], value.mean(dim=0).float())
        assert torch.equal(kept.keep[hook], circuit.keep[hook])
    assert read.components == scores.components
    assert prune(read, nodes=3).nodes() == circuit.nodes()
    assert kept.keep["hook_embed"].all()
    assert len(read.to_dataframe()) == 6


def test_edges_are_written_and_read(tmp_path: Path) -> None:
    model, pairs = tiny("gpt2"), some_pairs()
    scores = score_edges(model, pairs, components=(*NODES, "q", "k", "v"))
    path = to_mib(scores, model, tmp_path / "importances.json")
    content = json.loads(path.read_text())
    assert sorted(content["edges"]) == names(2, 2)["edges"]
    assert all(edge["in_graph"] for edge in content["edges"].values())
    assert all(set(node) == {"in_graph"} for node in content["nodes"].values())
    query = Node("blocks.1.attn.hook_q", 1)
    for name, up, down in (
        ("a0.h1->m1", Node("blocks.0.attn.hook_z", 1), Node("blocks.1.hook_mlp_out", 0)),
        ("input->a1.h1<q>", Node("hook_embed", 0), query),
        ("m1->logits", Node("blocks.1.hook_mlp_out", 0), TARGET),
    ):
        assert content["edges"][name]["score"] == pytest.approx(
            float(scores.score(up, down).mean())
        )
    read, circuit = from_mib(path)
    assert isinstance(read, EdgeScores)
    assert all(bool(keep.all()) for keep in circuit.keep.values())
    for hook, component in read.components.items():
        assert component in NODES
        for down in read.into:
            expected = scores.values[hook][:, scores.into.index(down)].mean(dim=0).float()
            assert torch.allclose(read.values[hook][0, read.into.index(down)], expected)
    again = to_mib(read, model, tmp_path / "again.json")
    for name, edge in json.loads(again.read_text())["edges"].items():
        assert edge["score"] == pytest.approx(content["edges"][name]["score"], rel=1e-6)


def test_a_file_of_somebody_else_is_read_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "importances.json"
    nodes: dict[str, Any] = {name: {"in_graph": True} for name in names(1, 2)["nodes"]}
    nodes["a0.h1"] = {"in_graph": False, "score": 0.25}
    cfg = {"n_layers": 1, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 16}
    path.write_text(json.dumps({"cfg": cfg, "nodes": nodes, "edges": {}}))
    read, circuit = from_mib(path)
    assert isinstance(read, NodeScores)
    assert read.values["blocks.0.attn.hook_z"].nan_to_num(-1).tolist() == [[-1, 0.25]]
    assert circuit.complement().nodes() == [Node("blocks.0.attn.hook_z", 1)]
    model = tiny("gpt2")
    scores = score_nodes(model, some_pairs(), components=["heads"])
    with pytest.raises(StorageError, match=r"importances\.json"):
        to_mib(scores, model, path)
    for damaged in (
        {"cfg": cfg, "nodes": nodes},
        {"cfg": cfg, "nodes": nodes, "edges": {"a0.h1->b7": {"score": 1.0}}},
        {"cfg": cfg, "nodes": {}, "edges": {}},
    ):
        path.write_text(json.dumps(damaged))
        with pytest.raises(StorageError, match="is no graph of MIB's circuit track: KeyError"):
            from_mib(path)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, pairs, path = tiny("gpt2"), some_pairs(), tmp_path / "importances.json"
    with pytest.raises(
        InputError,
        match="^MIB's nodes stand for all positions: score with by_position=False$",
    ):
        to_mib(score_nodes(model, pairs, components=["mlp"], by_position=True), model, path)
    with pytest.raises(
        InputError,
        match=r"^blocks\.0\.mlp\.hook_post\[0\] is no node of MIB, whose nodes are tokens, heads "
        r"and mlp$",
    ):
        to_mib(score_nodes(model, pairs, components=["neurons"]), model, path)
    with pytest.raises(
        InputError,
        match=r'^MIB has no edge input->a0\.h0: score with components=\("tokens", "heads", "mlp", '
        r'"q", "k", "v"\)$',
    ):
        to_mib(score_edges(model, pairs, components=NODES), model, path)
    grouped = tiny("llama")
    with pytest.raises(
        InputError,
        match=r"^MIB has a key and a value a head, and blocks\.0\.attn\.hook_k has 1 for 2: edges "
        r"into grouped keys and values do not fit$",
    ):
        to_mib(score_edges(grouped, pairs, components=(*NODES, "q", "k", "v")), grouped, path)
    with pytest.raises(InputError, match=r"^blocks\.0\.attn\.hook_q\[0\] is no node of MIB, whose"):
        to_mib(score_nodes(model, pairs, components=["q"]), model, path)
    assert not path.exists()
