"""The attribution graph of one prompt: tokens, heads and neurons, and the target.

Nodes are chosen by relevance, one for each position. The edge from `u` to `d` is what of
`d`'s relevance came from `u` without passing through any other chosen node
(`lenslrp.analysis.circuits.segments`): what is not chosen conducts, so that nothing is lost on
the way. Then what leaves a node along its edges is its relevance, and what enters it is its
relevance less what the ledger says was absorbed there. With `direct=True` every head and neuron
ends an edge, chosen or not, and an edge is what the residual stream alone carries; what came from
nodes that are not chosen is each node's residual, the column `rest`.

The graph is pruned by influence (`lenslrp.analysis.circuits.graph.pruning`). Nodes that go conduct
again: the graph is made anew of those that stay. The relevance of edges that go is added to `rest`,
so that sums still close.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lenslrp import media
from lenslrp.analysis.circuits.graph.gradients import (
    ABSORBED,
    NODE_KINDS,
    build_graph,
    choose_nodes,
)
from lenslrp.analysis.circuits.graph.pruning import influential, strongest
from lenslrp.analysis.circuits.nodes import largest, place_components
from lenslrp.analysis.circuits.segments import coefficients
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.errors import InputError
from lenslrp.hooks import AttnLRP, Composite
from lenslrp.inputs import is_encoder_decoder
from lenslrp.sessions import Session
from lenslrp.targets import Explained, PerRow, as_target
from lenslrp.targets import Sequence as Span

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.analysis.views.drawing import Theme


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """Nodes and edges with relevance that sums; displays itself, zoomable, in notebooks.

    Attributes:
        nodes: one row a node, in the order in which the model computes them: `id`, `kind`
            (`"token"`, `"head"`, `"recurrent head"`, `"neuron"`, ..., `"target"`), `layer` (-1 for
            tokens, the number of layers for the target), `position`, `unit`, `label`, `relevance`
            and `activation` (a head's: the length of its vector), `influence` on the target (0 to
            1), `rest` (the residual: relevance from nodes and edges that are not shown) and, for
            each term of the ledger, what was absorbed.
        edges: `source`, `target` (ids) and `relevance`, in units of the target.
        str_tokens, token_ids: the prompt's tokens.
        explained: the target and its value.
        token: id of the token that is explained, `None` where it is not one.
        probability: the model's, of that token.
        layers: how many the model has.
        chosen: how many heads and neurons were nodes before pruning, and of how many.
        model_name: of the model.
        settings: what the graph was made with.
        passes: of the prompt through the model.
        prompt: the prompt, as text.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    str_tokens: list[str]
    token_ids: list[int]
    explained: Explained
    token: int | None
    probability: float
    layers: int
    chosen: tuple[int, int]
    model_name: str
    settings: Mapping[str, Any]
    passes: PassCount
    prompt: str = ""

    @property
    def error(self) -> float:
        """The largest difference between a node's relevance and what entered it, relative to the
        target.

        Of every node but the tokens, where relevance ends.
        """
        entered = self.edges.groupby("target")["relevance"].sum()
        nodes = self.nodes[self.nodes["kind"] != "token"].set_index("id")
        explained = entered.reindex(nodes.index, fill_value=0.0) + nodes["rest"]
        explained += nodes[list(ABSORBED)].sum(axis=1)
        return float((nodes["relevance"] - explained).abs().max() / abs(self._target))

    @property
    def _target(self) -> float:
        return float(self.explained.value[0]) or 1.0

    def top(self, k: int = 10) -> pd.DataFrame:
        """The `k` edges with the most relevance, in size, with their ends' labels."""
        labels = self.nodes.set_index("id")["label"]
        frame = largest(self.edges, "relevance", k)
        return frame.assign(source_label=frame["source"].map(labels),
                            target_label=frame["target"].map(labels))  # fmt: skip

    def to_networkx(self) -> Any:
        """A `networkx.DiGraph`: ids with the columns of `nodes`, edges with `relevance`."""
        import networkx as nx

        graph = nx.DiGraph(explained=str(self.explained), prompt=list(self.str_tokens))
        for record in self.nodes.to_dict("records"):
            graph.add_node(record["id"], **{k: v for k, v in record.items() if k != "id"})
        for edge in self.edges.to_dict("records"):
            graph.add_edge(edge["source"], edge["target"], relevance=edge["relevance"])
        return graph

    def to_neuronpedia(
        self, path: str | Path, *, slug: str = "lenslrp", model_id: str | None = None
    ) -> Path:
        """Write Neuronpedia's attribution-graph JSON (`lenslrp.analysis.circuits.graph.export`).

        Args:
            path: the file.
            slug: the graph's name there.
            model_id: Neuronpedia's name of the model; by default the model's own, in lower case.

        Returns:
            `path`.

        Raises:
            StorageError: a file of that name that is not ours is in the way, or the disk is full.
        """
        from lenslrp.analysis.circuits.graph.export import write_neuronpedia

        return write_neuronpedia(self, Path(path), slug=slug, model_id=model_id)

    def to_html(self, path: str | Path | None = None) -> str:
        """The zoomable picture as HTML without remote assets.

        Args:
            path: where to write it as a whole page.

        Returns:
            The page; a fragment for a notebook if no path is given.
        """
        from lenslrp.analysis.circuits.graph.picture import graph_html, write_graph_page

        return graph_html(self) if path is None else write_graph_page(self, Path(path))

    def draw(self, *, theme: Theme | None = None) -> Figure:
        """The static picture, with matplotlib.

        Args:
            theme: colours; light if not given.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from lenslrp.analysis.circuits.graph.figure import graph_figure

        return graph_figure(self, theme)

    def _repr_html_(self) -> str:
        return self.to_html()

    def __repr__(self) -> str:
        return (
            f"AttributionGraph({self.explained}, {len(self.nodes)} nodes, {len(self.edges)} edges)"
        )


def attribution_graph(
    model: TransformerBridge,
    input: Any,
    target: Any = None,
    *,
    composite: Composite | None = None,
    components: Sequence[str] = ("heads", "neurons"),
    k: int = 64,
    share: float = 1.0,
    direct: bool = False,
    node_share: float = 0.9,
    edge_share: float = 0.9,
    prepend_bos: bool | None = None,
    rows: int = 8,
) -> AttributionGraph:
    """The graph of one prompt: choose nodes, find their edges, prune.

    Nodes are pruned by influence, as in circuit tracing (Ameisen et al. 2025).

    Args:
        model: a `TransformerBridge` that is no encoder-decoder, in eval mode.
        input, target: of `lenslrp.run_with_relevance`; one prompt.
        composite: the rules; `AttnLRP()` if not given.
        components: what may become a node: some of `"heads"`, `"neurons"`, `"attention"`,
            `"mlp"`, `"recurrent"` and `"channels"` (see `circuits.nodes.COMPONENTS`).
        k, share: the most relevant nodes (in size) are chosen: as many as hold `share` of all
            nodes' relevance, and at most `k`.
        direct: end edges at all nodes, chosen or not.
        node_share: of the influence on the target that the nodes which stay must hold.
        edge_share: likewise, of the edges that stay.
        prepend_bos: `None` is the model's own default.
        rows: how many chosen nodes a backward pass serves.

    Returns:
        The graph; relevance is in units of the target (logits, for a logit).

    Raises:
        InputError: more than one prompt, or a choice that does not exist.

    Examples:
        >>> graph = attribution_graph(model, "The capital of France is", Logit(" Paris"), k=48)
        >>> list(graph.edges.columns)
        ['source', 'target', 'relevance']
        >>> graph.error < 1e-3  # what enters a node is its relevance, less what was absorbed
        True
    """
    _check(model, components, k, {"share": share, "node_share": node_share,
                                  "edge_share": edge_share}, rows)  # fmt: skip
    rules = AttnLRP() if composite is None else composite
    wanted = as_target(target, model.tokenizer, 1, media.labels_of(model))
    if isinstance(wanted, PerRow):
        wanted = wanted.targets[0]
    append = wanted.ids(model.tokenizer) if isinstance(wanted, Span) else []
    prepared = media.prepare_batch(model, input, {}, append=append, prepend_bos=prepend_bos)
    if len(prepared.tokens) != 1:
        raise InputError(f"a graph is of one prompt; {len(prepared.tokens)} were given")
    hooks = place_components(model, components)
    with Session(model, rules, ledger=False, logits="target", stays=False) as session:
        cache, units = coefficients(
            session, hooks, input=input, target=wanted, prepend_bos=prepend_bos
        )
        chosen = choose_nodes(units, k, share)
        build = partial(build_graph, session, prepared, wanted, hooks, units, cache, rows, direct)
        full = build(chosen)
        stays = influential(full.weights, full.absorbed, full.fixed, node_share)
        passes = [full.passes]
        if direct:
            full = full.without(stays)
        elif not stays.all():  # those that go conduct again
            ids = set(full.frame.loc[stays, "id"])
            full = build([node for node in chosen if str(node) in ids])
            passes.append(full.passes)
    edges, stays, influence = strongest(full.weights, full.absorbed, full.fixed, edge_share)
    frame = full.frame.assign(influence=influence)
    frame["rest"] += np.where(edges, 0.0, full.weights).sum(axis=1)
    ids = frame["id"].to_numpy()
    downs, ups = edges.nonzero()
    columns = ["id", "kind", "layer", "position", "unit", "label", "relevance", "activation",
               "influence", "rest", *ABSORBED]  # fmt: skip
    return AttributionGraph(
        nodes=frame.loc[stays, columns].reset_index(drop=True),
        edges=pd.DataFrame(
            {"source": ids[ups], "target": ids[downs], "relevance": full.weights[downs, ups]}
        ),
        str_tokens=cache.str_tokens[0],
        token_ids=cache.token_ids[0].tolist(),
        explained=cache.target,
        token=full.token,
        probability=full.probability,
        layers=int(model.cfg.n_layers),
        chosen=(len(chosen), sum(x.shape[1] * x.shape[2] for x, _ in units.values())),
        model_name=cache.model_name,
        settings={
            "composite": rules.name, "components": list(components), "k": k, "share": share,
            "direct": direct, "node_share": node_share, "edge_share": edge_share,
        },
        passes=PassCount(1 + sum(p.forward for p in passes), 1 + sum(p.backward for p in passes)),
        prompt=cache.prompts[0],
    )  # fmt: skip


def _check(
    model: TransformerBridge,
    components: Sequence[str],
    k: int,
    shares: Mapping[str, float],
    rows: int,
) -> None:
    if is_encoder_decoder(model):
        raise InputError("a graph is of one stack of layers; this model is an encoder-decoder")
    unknown = [name for name in components if name not in NODE_KINDS]
    if unknown or isinstance(components, str):
        raise InputError(f"components are some of {', '.join(NODE_KINDS)}, not {components!r}")
    if k < 1 or rows < 1:
        raise InputError(f"k and rows must be at least 1, not {k} and {rows}")
    for name, value in shares.items():
        if not 0 < value <= 1:
            raise InputError(f"{name} must be above 0 and at most 1, not {value}")
