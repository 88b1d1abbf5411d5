"""The attribution graph of one prompt, as a result: tables, pictures, files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from lenslrp.analysis.circuits.graph.gradients import ABSORBED, NOT_SHOWN
from lenslrp.analysis.circuits.graph.shown import NODES
from lenslrp.analysis.circuits.graph.supernodes import (
    checked_groups,
    checked_nodes,
    folded_first_token,
    labelled_nodes,
    merged_edges,
    similar_nodes,
    unit_of,
    vocabulary_labels,
)
from lenslrp.analysis.circuits.nodes import largest
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.analysis.units.coders import SparseCoder
from lenslrp.analysis.units.kinds import Unit
from lenslrp.targets import Explained

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
    from lenslrp.analysis.views.drawing import Theme


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """Nodes and edges with relevance that sums; displays itself in notebooks.

    Attributes:
        nodes: one row a node, in the order in which the model computes them: `id`, `kind`
            (`"token"`, `"head"`, `"recurrent head"`, `"neuron"`, `"feature"`, `"error"`, ...,
            `"target"`), `hook` (where it is), `layer` (-1 for tokens, the number of layers for the
            target), `position`, `unit`, `label`, `relevance` and `activation` (a head's or an
            error's: the length of its vector), `influence` on the target (0 to 1), `rest` (the
            residual: relevance from nodes and edges that are not shown), `reconstruction`
            (relevance from errors of sparse coders that are no nodes of their own) and, for each
            term of the ledger, what was absorbed.
        edges: `source`, `target` (ids), `relevance`, in units of the target, and `via`: how the
            edge enters a head, `"q"`, `"k"` or `"v"`, where `attention="qkv"` tells; `""`
            elsewhere.
        str_tokens, token_ids: the prompt's tokens.
        explained: the target and its value.
        token: id of the token that is explained, `None` where it is not one.
        probability: the model's, of that token.
        layers: how many the model has.
        chosen: how many heads, neurons, features and errors were nodes before pruning, and of how
            many.
        model_name: of the model.
        settings: what the graph was made with.
        passes: of the prompt through the model.
        prompt: the prompt, as text.
        coders: the sparse coders whose features are nodes.
        supernodes: name -> ids of the nodes that it stands for; see `group`.
        pinned: ids of nodes that every picture shows; see `pin`.
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
    coders: tuple[SparseCoder, ...] = ()
    supernodes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pinned: tuple[str, ...] = ()

    @property
    def supernode_of(self) -> dict[str, str]:
        """Id of a node that is in a supernode -> the supernode's name."""
        return {node: name for name, members in self.supernodes.items() for node in members}

    @property
    def error(self) -> float:
        """The largest difference between a node's relevance and what entered it, relative to the
        target.

        Of every node but tokens and errors, where relevance ends.
        """
        entered = self.edges.groupby("target")["relevance"].sum()
        nodes = self.nodes[~self.nodes["kind"].isin(["token", "error"])].set_index("id")
        explained = entered.reindex(nodes.index, fill_value=0.0)
        explained += nodes[[*NOT_SHOWN, *ABSORBED]].sum(axis=1)
        return float((nodes["relevance"] - explained).abs().max() / abs(self._target))

    @property
    def _target(self) -> float:
        return float(self.explained.value[0]) or 1.0

    @property
    def totals(self) -> pd.DataFrame:
        """`edges` with one row a pair of nodes, however the edge enters: `source`, `target`,
        `relevance`."""
        pairs = self.edges.groupby(["source", "target"], sort=False, as_index=False)
        totals: pd.DataFrame = pairs["relevance"].sum()
        return totals

    def top(self, k: int = 10) -> pd.DataFrame:
        """The `k` edges with the most relevance, in size, with their ends' labels.

        Labels and relevance stand at the sides: where a terminal is narrow, pandas leaves out what
        is between, here the ids.
        """
        labels = self.nodes.set_index("id")["label"]
        frame = largest(self.edges, "relevance", k)
        named = frame.assign(source_label=frame["source"].map(labels),
                             target_label=frame["target"].map(labels))  # fmt: skip
        between = frame.columns.drop("relevance")
        return named[["source_label", "relevance", *between, "target_label"]]

    def unit(self, node: str) -> Unit:
        """The feature, neuron or head that a node is, at all positions: what `steer` moves.

        Args:
            node: its id.

        Raises:
            InputError: a node that is no unit, such as a token, or that the graph does not have.

        Examples:
            >>> with steer(model, Ablate(graph.unit("blocks.5.attn.hook_z[2]@4")), prompt=[4]):
            ...     without = model(prompt)
        """
        return unit_of(self, node)

    def group(self, groups: Mapping[str, Iterable[str]]) -> AttributionGraph:
        """The same graph with supernodes, in the place of those that it has.

        Args:
            groups: name -> ids of nodes; `similar` finds some.

        Raises:
            InputError: an id that the graph does not have, or one that is in two groups.

        Examples:
            >>> named = graph.group({"sink": ["token@0"], "answer": ["target"]})
            >>> list(named.supernodes)
            ['sink', 'answer']
        """
        return replace(self, supernodes=checked_groups(self, groups))

    def pin(self, nodes: Iterable[str]) -> AttributionGraph:
        """The same graph with nodes that every picture shows, in the place of those that it has.

        Args:
            nodes: ids.

        Raises:
            InputError: an id that the graph does not have.
        """
        return replace(self, pinned=checked_nodes(self, nodes, "pinned"))

    def similar(self, by: str = "decoder", threshold: float = 0.7) -> dict[str, list[str]]:
        """Groups of nodes that are alike, for `group`, by average linkage.

        Args:
            by: `"decoder"`: features by the cosine of the vectors that they write (one feature at
                several positions is one group); `"influence"`: all nodes by the mean of two
                cosines, of the edges into them and of the edges out of them.
            threshold: the least mean similarity at which two groups become one.

        Returns:
            Name -> ids, at least two; named after the most influential node.

        Raises:
            InputError: another likeness, or a threshold that is not 0 to 1.
        """
        return similar_nodes(self, by, threshold)

    def merged(self) -> pd.DataFrame:
        """Edges with supernodes as their ends: `source`, `target`, `relevance`; none inside one."""
        return merged_edges(self)

    def folded(self) -> AttributionGraph:
        """The same graph with the first token and its units as one node, as pictures show it.

        Units at the first position see that token alone, so that the node's relevance is what goes
        from them to later positions. A graph with fewer than two such units stays as it is.
        """
        return folded_first_token(self)

    def label(self, labels: Mapping[str, str]) -> AttributionGraph:
        """The same graph with other labels.

        Args:
            labels: id of a node, or text of a unit (at all positions) -> label: a dictionary's
                names, a column of a table, `vocabulary_labels`.

        Raises:
            InputError: a label for what the graph does not have.
        """
        return replace(self, nodes=labelled_nodes(self, labels))

    def vocabulary_labels(self, model: TransformerBridge, k: int = 3) -> dict[str, str]:
        """Labels for features and neurons: up to `k` related tokens that what they write promotes.

        Where the ten highest are not related (`lenslrp.analysis.units.readability`) there is no
        label: any direction has ten highest tokens.

        Raises:
            InputError: a feature that does not write to the residual stream.
        """
        return vocabulary_labels(self, model, k)

    def to_networkx(self) -> Any:
        """A `networkx.DiGraph`: ids with the columns of `nodes`, edges with `relevance`.

        Where ways into heads are told apart, edges also have `q`, `k` and `v`.
        """
        import networkx as nx

        graph = nx.DiGraph(explained=str(self.explained), prompt=list(self.str_tokens))
        for record in self.nodes.to_dict("records"):
            graph.add_node(record["id"], **{k: v for k, v in record.items() if k != "id"})
        for edge in self.totals.to_dict("records"):
            graph.add_edge(edge["source"], edge["target"], relevance=edge["relevance"])
        for edge in self.edges[self.edges["via"] != ""].to_dict("records"):
            graph.edges[edge["source"], edge["target"]][edge["via"]] = edge["relevance"]
        return graph

    def to_neuronpedia(
        self,
        path: str | Path,
        *,
        slug: str = "lenslrp",
        model_id: str | None = None,
        source_set: str | None = None,
    ) -> Path:
        """Write Neuronpedia's attribution-graph JSON (`lenslrp.analysis.circuits.graph.export`).

        Args:
            path: the file.
            slug: the graph's name there.
            model_id: Neuronpedia's name of the model; by default the model's own, in lower case.
            source_set: Neuronpedia's name of the coders, where it has pages for their features.

        Returns:
            `path`.

        Raises:
            StorageError: a file of that name that is not ours is in the way, or the disk is full.
        """
        from lenslrp.analysis.circuits.graph.export import write_neuronpedia

        return write_neuronpedia(
            self, Path(path), slug=slug, model_id=model_id, source_set=source_set
        )

    def to_html(
        self,
        path: str | Path | None = None,
        *,
        nodes: int = NODES,
        first_token: bool = False,
        dictionary: NeuronDictionary | None = None,
        model: TransformerBridge | None = None,
    ) -> str:
        """The picture as HTML without remote assets: more nodes by a slider, numbers of the node
        that is pointed at, pins, groups and names, which can be copied as a Python call.

        Args:
            path: where to write it as a whole page.
            nodes: how many are shown at first, the most influential; pinned ones and supernodes
                come on top.
            first_token: show the units at the first position one by one; otherwise `folded`.
            dictionary: its page of a unit is below the picture, and opens when the unit is chosen.
            model: names the tokens that units read and write.

        Returns:
            The page; a fragment for a notebook if no path is given.

        Raises:
            InputError: fewer than one node.
        """
        from lenslrp.analysis.circuits.graph.page import graph_page

        shown = self._shown(first_token)
        return graph_page(shown, nodes, path, dictionary=dictionary, model=model)

    def to_svg(
        self,
        path: str | Path | None = None,
        *,
        nodes: int = NODES,
        first_token: bool = False,
        theme: Theme | None = None,
    ) -> str:
        """The static picture as an SVG file, without scripts or tooltips that need them.

        Args:
            path: where to write it.
            nodes, first_token: as for `to_html`.
            theme: colours; light if not given.

        Returns:
            The file's text.
        """
        from lenslrp.analysis.circuits.graph.picture import write_svg

        return write_svg(self._shown(first_token), nodes, theme, path)

    def draw(
        self, *, theme: Theme | None = None, nodes: int = NODES, first_token: bool = False
    ) -> Figure:
        """The static picture, with matplotlib; `.savefig` writes it as PNG or PDF.

        Args:
            theme: colours; light if not given.
            nodes, first_token: as for `to_html`.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from lenslrp.analysis.circuits.graph.figure import graph_figure

        return graph_figure(self._shown(first_token), nodes, theme)

    def _shown(self, first_token: bool) -> AttributionGraph:
        return self if first_token else self.folded()

    def _repr_html_(self) -> str:
        return self.to_html()

    def __repr__(self) -> str:
        return (
            f"AttributionGraph({self.explained}, {len(self.nodes)} nodes, {len(self.edges)} edges)"
        )
