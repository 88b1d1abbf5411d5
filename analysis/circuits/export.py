"""Scores as TransformerLens' own result of attribution patching.

`transformer_lens.tools.analysis.attribution_patching.AttributionResult` has one number a node or
an edge, averaged over pairs, at one position each. What fits: nodes `tokens`, `heads` and
`mlp`; edges from those into `q`, `k`, `v`, `mlp` and the target. What does not fit:
neurons, the residual stream, whole attention layers, and nodes that stand for all positions.
Edges there enter a head through its query, key or value only, so edges straight into heads do not
fit either; those from `q`, `k` and `v` to their own head are left out, since the head is
where they lead. With grouped queries, which TransformerLens' own edges refuse, `head` of a key or
value is the number of its group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor
from transformer_lens.tools.analysis.attribution_patching import AttributionResult, NodeKind
from transformer_lens.tools.analysis.attribution_patching import Node as LensNode

from lenslrp.analysis.circuits.edges import EdgeScores
from lenslrp.analysis.circuits.nodes import TARGET, Node
from lenslrp.analysis.circuits.scores import NodeScores
from lenslrp.errors import InputError
from lenslrp.hooks.readers import SCAN_HOOKS
from lenslrp.hooks.structure import layer_of

WRITERS: dict[str, NodeKind] = {"tokens": "embed", "heads": "attn_head_out", "mlp": "mlp_out"}
READERS: dict[str, NodeKind] = {"q": "q_input", "k": "k_input", "v": "v_input", "mlp": "mlp_in"}


def to_transformer_lens(scores: NodeScores | EdgeScores) -> AttributionResult:
    """Scores by position, as TransformerLens' dataclass; edges that are exactly 0 are left out.

    Args:
        scores: of `score_nodes` or `score_edges`, with `by_position=True`.

    Returns:
        A score a node, or an edge, in logits, averaged over pairs.

    Raises:
        InputError: what does not fit, by name.
    """
    if not scores.by_position:
        raise InputError("TransformerLens' nodes have a position: score with by_position=True")
    if isinstance(scores, NodeScores):
        odd = [c for c in scores.components.values() if c not in WRITERS]
        if odd:
            raise InputError(f"{odd[0]!r} is no node of TransformerLens; {', '.join(WRITERS)} are")
        _require_attention(scores.components)
        return AttributionResult(_nodes(scores.values, scores.components))
    return _edges(scores)


def _nodes(values: Mapping[str, Tensor], components: Mapping[str, str]) -> dict[LensNode, float]:
    scores = {}
    for hook, value in values.items():
        mean = value.double().mean(dim=0)
        for position, row in enumerate(mean.tolist()):
            for unit, score in enumerate(row):
                node = Node(hook, unit, position)
                scores[_lens_node(WRITERS[components[hook]], node)] = score
    return scores


def _edges(scores: EdgeScores) -> AttributionResult:
    _require_attention(scores.components)
    last = max(layer_of(hook) or 0 for hook in scores.components)
    edges: dict[tuple[LensNode, LensNode], float] = {}
    totals: dict[LensNode, float] = {}
    for hook, component in scores.components.items():
        mean = scores.values[hook].double().mean(dim=0)  # [into, pos, unit]
        for index, position, unit in mean.nonzero().tolist():
            down, up = scores.into[index], Node(hook, unit, position)
            if component in READERS and component not in WRITERS:
                continue
            if down == TARGET:
                reader = LensNode("logits", position, layer=last)
            else:
                kind = READERS.get(scores.components.get(down.hook, ""))
                if kind is None:
                    raise InputError(
                        f"TransformerLens has no edges into {down}: score with "
                        'components=("tokens", "heads", "mlp", "q", "k", "v")'
                    )
                if down.position is None:
                    raise InputError(f"TransformerLens' nodes have a position; {down} has none")
                reader = _lens_node(kind, down)
            if component not in WRITERS:
                raise InputError(
                    f"{component!r} is no node of TransformerLens; {', '.join(WRITERS)} are"
                )
            writer = _lens_node(WRITERS[component], up)
            edges[writer, reader] = float(mean[index, position, unit])
            totals[writer] = totals.get(writer, 0.0) + edges[writer, reader]
    return AttributionResult(totals, edges)


def _require_attention(hooks: Iterable[str]) -> None:
    recurrent = [hook for hook in hooks if hook.endswith(SCAN_HOOKS)]
    if recurrent:
        raise InputError(f"{recurrent[0]} is of a recurrent mixer, no node of TransformerLens")


def _lens_node(kind: NodeKind, node: Node) -> LensNode:
    layer, headless = layer_of(node.hook), kind in ("embed", "mlp_out", "mlp_in")
    assert node.position is not None
    return LensNode(kind, node.position, layer=layer, head=None if headless else node.unit)
