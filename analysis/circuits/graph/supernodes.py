"""Supernodes: nodes of a graph that are looked at as one, and names for nodes.

A supernode is a name for some nodes (Ameisen et al. 2025), chosen by hand or because they are
alike: features that write in one direction, or nodes that read from and write to the same nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lenslrp.analysis.circuits.graph.pruning import Matrix
from lenslrp.analysis.circuits.replacement import features_key
from lenslrp.analysis.units.kinds import Feature, Neuron, Unit
from lenslrp.analysis.units.parsing import parse_unit
from lenslrp.analysis.units.projection import VocabularyScores, reads, writes
from lenslrp.analysis.units.readability import UNRELATED, TokenRelations, readable_tokens
from lenslrp.errors import InputError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.analysis.circuits.graph.result import AttributionGraph

LIKENESS = ("decoder", "influence")
"""How nodes can be alike: the vectors that features write; from and to whom relevance goes."""


def checked_nodes(graph: AttributionGraph, nodes: Iterable[str], what: str) -> tuple[str, ...]:
    """Ids of a graph's nodes.

    Raises:
        InputError: an id that the graph does not have.
    """
    if isinstance(nodes, str):
        raise InputError(f"{what} is a list of nodes, not {nodes!r}")
    known, given = set(graph.nodes["id"]), tuple(nodes)
    for node in given:
        if node not in known:
            raise InputError(f"{what}: the graph has no node {node!r}")
    return given


def checked_groups(
    graph: AttributionGraph, groups: Mapping[str, Iterable[str]]
) -> dict[str, tuple[str, ...]]:
    """Groups of a graph's nodes.

    Raises:
        InputError: an id that the graph does not have, or one in two groups, or an empty group.
    """
    checked, seen = {}, dict[str, str]()
    for name, members in groups.items():
        given = () if isinstance(members, str) else tuple(members)
        if not given:
            raise InputError(f"supernode {name!r} is a list of nodes, at least one")
        checked[name] = checked_nodes(graph, given, f"supernode {name!r}")
        for node in checked[name]:
            if node in seen:
                raise InputError(f"{node} is in two supernodes, {seen[node]!r} and {name!r}")
            seen[node] = name
    return checked


def merged_edges(graph: AttributionGraph) -> pd.DataFrame:
    """Edges among supernodes and the other nodes; those inside a supernode are left out."""
    names = graph.supernode_of
    edges = graph.totals
    for end in ("source", "target"):
        edges[end] = edges[end].map(lambda node: names.get(node, node))
    between = edges[edges["source"] != edges["target"]]
    merged: pd.DataFrame = between.groupby(["source", "target"], sort=False, as_index=False).sum()
    return merged


FOLDED = 2
"""Units of the first token from which on its tower is folded."""


def folded_first_token(graph: AttributionGraph) -> AttributionGraph:
    """The graph with the first token and its units as one node, of kind ``token``.

    Units at the first position see that token alone: where attention rests, a tower of them, up to
    the last layers, says nothing about the rest of the text. The node's relevance is what leaves.
    It is in the first supernode that one of them was in.
    """
    nodes = graph.nodes
    tower = nodes[(nodes["position"] == 0) & (nodes["kind"] != "target")]
    if (tower["kind"] != "token").sum() < FOLDED:
        return graph
    inside = set(tower["id"])
    token = tower[tower["kind"] == "token"]
    one = (token if len(token) else tower).iloc[0].copy()
    edges = graph.edges.copy()
    for end in ("source", "target"):
        edges[end] = edges[end].where(~edges[end].isin(inside), one["id"])
    edges = edges[edges["source"] != edges["target"]]
    edges = edges.groupby(["source", "target", "via"], sort=False, as_index=False).sum()
    one["kind"], one["layer"] = "token", -1
    one["label"] = f"{one['label']} +{len(tower) - len(token)}"
    one["relevance"] = edges.loc[edges["source"] == one["id"], "relevance"].sum()
    rest = nodes[~nodes["id"].isin(inside)]
    first = pd.DataFrame([one]).astype(nodes.dtypes.to_dict())

    def within(members: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one["id"] if node in inside else node for node in members))

    supernodes, taken = dict[str, tuple[str, ...]](), set[str]()
    for name, members in graph.supernodes.items():
        if left := tuple(node for node in within(members) if node not in taken):
            supernodes[name] = left
            taken.update(left)
    return replace(
        graph,
        nodes=pd.concat([first, rest], ignore_index=True),
        edges=edges[list(graph.edges.columns)],
        supernodes=supernodes,
        pinned=within(graph.pinned),
    )


def similar_nodes(graph: AttributionGraph, by: str, threshold: float) -> dict[str, list[str]]:
    """Groups of at least two nodes that are alike, named after the most influential of each.

    Raises:
        InputError: another likeness, or a threshold that is not 0 to 1.
    """
    if by not in LIKENESS:
        raise InputError(f"nodes are alike by one of {', '.join(LIKENESS)}, not {by!r}")
    if not 0 <= threshold <= 1:
        raise InputError(f"threshold is 0 to 1, not {threshold}")
    if by == "decoder":
        nodes = graph.nodes[graph.nodes["kind"] == "feature"]
        similarity = _of_decoders(graph, nodes)
    else:
        nodes = graph.nodes[~graph.nodes["kind"].isin(["token", "target"])]
        similarity = _of_influence(graph, list(nodes["id"]))
    groups: dict[str, list[str]] = {}
    for members in clusters(similarity, threshold):
        if len(members) > 1:
            alike = nodes.iloc[members]
            label = str(alike.loc[alike["influence"].idxmax(), "label"])
            count = sum(name == label or name.startswith(f"{label} (") for name in groups)
            groups[f"{label} ({count + 1})" if count else label] = list(alike["id"])
    return groups


def clusters(similarity: Matrix, threshold: float) -> list[list[int]]:
    """Average linkage: the two clusters most alike are merged while that is `threshold` or more.

    Args:
        similarity: [node, node], symmetric.
        threshold: of the mean over all pairs of two clusters.
    """
    members = [[index] for index in range(len(similarity))]
    means, sizes = similarity.astype(float).copy(), np.ones(len(similarity))
    np.fill_diagonal(means, -np.inf)
    while len(members) > 1:
        a, b = sorted(divmod(int(means.argmax()), len(means)))
        if means[a, b] < threshold:
            break
        mean = (sizes[a] * means[a] + sizes[b] * means[b]) / (sizes[a] + sizes[b])
        means[a], means[:, a] = mean, mean
        means[a, a] = -np.inf
        means = np.delete(np.delete(means, b, axis=0), b, axis=1)
        sizes[a] += sizes[b]
        sizes = np.delete(sizes, b)
        members[a] = sorted(members[a] + members.pop(b))
    return members


def _of_decoders(graph: AttributionGraph, nodes: pd.DataFrame) -> Matrix:
    """Cosines of what features write; 0 between coders of different widths."""
    coders = {features_key(coder): coder for coder in graph.coders}
    rows = [
        coders[hook].writes(unit).detach().double().cpu().numpy()
        for hook, unit in zip(nodes["hook"], nodes["unit"], strict=True)
    ]
    similarity = np.zeros((len(rows), len(rows)))
    for width in {len(row) for row in rows}:
        at = [index for index, row in enumerate(rows) if len(row) == width]
        similarity[np.ix_(at, at)] = _cosines(np.stack([rows[index] for index in at]))
    return similarity


def _of_influence(graph: AttributionGraph, ids: list[str]) -> Matrix:
    """Cosines of the edges into nodes and out of them, each of length 1."""
    every = {node: index for index, node in enumerate(graph.nodes["id"])}
    weights = np.zeros((len(every), len(every)))
    edges = graph.totals
    weights[edges["target"].map(every), edges["source"].map(every)] = edges["relevance"]
    at = [every[node] for node in ids]
    return (_cosines(weights[at]) + _cosines(weights[:, at].T)) / 2


def _cosines(rows: Matrix) -> Matrix:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled = rows / np.where(lengths > 0, lengths, 1.0)
    cosines: Matrix = scaled @ scaled.T
    return cosines


def unit_text(node: str) -> str:
    """A node's id without its position: the text of its unit."""
    return node.rpartition("@")[0] or node


