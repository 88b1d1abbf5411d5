"""The attribution graph of one prompt: tokens, heads and neurons, and the target.

Nodes are chosen by relevance, one for each position. The edge from ``u`` to ``d`` is what of
``d``'s relevance came from ``u`` without passing through any other chosen node
(:mod:`lenslrp.analysis.cut_pass`): what is not chosen conducts, so that nothing is lost on the way.
Then what leaves a node along its edges is its relevance, and what enters it is its relevance less
what the ledger says was absorbed there. With ``direct=True`` every head and neuron ends an edge,
chosen or not, and an edge is what the residual stream alone carries; what came from nodes that are
not chosen is each node's ``rest``.

The graph is pruned by influence (:mod:`lenslrp.analysis.graph_pruning`). Nodes that go conduct
again: the graph is made anew of those that stay. What edges that go carried is added to ``rest``,
so that sums still close.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lenslrp import media
from lenslrp.analysis.cut_pass import EMBEDDINGS, CutPass, coefficients, cut
from lenslrp.analysis.graph_pruning import Mask, Matrix, Vector, influential, strongest
from lenslrp.analysis.nodes import COMPONENTS, TARGET, Node, place_components
from lenslrp.analysis.question import Passes
from lenslrp.analysis.replaced import repeated
from lenslrp.cache import RelevanceCache
from lenslrp.errors import InputError
from lenslrp.hooks import AttnLRP, Composite
from lenslrp.hooks.components import layer_of
from lenslrp.hooks.sites import TERMS
from lenslrp.inputs import Prepared, is_encoder_decoder, str_token
from lenslrp.targets import Explained, Outputs, PerRow, Target, Top, as_target
from lenslrp.targets import Sequence as Span

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lenslrp.analysis.plots import Theme

KINDS: Mapping[str, str] = {
    "heads": "head", "neurons": "neuron", "attention": "attention", "mlp": "mlp"
}  # fmt: skip
"""Component -> what a node of it is called."""

ABSORBED = (*TERMS, "nonlinear_target")
"""What the ledger may find absorbed in a node; the last at the target alone."""

_Here = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """Nodes and edges with relevance that sums; displays itself, zoomable, in notebooks.

    Attributes:
        nodes: one row a node, in the order in which the model computes them: ``id``, ``kind``
            (``"token"``, ``"head"``, ``"neuron"``, ``"target"``), ``layer`` (-1 for tokens, the
            number of layers for the target), ``position``, ``unit``, ``label``, ``relevance`` and
            ``activation`` (a head's: the length of its vector), ``influence`` on the target
            (0 to 1), ``rest`` (relevance from nodes and edges that are not shown) and, for each
            term of the ledger, what was absorbed.
        edges: ``source``, ``target`` (ids) and ``relevance``, in units of the target.
        str_tokens, token_ids: the prompt.
        explained: the target and its value.
        token: id of the token that is explained, ``None`` where it is not one; ``probability``:
            the model's, of it.
        layers: how many the model has.
        chosen: how many heads and neurons were nodes before pruning, and of how many.
        settings: what the graph was made with.
        passes: of the prompt through the model.
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
    passes: Passes

    @property
    def error(self) -> float:
        """The largest gap between a node's relevance and what entered it, relative to the target.

        Of every node but the tokens, where relevance ends.
        """
        entered = self.edges.groupby("target")["relevance"].sum()
        nodes = self.nodes[self.nodes["kind"] != "token"].set_index("id")
        found = entered.reindex(nodes.index, fill_value=0.0) + nodes["rest"]
        found += nodes[list(ABSORBED)].sum(axis=1)
        return float((nodes["relevance"] - found).abs().max() / abs(self._target))

    @property
    def _target(self) -> float:
        return float(self.explained.value[0]) or 1.0

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` edges with the most relevance, in size, with their ends' labels."""
        labels = self.nodes.set_index("id")["label"]
        order = self.edges["relevance"].abs().sort_values(ascending=False, kind="stable").index
        frame = self.edges.loc[order[:k]].reset_index(drop=True)
        return frame.assign(source_label=frame["source"].map(labels),
                            target_label=frame["target"].map(labels))  # fmt: skip

    def to_networkx(self) -> Any:
        """A ``networkx.DiGraph``: ids with the columns of ``nodes``, edges with ``relevance``."""
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
        """Write Neuronpedia's attribution-graph JSON; see :mod:`lenslrp.analysis.graph_export`.

        Args:
            slug: the graph's name there.
            model_id: Neuronpedia's name of the model; by default the model's own, in lower case.
        """
        from lenslrp.analysis.graph_export import write_neuronpedia

        return write_neuronpedia(self, Path(path), slug=slug, model_id=model_id)

    def to_html(self, path: str | Path | None = None) -> str:
        """The zoomable picture as HTML without remote assets; a whole page, with ``path``."""
        from lenslrp.analysis.graph_picture import graph_html, write_page

        return graph_html(self) if path is None else write_page(self, Path(path))

    def draw(self, *, theme: Theme | None = None) -> Figure:
        """The static picture, with matplotlib."""
        from lenslrp.analysis.graph_plot import graph_figure

        return graph_figure(self, theme)

    def _repr_html_(self) -> str:
        return self.to_html()

    def __repr__(self) -> str:
        return (
            f"AttributionGraph({self.explained}, {len(self.nodes)} nodes, {len(self.edges)} edges)"
        )


def attribution_graph(
    model: Any,
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

    Args:
        model: a ``TransformerBridge`` that is no encoder-decoder, in eval mode.
        input, target: of :func:`lenslrp.run_with_relevance`; one prompt.
        composite: the rules; ``AttnLRP()`` if not given.
        components: what may become a node: keys of :data:`KINDS`.
        k, share: the most relevant nodes (in size) are chosen: as many as hold ``share`` of all
            nodes' relevance, and at most ``k``.
        direct: end edges at all nodes, chosen or not.
        node_share: of the influence on the target that the nodes which stay must hold.
        edge_share: likewise, of the edges that stay.
        rows: how many chosen nodes a backward pass serves.

    Raises:
        InputError: more than one prompt, or a choice that does not exist.
    """
    _check(model, components, k, {"share": share, "node_share": node_share,
                                  "edge_share": edge_share}, rows)  # fmt: skip
    rules = AttnLRP() if composite is None else composite
    wanted = as_target(target, model.tokenizer, 1, media.labels_of(model))
    if isinstance(wanted, PerRow):
        wanted = wanted.targets[0]
    append = wanted.ids(model.tokenizer) if isinstance(wanted, Span) else []
    prepared = media.prepare(
        model, input, {}, append=append, prepend_bos=prepend_bos, attention_mask=None,
        inputs_embeds=None, decoder_input=None,
    )  # fmt: skip
    if len(prepared.tokens) != 1:
        raise InputError(f"a graph is of one prompt; {len(prepared.tokens)} were given")
    hooks = place_components(model, components)
    cache, here = coefficients(
        model, hooks, input=input, target=wanted, composite=rules, prepend_bos=prepend_bos,
        ledger=False,
    )  # fmt: skip
    chosen = choose_nodes(here, k, share)
    build = partial(_build, model, prepared, wanted, hooks, rules, here, cache, rows, direct)
    made = build(chosen)
    stays = influential(made.amounts, made.sinks, made.fixed, node_share)
    passes = [made.passes]
    if direct:
        made = made.without(stays)
    elif not stays.all():  # those that go conduct again
        ids = set(made.frame.loc[stays, "id"])
        made = build([node for node in chosen if str(node) in ids])
        passes.append(made.passes)
    edges, stays, influence = strongest(made.amounts, made.sinks, made.fixed, edge_share)
    frame = made.frame.assign(influence=influence)
    frame["rest"] += np.where(edges, 0.0, made.amounts).sum(axis=1)
    ids = frame["id"].to_numpy()
    downs, ups = edges.nonzero()
    columns = ["id", "kind", "layer", "position", "unit", "label", "relevance", "activation",
               "influence", "rest", *ABSORBED]  # fmt: skip
    return AttributionGraph(
        nodes=frame.loc[stays, columns].reset_index(drop=True),
        edges=pd.DataFrame(
            {"source": ids[ups], "target": ids[downs], "relevance": made.amounts[downs, ups]}
        ),
        str_tokens=cache.str_tokens[0],
        token_ids=cache.token_ids[0].tolist(),
        explained=cache.target,
        token=made.token,
        probability=made.probability,
        layers=int(model.cfg.n_layers),
        chosen=(len(chosen), sum(x.shape[1] * x.shape[2] for x, _ in here.values())),
        model_name=cache.model_name,
        settings={
            "composite": rules.name, "components": list(components), "k": k, "share": share,
            "direct": direct, "node_share": node_share, "edge_share": edge_share,
        },
        passes=Passes(1 + sum(p.forward for p in passes), 1 + sum(p.backward for p in passes)),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Made:
    """A graph of all chosen nodes: what goes from each to each, [downstream, upstream], and the
    table of nodes, as ``amounts`` numbers them."""

    frame: pd.DataFrame
    amounts: Matrix
    token: int | None
    probability: float
    passes: Passes

    @property
    def sinks(self) -> Vector:
        """[node], the size of what ends there: absorbed, or from elsewhere."""
        found: Vector = self.frame[["rest", *ABSORBED]].abs().sum(axis=1).to_numpy()
        return found

    @property
    def fixed(self) -> Mask:
        found: Mask = self.frame["kind"].isin(["token", "target"]).to_numpy()
        return found

    def without(self, stays: Mask) -> _Made:
        """Only the nodes that stay; what the others gave is rest."""
        frame = self.frame.copy()
        frame["rest"] += self.amounts[:, ~stays].sum(axis=1)
        kept = frame.loc[stays].reset_index(drop=True)
        return replace(self, frame=kept, amounts=self.amounts[stays][:, stays])


def _build(
    model: Any,
    prepared: Prepared,
    target: Target,
    hooks: Mapping[str, str],
    rules: Composite,
    here: _Here,
    cache: RelevanceCache,
    rows: int,
    direct: bool,
    chosen: Sequence[Node],
) -> _Made:
    copies = min(rows, len(chosen) + 1)
    keep = None if direct else node_masks(chosen, here)
    tokens, layers = cache.str_tokens[0], int(model.cfg.n_layers)
    with cut(
        model, repeated(prepared, copies), target, hooks, rules, keep=keep, books=True
    ) as passed:
        amounts, columns, begun = _amounts(passed, chosen, here, copies, len(tokens))
        token, probability = _token(target, passed.run.outputs())
    leaves = cache.tokens if cache.positions is None else cache.tokens + cache.positions
    value = float(cache.target.value[0])
    position = getattr(target, "position", -1) % len(tokens)
    label = "target"
    if token is not None:
        label = str(token) if model.tokenizer is None else str_token(model.tokenizer, token)
    frame = pd.DataFrame(list(_described(chosen, hooks, here, tokens, layers, position, label)))
    frame["relevance"] = [
        *leaves[0].double().tolist(), *(_relevance(here, node) for node in chosen), value
    ]  # fmt: skip
    for column in ("rest", *ABSORBED):
        frame[column] = columns.get(column, np.zeros(len(frame)))
    frame.loc[frame.index[-1], "nonlinear_target"] = value - begun
    return _Made(frame, amounts, token, probability, Passes(copies, 1 + len(chosen)))


def _check(
    model: Any, components: Sequence[str], k: int, shares: Mapping[str, float], rows: int
) -> None:
    if is_encoder_decoder(model):
        raise InputError("a graph is of one stack of layers; this model is an encoder-decoder")
    unknown = [name for name in components if name not in KINDS]
    if unknown or isinstance(components, str):
        raise InputError(f"components are some of {', '.join(KINDS)}, not {components!r}")
    if k < 1 or rows < 1:
        raise InputError(f"k and rows must be at least 1, not {k} and {rows}")
    for name, value in shares.items():
        if not 0 < value <= 1:
            raise InputError(f"{name} must be above 0 and at most 1, not {value}")


def choose_nodes(here: _Here, k: int, share: float) -> list[Node]:
    """The most relevant nodes, in the order in which the model computes them."""
    sizes = {hook: (x * g)[0].sum(dim=-1).abs().double().cpu() for hook, (x, g) in here.items()}
    flat = torch.cat([size.flatten() for size in sizes.values()])
    best = flat.sort(descending=True, stable=True)
    enough = int((best.values.cumsum(0) < share * float(flat.sum())).sum()) + 1
    nodes = [
        Node(hook, unit, position)
        for hook, size in sizes.items()
        for position in range(size.shape[0])
        for unit in range(size.shape[1])
    ]
    order = {hook: (layer_of(hook) or 0, i) for i, hook in enumerate(here)}
    found = [nodes[index] for index in best.indices[: min(k, enough)].tolist()]
    return sorted(found, key=lambda n: (order[n.hook], n.position or 0, n.unit))


def node_masks(chosen: Sequence[Node], here: _Here) -> dict[str, Tensor]:
    masks = {hook: torch.zeros(x.shape[1:3], dtype=torch.bool) for hook, (x, _) in here.items()}
    for node in chosen:
        masks[node.hook][node.position, node.unit] = True
    return masks


def _amounts(
    passed: CutPass, chosen: Sequence[Node], here: _Here, copies: int, length: int
) -> tuple[Matrix, dict[str, Vector], float]:
    """Relevance [downstream, upstream]; what came from elsewhere and what was absorbed, by column
    of the table; and the relevance with which the target began.

    Nodes are numbered tokens first, then those that are chosen, then the target.
    """
    downs = [*chosen, TARGET]
    size = length + len(downs)
    amounts, columns = np.zeros((size, size)), {"rest": np.zeros(size)}
    begun_at = 0.0
    for start in range(0, len(downs), copies):
        batch = downs[start : start + copies]
        rows = slice(length + start, length + start + len(batch))
        arrived, begun = passed.into(batch, here)
        begun_at += float(begun.sum())
        for hook, g in arrived.items():
            if hook == EMBEDDINGS:
                found = (passed.embedded() * g).sum(dim=(2, 3)).double().cpu().numpy()
                amounts[rows, :length] = found[: len(batch)]
                continue
            found = (passed.at(hook) * g).sum(dim=3).double().cpu().numpy()[: len(batch)]
            columns["rest"][rows] += found.sum(axis=(1, 2))
            for index, node in enumerate(chosen):
                if node.hook == hook:
                    part = found[:, node.position, node.unit]
                    amounts[rows, length + index] = part
                    columns["rest"][rows] -= part
        for term, value in passed.absorbed().items():
            columns.setdefault(term, np.zeros(size))[rows] = value.numpy()[: len(batch)]
    return amounts, columns, begun_at


def _relevance(here: _Here, node: Node) -> float:
    x, g = here[node.hook]
    at = (0, node.position, node.unit)
    return float((x[at].double() * g[at].double()).sum())


def _token(target: Target, outputs: Outputs) -> tuple[int | None, float]:
    """The token that is explained, where it is one, and its probability."""
    token, position = getattr(target, "token", None), getattr(target, "position", -1)
    rows = outputs.rows_at(position).detach().float() if outputs.logits.ndim == 3 else None
    if rows is None or (token is None and not isinstance(target, Top)):
        return None, 0.0
    index = int(rows[0].argmax()) if token is None else outputs.token(token)
    return index, float(rows[0].softmax(dim=0)[index])


def _described(
    chosen: Sequence[Node],
    hooks: Mapping[str, str],
    here: _Here,
    tokens: Sequence[str],
    layers: int,
    position: int,
    label: str,
) -> Iterator[dict[str, Any]]:
    for place, token in enumerate(tokens):
        yield {"id": f"token@{place}", "kind": "token", "layer": -1, "position": place,
               "unit": 0, "label": token, "activation": np.nan}  # fmt: skip
    for node in chosen:
        kind, layer = KINDS[hooks[node.hook]], layer_of(node.hook)
        x = here[node.hook][0][0, node.position, node.unit]
        one = COMPONENTS[hooks[node.hook]].kind == "entry"
        shown = {"head": f"H{layer}.{node.unit}", "neuron": f"N{layer}.{node.unit}"}
        yield {"id": str(node), "kind": kind, "layer": layer, "position": node.position,
               "unit": node.unit, "label": shown.get(kind, f"{kind} {layer}"),
               "activation": float(x) if one else float(x.norm())}  # fmt: skip
    yield {"id": "target", "kind": "target", "layer": layers, "position": position, "unit": 0,
           "label": label, "activation": np.nan}  # fmt: skip
