"""The attribution graph of one prompt: tokens, heads, neurons, features and the target.

Nodes are chosen by relevance, one for each position. The edge from `u` to `d` is what of
`d`'s relevance came from `u` without passing through any other chosen node
(`lenslrp.analysis.circuits.segments`): what is not chosen conducts, so that nothing is lost on
the way. Then what leaves a node along its edges is its relevance, and what enters it is its
relevance less what the ledger says was absorbed there. With `direct=True` every head, neuron and
feature ends an edge, chosen or not, and an edge is what the residual stream alone carries; what
came from nodes that are not chosen is each node's residual, the column `rest`.

With sparse coders the graph is of the local replacement model
(`lenslrp.analysis.circuits.replacement`): their features and errors are nodes. An error is a
constant: relevance ends there.

The graph is pruned by influence (`lenslrp.analysis.circuits.graph.pruning`). Nodes that go conduct
again: the graph is made anew of those that stay. The relevance of edges that go is added to `rest`,
so that sums still close.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lenslrp.analysis.circuits.graph.cost import GraphEstimate
from lenslrp.analysis.circuits.graph.gradients import (
    ABSORBED,
    NOT_SHOWN,
    FullGraph,
    build_graph,
)
from lenslrp.analysis.circuits.graph.options import GraphOptions
from lenslrp.analysis.circuits.graph.pruning import Mask, influential, strongest
from lenslrp.analysis.circuits.graph.result import AttributionGraph
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.analysis.units.coders import SparseCoder
from lenslrp.hooks import Composite

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def attribution_graph(
    model: TransformerBridge,
    input: Any,
    target: Any = None,
    *,
    composite: Composite | None = None,
    components: Sequence[str] = ("heads", "neurons"),
    coders: Sequence[SparseCoder] = (),
    attention: str = "composite",
    k: int = 64,
    share: float = 1.0,
    direct: bool = False,
    node_share: float = 0.9,
    edge_share: float = 0.9,
    prepend_bos: bool | None = None,
    rows: int | None = None,
    max_memory: float | None = None,
) -> AttributionGraph:
    """The graph of one prompt: choose nodes, find their edges, prune.

    Nodes are pruned by influence, as in circuit tracing (Ameisen et al. 2025).

    Args:
        model: a `TransformerBridge` that is no encoder-decoder, in eval mode.
        input, target: of `lenslrp.run_with_relevance`; one prompt.
        composite: the rules; `AttnLRP()` if not given.
        components: what may become a node: some of `"heads"`, `"neurons"`, `"attention"`,
            `"mlp"`, `"recurrent"` and `"channels"` (see `circuits.nodes.COMPONENTS`); with coders,
            none is enough.
        coders: transcoders and autoencoders that stand in the model's place; their features and
            errors may become nodes.
        attention: `"composite"`: as the composite has it; `"frozen"`: patterns are constants, as
            in circuit tracing; `"qkv"`: as the composite has it, and edges into a head are told
            apart (the column `via`): `"q"`, `"k"` and `"v"`. That takes four rows a head.
        k, share: the most relevant nodes (in size) are chosen: as many as hold `share` of all
            nodes' relevance, and at most `k`.
        direct: end edges at all nodes, chosen or not.
        node_share: of the influence on the target that the nodes which stay must hold.
        edge_share: likewise, of the edges that stay.
        prepend_bos: `None` is the model's own default.
        rows: how many chosen nodes a backward pass serves. If not given, as many as fit into 2 GB
            beside the model and the coders, at most 8 and at least one.
        max_memory: bytes that may be needed beside the model and the coders, as
            `estimate_graph` finds them; as many rows are made at once as fit.

    Returns:
        The graph; relevance is in units of the target (logits, for a logit).

    Raises:
        InputError: more than one prompt, a choice that does not exist, coders that do not fit, or
            a graph that takes more than `max_memory`.

    Examples:
        >>> graph = attribution_graph(model, "The capital of France is", Logit(" Paris"), k=48)
        >>> list(graph.edges.columns)
        ['source', 'target', 'relevance', 'via']
        >>> graph.error < 1e-3  # what enters a node is its relevance, less what was absorbed
        True
    """
    options = GraphOptions(
        composite=composite, components=components, coders=coders, attention=attention, k=k,
        share=share, direct=direct, node_share=node_share, edge_share=edge_share,
        prepend_bos=prepend_bos, rows=rows, max_memory=max_memory,
    )  # fmt: skip
    with options.candidates(model, input, target) as candidates:
        chosen = candidates.choose(k, share)
        passes = [candidates.passes]
        if rows is None or max_memory is not None:
            rows = options.cost(candidates, chosen).rows
            passes.append(PassCount(1, 1))
        build = partial(build_graph, candidates, rows, direct, options.split)
        full = build(chosen)
        stays = influential(full.weights, full.absorbed, full.fixed, node_share)
        passes.append(full.passes)
        if direct:
            full = full.without(stays)
        elif not stays.all():  # those that go conduct again
            ids = set(full.frame.loc[stays, "id"])
            full = build([node for node in chosen if str(node) in ids])
            passes.append(full.passes)
    edges, stays, influence = strongest(
        full.weights, full.absorbed, full.fixed, edge_share, full.ends
    )
    frame = full.frame.assign(influence=influence)
    frame["rest"] += np.where(edges, 0.0, full.weights).sum(axis=1)
    columns = ["id", "kind", "hook", "layer", "position", "unit", "label", "relevance",
               "activation", "influence", *NOT_SHOWN, *ABSORBED]  # fmt: skip
    cache = candidates.cache
    return AttributionGraph(
        nodes=frame.loc[stays, columns].reset_index(drop=True),
        edges=_edge_table(full, edges),
        str_tokens=cache.str_tokens[0],
        token_ids=cache.token_ids[0].tolist(),
        explained=cache.target,
        token=full.token,
        probability=full.probability,
        layers=int(model.cfg.n_layers),
        chosen=(len(chosen), len(candidates)),
        model_name=cache.model_name,
        settings=options.settings,
        passes=PassCount(sum(p.forward for p in passes), sum(p.backward for p in passes)),
        prompt=cache.prompts[0],
        coders=tuple(coders),
    )  # fmt: skip


def estimate_graph(
    model: TransformerBridge, input: Any, target: Any = None, **options: Any
) -> GraphEstimate:
    """What `attribution_graph` will take, from the passes that choose nodes and one row more.

    Args:
        model, input, target: of `attribution_graph`.
        options: likewise; pruning costs nothing.

    Raises:
        InputError: as there.

    Examples:
        >>> print(estimate_graph(model, prompt, coders=coders, k=1000))  # doctest: +SKIP
        1,252 nodes of 512,410, 873 backward passes, 4 at a time: 1.31 GB, 190 s
    """
    given = inspect.signature(attribution_graph).bind_partial(**options)
    given.apply_defaults()
    given.arguments.pop("target")
    made_with = GraphOptions(**given.arguments)
    with made_with.candidates(model, input, target) as candidates:
        return made_with.cost(candidates, candidates.choose(made_with.k, made_with.share))


def _edge_table(full: FullGraph, edges: Mask) -> pd.DataFrame:
    """One row an edge and way in, in the order of nodes."""
    ids = full.frame["id"].to_numpy()
    downs, ups = edges.nonzero()
    tables = []
    for via, weights in full.parts.items():
        values = weights[downs, ups]
        table = pd.DataFrame({"source": ids[ups], "target": ids[downs], "relevance": values})
        tables.append(table.assign(via=via)[values != 0])
    return pd.concat(tables).sort_index(kind="stable").reset_index(drop=True)
