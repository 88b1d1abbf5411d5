"""What passes along each edge of a circuit: from one node's output straight to another's.

The effect of an edge `u -> d` is what a metric gains when `d`, and it alone, is computed from `u`
as `u` is in the other run: along the residual stream and through norms, past every other node. As
for nodes (`lenslrp.analysis.circuits.scores`) it is estimated by activation difference times
coefficient, or measured:

* **relevance patching** and **attribution patching** (Syed et al. 2023): the coefficient is that of
  relevance, or of the gradient, conditional on `d`: a backward pass that starts at `d` with `d`'s
  own coefficient and ends at the first nodes that it meets (`lenslrp.analysis.circuits.segments`).
  One such pass a downstream node, on a batch row of its own, gives the edges from all upstream
  nodes; what leaves a node along all its edges sums to its node score;
* **integrated gradients** (Hanna et al. 2024): the same coefficients, averaged along the straight
  line between the embeddings of the two runs;
* **exact**: path patching (`lenslrp.analysis.circuits.path_patching`).

Nodes are those of the component classes that are given; whatever is not a node conducts. So the
same function gives edges between heads and MLPs, or between heads alone, through MLPs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lenslrp.analysis.circuits.edge_methods import (
    MAX_DOWNSTREAM as MAX_DOWNSTREAM,
)
from lenslrp.analysis.circuits.edge_methods import (
    Edge,
    estimated_scores,
    exact_scores,
    integrated_scores,
)
from lenslrp.analysis.circuits.faces import facts_of
from lenslrp.analysis.circuits.files import Saved
from lenslrp.analysis.circuits.measured_pairs import MeasuredPairs
from lenslrp.analysis.circuits.metrics import Metric, MetricFunction
from lenslrp.analysis.circuits.node_methods import common_fields, require_slope
from lenslrp.analysis.circuits.nodes import (
    Node,
    largest,
    paired_runs,
    place_components,
    require_positions,
)
from lenslrp.analysis.circuits.pairs import Pairs, ordered
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.batch import Batch
from lenslrp.errors import InputError
from lenslrp.hooks import Composite, GradientTimesInput, RelP
from lenslrp.hooks.structure import layer_of, unchanged
from lenslrp.sessions import Session
from lenslrp.views.cards import ROWS, Face, Shown

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

EDGE_METHODS: Mapping[str, Callable[[], Composite] | None] = {
    "relevance": RelP,
    "attribution": GradientTimesInput,
    "integrated": GradientTimesInput,
    "exact": None,
}
"""Method -> the rules of its coefficients."""

SEQUENCES_AT_ONCE = 64
"""How many sequences run at once."""


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores(Shown, Saved):
    """What each edge does to a metric, estimated or exact, in the metric's unit.

    Attributes:
        method, direction: how they were computed.
        components: hook point of upstream nodes -> component name, in the model's order.
        into: the downstream nodes; `TARGET` is the metric itself.
        values: upstream hook point -> [pair, into, unit], or [pair, into, pos, unit]; exactly 0
            where there can be no edge, NaN where `"exact"` was not asked.
        clean, corrupt: [pair], the metric of each run.
        mask: [pair, pos], True where a token of the base run is real.
        passes: of one pair through the model.
        correct: [pair], whether the clean run prefers the answer to the incorrect one; None where
            that is not known.
        metric: its name.
    """

    made_from: ClassVar = {
        "passes": lambda count: PassCount(**count),
        "into": lambda nodes: tuple(Node(**node) for node in nodes),
    }

    method: str
    direction: str
    components: Mapping[str, str]
    into: tuple[Node, ...]
    values: Mapping[str, Tensor]
    clean: Float[Tensor, " pair"]
    corrupt: Float[Tensor, " pair"]
    mask: Tensor
    passes: PassCount
    correct: Bool[Tensor, " pair"] | None = None
    metric: str = "logit_difference"

    def face(self) -> Face:
        frame = self.to_dataframe()
        names = ["from", "to", "component", "score", "std"]
        return Face(
            f"Scores of edges: {self.method}, {self.direction}",
            {"edges": len(frame), **facts_of(self)},
            largest(frame, "score", ROWS)[names],
            ["score"],
            [f"The largest in size; in units of {self.metric.replace('_', ' ')}, mean over pairs."],
        )

    @property
    def by_position(self) -> bool:
        """Whether each node stands for one position."""
        return next(iter(self.values.values())).ndim == 4

    def score(self, up: Node, down: Node) -> Float[Tensor, " pair"]:
        """One edge.

        Args:
            up, down: its ends.

        Returns:
            [pair], in logits.

        Raises:
            InputError: an end that was not scored.
        """
        if down not in self.into or up.hook not in self.values:
            raise InputError(f"the edge {up} -> {down} was not scored")
        scores = self.values[up.hook][:, self.into.index(down)]
        if up.position is None or up.position >= 0:
            return scores[:, up.position, up.unit] if self.by_position else scores[:, up.unit]
        return Batch.of_mask(self.mask).picked(scores, up.position)[:, up.unit]

    def outgoing(self) -> dict[str, Tensor]:
        """The sum over all downstream nodes: the node's score, if these are all there are.

        Returns:
            Upstream hook point -> [pair, unit] or [pair, pos, unit], in logits.
        """
        return {hook: value.sum(dim=1) for hook, value in self.values.items()}

    def to_dataframe(self) -> pd.DataFrame:
        """One row an edge that is not exactly 0.

        Columns: `from`, `to`, `component`, `layer`, `hook`, `unit`, `position` (`None` for all),
        `score` (mean over pairs, logits), `std` over pairs.
        """
        frames = []
        for hook, name in self.components.items():
            value = self.values[hook].double()
            scored = (value != 0).any(dim=0) & ~value.isnan().all(dim=0)
            index = scored.nonzero().tolist()
            mean = value.nanmean(dim=0)
            std = (value - mean).square().nanmean(dim=0).sqrt()[scored]
            ups = [Node(hook, i[-1], i[1] if self.by_position else None) for i in index]
            frames.append(
                pd.DataFrame(
                    {
                        "from": [str(up) for up in ups],
                        "to": [str(self.into[i[0]]) for i in index],
                        "component": name,
                        "layer": layer_of(hook),
                        "hook": hook,
                        "unit": [up.unit for up in ups],
                        "position": [up.position for up in ups],
                        "score": mean[scored].tolist(),
                        "std": std.tolist(),
                    }
                )
            )
        return pd.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The `k` rows of `to_dataframe` whose score is largest in size."""
        return largest(self.to_dataframe(), "score", k)

    def best(self, k: int = 10) -> list[Edge]:
        """The ends of the edges of `top`, as `only=` takes them."""
        downs = {str(node): node for node in self.into}
        return [
            (
                Node(row["hook"], int(row["unit"]),
                     int(row["position"]) if self.by_position else None),
                downs[row["to"]],
            )
            for row in self.top(k).to_dict("records")
        ]  # fmt: skip


