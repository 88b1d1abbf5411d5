"""Scores and circuits as files of MIB's circuit track (`importances.json`).

The schema is that of EAP-IG's graphs (`Graph.to_json` in github.com/hannamw/EAP-IG), which MIB's
evaluation reads (Mueller et al. 2025): `cfg`; `nodes`, by name, each with `in_graph` and, at node
level, `score`; `edges`, by name, each with `score` and `in_graph`. Nodes are `input` (the
embeddings), `a0.h1` (a head), `m0` (an MLP) and `logits`; an edge into a head is into its query,
key or value: `a0.h1->a2.h0<q>`. MIB keeps nodes that have no score in every circuit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lenslrp.analysis.circuits.edges import EdgeScores
from lenslrp.analysis.circuits.nodes import COMPONENTS, TARGET, Node
from lenslrp.analysis.circuits.pruning import Circuit
from lenslrp.analysis.circuits.scores import NodeScores
from lenslrp.analysis.common.storage import load_json, save_json
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.errors import InputError, StorageError
from lenslrp.hooks.structure import layer_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

NAMES = {
    "tokens": "input",
    "heads": "a{layer}.h{unit}",
    "mlp": "m{layer}",
    "q": "a{layer}.h{unit}<q>",
    "k": "a{layer}.h{unit}<k>",
    "v": "a{layer}.h{unit}<v>",
}
"""Component -> MIB's name of a node, or of the input of one."""

INPUTS = ("q", "k", "v")
CONFIG = ("n_layers", "n_heads", "d_model", "parallel_attn_mlp")
MAKER = "LensLRP"


def to_mib(
    scores: NodeScores | EdgeScores,
    model: TransformerBridge,
    path: str | Path,
    *,
    circuit: Circuit | None = None,
) -> Path:
    """Write scores, averaged over pairs, in MIB's schema.

    Args:
        scores: of nodes (`tokens`, `heads`, `mlp`), or of edges between those, with `q`, `k`, `v`;
            a node that was not scored has no score in the file, and an edge 0.
        model: which they are of.
        path: the file; MIB expects `importances.json` in a folder `<task>_<model>`.
        circuit: which of the nodes are `in_graph`, and with them the edges between them; all of
            them if not given.

    Returns:
        `path`.

    Raises:
        InputError: what does not fit, by name.
        StorageError: a file of that name that is not ours is in the way, or the disk is full.
    """
    if scores.by_position:
        raise InputError("MIB's nodes stand for all positions: score with by_position=False")
    config = {name: getattr(model.cfg, name, False) for name in CONFIG}
    layers, heads = config["n_layers"], config["n_heads"]
    nodes: dict[str, Any] = {name: {"in_graph": True} for name in _places(layers, heads)}
    nodes["logits"] = {"in_graph": True}
    for node in [] if circuit is None else circuit.complement().nodes():
        _entry(nodes, node)["in_graph"] = False
    edges = {
        f"{up}->{down}": {
            "score": 0.0,
            "in_graph": nodes[up]["in_graph"] and nodes[down.partition("<")[0]]["in_graph"],
        }
        for up, down in _pairs(layers, heads, config["parallel_attn_mlp"])
    }
    for hook, component in scores.components.items():
        mean = scores.values[hook].double().mean(dim=0)
        if component in INPUTS and mean.shape[-1] != heads:
            raise InputError(
                f"MIB has a key and a value a head, and {hook} has {mean.shape[-1]} for {heads}: "
                "edges into grouped keys and values do not fit"
            )
        if isinstance(scores, NodeScores):
            for unit, score in enumerate(mean.tolist()):
                entry = _entry(nodes, Node(hook, unit))
                if not math.isnan(score):
                    entry["score"] = score
        elif component not in INPUTS:  # whose edges lead to their own head
            for into, unit in mean.nan_to_num().nonzero().tolist():
                name = f"{_name(Node(hook, unit))}->{_name(scores.into[into])}"
                if name not in edges:
                    raise InputError(
                        f"MIB has no edge {name}: score with "
                        'components=("tokens", "heads", "mlp", "q", "k", "v")'
                    )
                edges[name]["score"] = float(mean[into, unit])
    graph = {"cfg": {**config, "generator": MAKER}, "nodes": nodes, "edges": edges}
    save_json(Path(path), graph, ours=f'"generator": "{MAKER}"'.encode())
    return Path(path)


