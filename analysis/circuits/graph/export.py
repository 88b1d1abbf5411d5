"""An attribution graph as Neuronpedia's graph JSON.

The schema is that of Neuronpedia (`apps/webapp/app/api/graph/graph-schema.json` in
github.com/hijohnnylin/neuronpedia), the conventions for ids and types those of circuit-tracer
(`circuit_tracer/frontend/graph_models.py` in github.com/safety-research/circuit-tracer):
`layer_feature_position` with `E` for tokens, the layer above the last for the target,
`feature` a pairing of layer and index, `influence` the cumulative share up to a node.

Its viewers know features of transcoders and of attention, reconstruction errors, embeddings and
logits. Features of any coder are given the first type; neurons and heads are given types, too, and
named in `clerp` for what they are. What a graph keeps as `rest` or as absorbed has no place there;
the description says how much of the target it is. Supernodes are pinned, or viewers do not show
them. Where edges into a head are told apart by query, key and value, the strongest of the first two
are its `qk_tracing_results`; all three are in its links.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lenslrp.analysis.circuits.graph.gradients import default_label
from lenslrp.analysis.circuits.nodes import largest
from lenslrp.files import slug as safe_name
from lenslrp.files import whole
from lenslrp.version import VERSION

if TYPE_CHECKING:
    from lenslrp.analysis.circuits.graph.result import AttributionGraph

VIEWER_TYPES = {
    "token": "embedding",
    "neuron": "cross layer transcoder",
    "mlp": "cross layer transcoder",
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "head": "lorsa",
    "attention": "lorsa",
    "recurrent head": "lorsa",
    "channel": "cross layer transcoder",
    "target": "logit",
}
"""Kind of node -> the type as which viewers draw it."""

BESIDE_NEURONS = {"head": "h", "attention": "h", "recurrent head": "r", "channel": "c"}
"""Kind of node -> what its number begins with."""


TRACED = 10
"""How many nodes are named that a head's query, or key, owes most to."""


def pairing(layer: int, index: int) -> int:
    """Cantor's pairing of two numbers."""
    return (layer + index) * (layer + index + 1) // 2 + index


def to_neuronpedia(
    graph: AttributionGraph, *, slug: str, model_id: str | None, source_set: str | None
) -> dict[str, Any]:
    """The graph as JSON values."""
    influence = graph.nodes["influence"].to_numpy()
    order = np.argsort(-influence, kind="stable")
    reached = np.empty(len(order))
    reached[order] = np.cumsum(influence[order]) / influence.sum()
    records = graph.nodes.assign(reached=reached).to_dict("records")
    first = _first_places(records)
    nodes = [_node(record, graph, first) for record in records]
    ids = {record["id"]: node["node_id"] for record, node in zip(records, nodes, strict=True)}
    if graph.settings.get("attention") == "qkv":
        for record, node in zip(records, nodes, strict=True):
            if record["kind"] == "head":
                node["qk_tracing_results"] = _through_query_and_key(graph, record["id"], ids)
    settings = dict(graph.settings)
    last = records[-1]
    entered = float(graph.edges.loc[graph.edges["target"] == "target", "relevance"].sum())
    hidden = last["rest"] + last["reconstruction"]
    supernodes = [
        [name, *(ids[node] for node in members)] for name, members in graph.supernodes.items()
    ]
    details = {} if source_set is None else {
        "feature_details": {"neuronpedia_source_set": source_set}
    }  # fmt: skip
    about = (
        f"{graph.explained}, by {settings['composite']}: {entered:+.4g} along the edges into it, "
        f"{hidden:+.4g} from what is not shown, "
        f"{last['relevance'] - entered - hidden:+.4g} absorbed. Weights are relevance, in "
        "units of the target."
    )
    return {
        "metadata": {
            "slug": safe_name(slug),
            "scan": model_id or safe_name(graph.model_name).lower(),
            "info": {
                "description": about,
                "generator": {"name": "LensLRP", "version": VERSION},
            },
            "transcoder_list": [coder.name for coder in graph.coders],
            **details,
            "prompt_tokens": list(graph.str_tokens),
            "prompt": graph.prompt,
            "node_threshold": 1.0,
            "schema_version": 1,
            "generation_settings": settings,
            "pruning_settings": {
                "node_threshold": settings["node_share"],
                "edge_threshold": settings["edge_share"],
            },
        },
        "qParams": {
            "pinnedIds": [node for _, *members in supernodes for node in members],
            "supernodes": supernodes, "linkType": "both", "clickedId": "", "sg_pos": "",
        },
        "nodes": nodes,
        "links": [
            {"source": ids[edge["source"]], "target": ids[edge["target"]],
             "weight": float(edge["relevance"])}
            for edge in graph.totals.to_dict("records")
        ],
    }  # fmt: skip