def unit_of(graph: AttributionGraph, node: str) -> Unit:
    """See `AttributionGraph.unit`."""
    found = graph.nodes[graph.nodes["id"] == node]
    if len(found) != 1:
        raise InputError(f"the graph has no node {node!r}")
    hook, unit = str(found["hook"].iloc[0]), int(found["unit"].iloc[0])
    coder = next((coder for coder in graph.coders if features_key(coder) == hook), None)
    return parse_unit(unit_text(node)) if coder is None else Feature(coder, unit)


def labelled_nodes(graph: AttributionGraph, labels: Mapping[str, str]) -> pd.DataFrame:
    """`graph.nodes` with labels by id, or by the text of the unit.

    Raises:
        InputError: a label for something that the graph does not have.
    """
    ids = graph.nodes["id"]
    units = ids.map(unit_text)
    unknown = [name for name in labels if name not in {*ids, *units}]
    if unknown:
        raise InputError(f"the graph has no node or unit {unknown[0]!r}")
    found = ids.map(labels).fillna(units.map(labels)).fillna(graph.nodes["label"])
    return graph.nodes.assign(label=found)


def vocabulary_labels(graph: AttributionGraph, model: TransformerBridge, k: int) -> dict[str, str]:
    """Text of a feature or neuron -> the tokens that what it writes promotes, where readable."""
    relations = TokenRelations.of(model, "writes")
    labels = {
        text: _listed(relations, writes(model, unit), k)
        for text, unit in units_of(graph).items()
        if isinstance(unit, Feature | Neuron)
    }
    return {text: label for text, label in labels.items() if label}


def vocabulary_notes(graph: AttributionGraph, model: TransformerBridge, k: int) -> dict[str, str]:
    """Id of a feature, neuron or head -> the tokens that it writes and reads most."""
    of = cache(partial(TokenRelations.of, model))
    notes = {}
    for text, unit in units_of(graph).items():
        try:
            read = {name: _listed(of("reads"), s, k) for name, s in reads(model, unit).items()}
            lists = {"writes": _listed(of("writes"), writes(model, unit), k)} | {
                f"reads ({name})": tokens for name, tokens in read.items()
            }
        except InputError as error:  # what it writes or reads is no token
            notes[text] = str(error)
            continue
        notes[text] = "; ".join(f"{role} {x or UNRELATED}" for role, x in lists.items())
    return {node: notes[unit_text(node)] for node in graph.nodes["id"] if unit_text(node) in notes}


def units_of(graph: AttributionGraph) -> dict[str, Unit]:
    """Text -> the unit of every feature, neuron and head of the graph."""
    of_units = graph.nodes[graph.nodes["kind"].isin(["feature", "neuron", "head"])]
    return {unit_text(node): unit_of(graph, node) for node in of_units["id"]}


def _listed(relations: TokenRelations, scores: VocabularyScores, k: int) -> str:
    """What the highest tokens have in common; empty where they have nothing."""
    return ", ".join(token.strip() for token in readable_tokens(relations, scores, k))