def from_mib(path: str | Path) -> tuple[NodeScores | EdgeScores, Circuit]:
    """Read a file of MIB's circuit track.

    Args:
        path: an `importances.json`, whoever wrote it.

    Returns:
        Scores of nodes if there are any, else of edges, with a single row in place of pairs, NaN
        where a node has none, and nothing of classes that have none; and the circuit that is
        `in_graph`.

    Raises:
        StorageError: not a file of that schema.
    """
    content = load_json(Path(path))
    try:
        layers, heads = (int(content["cfg"][name]) for name in ("n_layers", "n_heads"))
        places = _places(layers, heads)
        nodes = {name: content["nodes"][name] for name in places}
        kept = {name: bool(node["in_graph"]) for name, node in nodes.items()}
        scored = {name: float(node["score"]) for name, node in nodes.items() if "score" in node}
        edges = {tuple(name.split("->")): float(e["score"]) for name, e in content["edges"].items()}
        downs = {down: _downstream(down, places) for _, down in edges}
        ups = [places[up] for up, _ in edges]
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{path} is no graph of MIB's circuit track: {error!r}") from error
    hooks = {node.hook: _component(node) for node in places.values()}
    sizes = {hook: heads if name == "heads" else 1 for hook, name in hooks.items()}
    keep = {hook: torch.zeros(size, dtype=torch.bool) for hook, size in sizes.items()}
    for name, node in places.items():
        keep[node.hook][node.unit] = kept[name]
    unknown, one = torch.full((1,), torch.nan), torch.ones(1, 1, dtype=torch.bool)
    told = (unknown, unknown, one, PassCount(), None)
    circuit = Circuit(hooks, keep)
    if scored:
        given = {_component(places[name]) for name in scored}
        hooks = {hook: name for hook, name in hooks.items() if name in given}
        values = {hook: torch.full((1, sizes[hook]), torch.nan) for hook in hooks}
        for name, score in scored.items():
            values[places[name].hook][0, places[name].unit] = score
        return NodeScores("mib", "denoising", hooks, values, *told), circuit
    into = tuple(dict.fromkeys(downs.values()))
    along = {hook: torch.zeros(1, len(into), size) for hook, size in sizes.items()}
    for up, (_, down), score in zip(ups, edges, edges.values(), strict=True):
        along[up.hook][0, into.index(downs[down]), up.unit] = score
    return EdgeScores("mib", "denoising", hooks, into, along, *told), circuit


def _places(layers: int, heads: int) -> dict[str, Node]:
    """Name -> node, of all that write into the residual stream, in the model's order."""
    nodes = [Node("hook_embed", 0)]
    for layer in range(layers):
        nodes += [Node(f"blocks.{layer}.attn.hook_z", head) for head in range(heads)]
        nodes.append(Node(f"blocks.{layer}.hook_mlp_out", 0))
    return {_name(node): node for node in nodes}


def _pairs(layers: int, heads: int, parallel: bool) -> Iterator[tuple[str, str]]:
    """The ends of all edges."""
    above = ["input"]
    for layer in range(layers):
        attention = [f"a{layer}.h{head}" for head in range(heads)]
        for up in above:
            yield from ((up, f"{head}<{letter}>") for head in attention for letter in "qkv")
        yield from ((up, f"m{layer}") for up in (above if parallel else above + attention))
        above += [*attention, f"m{layer}"]
    yield from ((up, "logits") for up in above)


def _component(node: Node) -> str:
    """Which class of nodes it is in."""
    return next(name for name, c in COMPONENTS.items() if node.hook.endswith(c.hook))


def _name(node: Node) -> str:
    """MIB's name of a node, or of the input of one."""
    if node == TARGET:
        return "logits"
    name = NAMES.get(_component(node), str(node))
    return name.format(layer=layer_of(node.hook), unit=node.unit)


def _entry(nodes: Mapping[str, Any], node: Node) -> Any:
    """What a file says of a node."""
    if _name(node) not in nodes:
        raise InputError(f"{node} is no node of MIB, whose nodes are tokens, heads and mlp")
    return nodes[_name(node)]


def _downstream(name: str, places: Mapping[str, Node]) -> Node:
    """The node, or the input of one, that an edge ends at."""
    if name == "logits":
        return TARGET
    head, _, letter = name.partition("<")
    node = places[head]
    return replace(node, hook=node.hook.replace("hook_z", f"hook_{letter[0]}")) if letter else node