def _through_query_and_key(
    graph: AttributionGraph, head: str, ids: Mapping[str, str]
) -> dict[str, list[list[Any]]]:
    """The strongest edges into a head through its query and its key; of pairs nothing is known."""
    edges = graph.edges[graph.edges["target"] == head]
    found: dict[str, list[list[Any]]] = {"pair_wise_contributors": []}
    for via in ("q", "k"):
        best = largest(edges[edges["via"] == via], "relevance", TRACED)
        found[f"top_{via}_marginal_contributors"] = [
            [ids[source], float(relevance)]
            for source, relevance in zip(best["source"], best["relevance"], strict=True)
        ]
    return found


def _first_places(records: list[dict[str, Any]]) -> dict[tuple[int, str], str]:
    """(layer, type) -> the hook point whose nodes have ids of viewers' own form; others of the same
    layer and type, of a second coder, need ids of their own."""
    first: dict[tuple[int, str], str] = {}
    for node in records:
        first.setdefault((int(node["layer"]), VIEWER_TYPES[node["kind"]]), node["hook"])
    return first


def _node(
    node: dict[str, Any], graph: AttributionGraph, first: dict[tuple[int, str], str]
) -> dict[str, Any]:
    kind, layer, unit = node["kind"], int(node["layer"]), int(node["unit"])
    place = int(node["position"])
    target = kind == "target"
    named, feature, shown = f"{layer}_{unit}", pairing(max(layer, 0), unit), str(layer)
    if kind == "token":
        named, feature, shown = f"E_{graph.token_ids[place]}", place, "E"
    elif target:
        token = -1 if graph.token is None else graph.token
        named, feature, shown = f"{layer + 1}_{token}", token, str(layer + 1)
    elif kind in BESIDE_NEURONS:  # beside the neuron of the same number
        named = f"{layer}_{BESIDE_NEURONS[kind]}{unit}"
    elif kind == "error":
        named, feature = f"{layer}_-1", -1
    if node["hook"] != first[layer, VIEWER_TYPES[kind]]:
        named = f"{named}_{safe_name(node['hook'])}"
    # The target of something else than a token has a name, not a probability.
    text = {
        "token": node["label"],
        "target": f"Output {node['label']!r} (p={graph.probability:.3f})"
        if graph.token is not None
        else graph.explained.text,
    }.get(kind, f"{kind} {layer}.{unit}")
    if kind not in ("token", "target") and node["label"] != default_label(kind, layer, unit):
        text = node["label"]
    activation = float(node["activation"])
    return {
        "node_id": f"{named}_{place}",
        "feature": feature,
        "layer": shown,
        "ctx_idx": place,
        "feature_type": VIEWER_TYPES[kind],
        "token_prob": graph.probability if target else 0.0,
        "is_target_logit": target,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{named}-{place}",
        "clerp": text,
        "influence": float(node["reached"]),
        "activation": activation if np.isfinite(activation) else None,
    }


def write_neuronpedia(
    graph: AttributionGraph, path: Path, *, slug: str, model_id: str | None, source_set: str | None
) -> Path:
    """Write `to_neuronpedia` at `path`."""
    graph_json = to_neuronpedia(graph, slug=slug, model_id=model_id, source_set=source_set)
    with whole(path, ours=b'"name": "LensLRP"') as temporary:
        temporary.write_text(json.dumps(graph_json, allow_nan=False, indent=1), encoding="utf-8")
    return path