def score_edges(
    model: TransformerBridge,
    pairs: Pairs,
    *,
    method: str = "relevance",
    metric: str | Metric | MetricFunction = "logit_difference",
    components: Sequence[str] = ("tokens", "heads", "mlp"),
    into: Iterable[Node] | None = None,
    direction: str = "denoising",
    by_position: bool = False,
    composite: Composite | None = None,
    steps: int = 5,
    only: Iterable[Edge] | None = None,
    rows: int = SEQUENCES_AT_ONCE,
) -> EdgeScores:
    """The effect of every edge into some nodes, estimated or exact.

    Attribution patching along edges is of Syed et al. (2023), integrated gradients of Hanna et al.
    (2024), path patching of Wang et al. (2022).

    Args:
        model: a `TransformerBridge` of a decoder, in eval mode.
        pairs: clean and corrupted prompts.
        method: `"relevance"`, `"attribution"`, `"integrated"` or `"exact"`.
        metric: what is measured of a run, as for `score_nodes`.
        components: names from `lenslrp.analysis.circuits.nodes.COMPONENTS`: the nodes, which all
            edges end at. With `q`, `k`, `v` beside `heads`, a head's edges come from those three,
            and theirs from the stream. Not `"residual"`, which nothing gets past.
        into: the downstream nodes; all nodes and the metric if not given.
        direction: `"denoising"` or `"noising"`, as for nodes.
        by_position: one node a position, or all positions together. Downstream nodes have a
            position then, or none.
        composite: the rules of `"relevance"`, `RelP()` if not given, or of `"integrated"`, plain
            gradients if not given.
        steps: of `"integrated"`, as for `score_nodes`.
        only: of `"exact"`, where it must be given: the edges to patch.
        rows: how many sequences run at once. Each downstream node of each pair takes one.

    Returns:
        Scores in the metric's unit: what the metric of the base run gains.

    Raises:
        InputError: a choice that does not exist, or does not go with the method; more than
            `MAX_DOWNSTREAM` downstream nodes without `into`.

    Examples:
        >>> scores = score_edges(model, pairs, into=[TARGET])
        >>> scores.values["blocks.0.attn.hook_z"].shape  # 100 pairs, 1 downstream node, 12 heads
        torch.Size([100, 1, 12])
        >>> measured = score_edges(model, pairs, method="exact", only=scores.best(3))
    """
    _check(method, components, composite, only, rows, steps, len(pairs))
    measured = MeasuredPairs.of(pairs, metric)
    require_slope(measured, method, direction)
    whole = ordered(direction, measured.seen_from("corrupt"), measured.seen_from("clean"))[0]
    placed = place_components(model, components)
    hooks = {hook: placed[hook] for hook in sorted(placed, key=_depth)}
    passes = PassCount()
    edges = None if only is None else list(only)
    downs = None if into is None else list(into)
    ends = [node for edge in edges or () for node in edge] + (downs or [])
    require_positions(ends, whole)
    rules = composite or (EDGE_METHODS[method] or GradientTimesInput)()
    with ExitStack() as stack:
        stack.enter_context(unchanged(model))
        if edges is None:
            session = Session(model, rules, ledger=False, logits="target", stays=False)
            stack.enter_context(session)
            along = partial(integrated_scores, steps=steps)
            estimate = along if method == "integrated" else estimated_scores
            score = partial(estimate, session=session, into=downs, rows=rows)
        else:
            score = partial(exact_scores, edges=edges)
        chunks = paired_runs(model, measured, rows, direction, hooks, by_position, passes)
        scored = [score(runs) for runs in chunks]
    bases, others, intos, scores = zip(*scored, strict=True)
    wide = partial(whole.padded, only=ends) if by_position else torch.as_tensor
    values = {
        hook: measured.folded(torch.cat([wide(part[hook]) for part in scores]))
        for hook in hooks
        if all(hook in part for part in scores)
    }
    kept = {hook: hooks[hook] for hook in values}
    fields = common_fields(model, pairs, measured, direction, (bases, others), passes)
    return EdgeScores(method, direction, kept, intos[0], values, **fields)


def _check(
    method: str,
    components: Sequence[str],
    composite: Composite | None,
    only: Iterable[Edge] | None,
    rows: int,
    steps: int,
    pairs: int,
) -> None:
    if method not in EDGE_METHODS:
        raise InputError(f"method must be one of {', '.join(EDGE_METHODS)}, not {method!r}")
    if composite is not None and method not in ("relevance", "integrated"):
        raise InputError(f"a composite is for method='relevance' and 'integrated', not {method!r}")
    if (only is None) == (method == "exact"):
        raise InputError("only says which edges method='exact' patches, and goes with it alone")
    if "residual" in components:
        raise InputError("the residual stream cannot be a node of edges: nothing gets past it")
    for name, number in (("rows", rows), ("steps", steps)):
        if number < 1:
            raise InputError(f"{name} must be at least 1, not {number}")
    if pairs == 0:
        raise InputError("no pairs to score")


def _depth(hook: str) -> int:
    layer = layer_of(hook)
    return -1 if layer is None else layer
