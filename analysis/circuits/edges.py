"""What passes along each edge of a circuit: from one node's output straight to another's.

The effect of an edge `u -> d` is what the logit difference gains when `d`, and it alone, is
computed from `u` as `u` is in the other run: along the residual stream and through norms, past
every other node. As for nodes (`lenslrp.analysis.circuits.scores`) it is estimated by activation
difference times coefficient, or measured:

* **relevance patching** and **attribution patching** (Syed et al. 2023): the coefficient is that of
  relevance, or of the gradient, conditional on `d`: a backward pass that starts at `d` with `d`'s
  own coefficient and ends at the first nodes that it meets (`lenslrp.analysis.circuits.segments`).
  One such pass a downstream node, on a batch row of its own, gives the edges from all upstream
  nodes; what leaves a node along all its edges sums to its node score;
* **exact**: path patching (`lenslrp.analysis.circuits.path_patching`).

Nodes are those of the component classes that are given; whatever is not a node conducts. So the
same function gives edges between heads and MLPs, or between heads alone, through MLPs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.analysis.circuits.nodes import (
    TARGET,
    Node,
    Runs,
    Units,
    batch_of,
    largest,
    masking,
    paired_runs,
    place_components,
    require_positions,
)
from lenslrp.analysis.circuits.pairs import Pairs, ordered
from lenslrp.analysis.circuits.path_patching import exact_edges
from lenslrp.analysis.circuits.segments import EMBEDDINGS, coefficients, segmented
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.batch import Batch
from lenslrp.errors import InputError
from lenslrp.hooks import Composite, GradientTimesInput, RelP
from lenslrp.hooks.structure import layer_of, unchanged
from lenslrp.sessions import Session

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Edge = tuple[Node, Node]

EDGE_METHODS = {"relevance": RelP, "attribution": GradientTimesInput, "exact": None}
"""Method -> the rules of its coefficients."""

SEQUENCES_AT_ONCE = 64
"""How many sequences run at once."""

MAX_DOWNSTREAM = 4096
"""More downstream nodes than this must be asked for one by one."""


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """What each edge does to the logit difference, estimated or exact, in logits.

    Attributes:
        method, direction: how they were computed.
        components: hook point of upstream nodes -> component name, in the model's order.
        into: the downstream nodes; `TARGET` is the logit difference itself.
        values: upstream hook point -> [pair, into, unit], or [pair, into, pos, unit]; exactly 0
            where there can be no edge, NaN where `"exact"` was not asked.
        clean, corrupt: [pair], the logit difference of each run.
        mask: [pair, pos], True where a token is real.
        passes: of one pair through the model.
    """

    method: str
    direction: str
    components: Mapping[str, str]
    into: tuple[Node, ...]
    values: Mapping[str, Tensor]
    clean: Float[Tensor, " pair"]
    corrupt: Float[Tensor, " pair"]
    mask: Tensor
    passes: PassCount

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
    components: Sequence[str] = ("tokens", "heads", "mlp"),
    into: Iterable[Node] | None = None,
    direction: str = "denoising",
    by_position: bool = False,
    composite: Composite | None = None,
    only: Iterable[Edge] | None = None,
    rows: int = SEQUENCES_AT_ONCE,
) -> EdgeScores:
    """The effect of every edge into some nodes, estimated or exact.

    Attribution patching along edges is of Syed et al. (2023), path patching of Wang et al. (2022).

    Args:
        model: a `TransformerBridge` of a decoder, in eval mode.
        pairs: clean and corrupted prompts.
        method: `"relevance"`, `"attribution"` or `"exact"`.
        components: names from `lenslrp.analysis.circuits.nodes.COMPONENTS`: the nodes, which all
            edges end at. With `q`, `k`, `v` beside `heads`, a head's edges come from those three,
            and theirs from the stream. Not `"residual"`, which nothing gets past.
        into: the downstream nodes; all nodes and the logit difference if not given.
        direction: `"denoising"` or `"noising"`, as for nodes.
        by_position: one node a position, or all positions together. Downstream nodes have a
            position then, or none.
        composite: the rules of `"relevance"`; `RelP()` if not given.
        only: of `"exact"`, where it must be given: the edges to patch.
        rows: how many sequences run at once. Each downstream node of each pair takes one.

    Returns:
        Scores in logits: what the logit difference of the base run gains.

    Raises:
        InputError: a choice that does not exist, or does not go with the method; more than
            `MAX_DOWNSTREAM` downstream nodes without `into`.

    Examples:
        >>> scores = score_edges(model, pairs, into=[TARGET])
        >>> scores.values["blocks.0.attn.hook_z"].shape  # 100 pairs, 1 downstream node, 12 heads
        torch.Size([100, 1, 12])
        >>> measured = score_edges(model, pairs, method="exact", only=scores.best(3))
    """
    _check(method, components, composite, only, rows, len(pairs))
    placed = place_components(model, components)
    hooks = {hook: placed[hook] for hook in sorted(placed, key=_depth)}
    passes = PassCount()
    edges = None if only is None else list(only)
    downs = None if into is None else list(into)
    ends = [node for edge in edges or () for node in edge] + (downs or [])
    require_positions(ends, pairs)
    rules = composite or (EDGE_METHODS[method] or GradientTimesInput)()
    with ExitStack() as stack:
        stack.enter_context(unchanged(model))
        if edges is None:
            session = Session(model, rules, ledger=False, logits="target", stays=False)
            stack.enter_context(session)
            score = partial(_estimated, session=session, into=downs, rows=rows)
        else:
            score = partial(_exact, edges=edges)
        chunks = paired_runs(model, pairs, rows, direction, hooks, by_position, passes)
        scored = [score(runs) for runs in chunks]
    bases, others, intos, scores = zip(*scored, strict=True)
    wide = partial(pairs.padded, only=ends) if by_position else torch.as_tensor
    values = {
        hook: torch.cat([wide(part[hook]) for part in scores])
        for hook in hooks
        if all(hook in part for part in scores)
    }
    corrupt, clean = ordered(direction, torch.cat(bases).detach(), torch.cat(others))
    kept = {hook: hooks[hook] for hook in values}
    return EdgeScores(
        method, direction, kept, intos[0], values, clean, corrupt, pairs.mask, passes
    )  # fmt: skip


def _check(
    method: str,
    components: Sequence[str],
    composite: Composite | None,
    only: Iterable[Edge] | None,
    rows: int,
    pairs: int,
) -> None:
    if method not in EDGE_METHODS:
        raise InputError(f"method must be one of {', '.join(EDGE_METHODS)}, not {method!r}")
    if composite is not None and method != "relevance":
        raise InputError(f"a composite is for method='relevance', not {method!r}")
    if (only is None) == (method == "exact"):
        raise InputError("only says which edges method='exact' patches, and goes with it alone")
    if "residual" in components:
        raise InputError("the residual stream cannot be a node of edges: nothing gets past it")
    if rows < 1:
        raise InputError(f"rows must be at least 1, not {rows}")
    if pairs == 0:
        raise InputError("no pairs to score")


_ScoredEdges = tuple[Tensor, Tensor, tuple[Node, ...], dict[str, Tensor]]


def _estimated(
    runs: Runs, *, session: Session, into: Iterable[Node] | None, rows: int
) -> _ScoredEdges:
    pairs, model = runs.pairs, runs.model
    cache, nodes = coefficients(
        session, runs.hooks, input=runs.base, target=pairs, **masking(pairs, runs.base.device)
    )
    runs.passes.forward += len(pairs)
    runs.passes.backward += len(pairs)
    other, other_units = runs.read(runs.other)
    deltas = {hook: other_units.pop(hook) - nodes[hook][0] for hook in runs.hooks}
    downs = _downstream(runs, deltas) if into is None else tuple(into)
    _require(downs, deltas)
    scores = {
        hook: delta.new_zeros(
            len(pairs), len(downs), *delta.shape[1 if runs.by_position else 2 : 3]
        )
        for hook, delta in deltas.items()
    }
    copies = max(1, min(len(downs), rows // len(pairs)))
    prepared = batch_of(model, runs.base, pairs).repeated(copies)
    with segmented(session, prepared, pairs.repeated(copies), runs.hooks) as segments:
        runs.passes.forward += copies * len(pairs)
        for batch in _batches(downs, list(runs.hooks), copies):
            arriving, _ = segments.into([downs[i] for i in batch], nodes)
            runs.passes.backward += len(batch) * len(pairs)
            for hook, g in arriving.items():
                if hook == EMBEDDINGS:
                    continue  # the tokens' own hook point, right behind them, is a node or conducts
                g = g.unflatten(0, (copies, len(pairs)))[: len(batch)]
                sums = torch.einsum("bpuf,kbpuf->bkpu", deltas[hook], g)
                scores[hook][:, batch] = sums if runs.by_position else sums.sum(dim=2)
    return cache.target.value, other, downs, scores


def _batches(downs: Sequence[Node], hooks: list[str], size: int) -> Iterator[list[int]]:
    """Indices of downstream nodes, those of the same depth together."""
    depth = {hook: index for index, hook in enumerate(hooks)}
    order = sorted(range(len(downs)), key=lambda i: depth.get(downs[i].hook, len(hooks)))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _downstream(runs: Runs, deltas: Mapping[str, Units]) -> tuple[Node, ...]:
    """All nodes that have anything before them, and the target."""
    downs = []
    for hook, delta in deltas.items():
        if runs.hooks[hook] == "tokens":
            continue
        length, units = delta.shape[1:3]
        positions = range(length) if runs.by_position else (None,)
        downs += [Node(hook, unit, p) for unit in range(units) for p in positions]
    if len(downs) > MAX_DOWNSTREAM:
        raise InputError(
            f"there are {len(downs)} downstream nodes, and each takes a backward pass: name those "
            "that you want with into=, or score_nodes() first"
        )
    return (*downs, TARGET)


def _require(downs: Sequence[Node], deltas: Mapping[str, Units]) -> None:
    for node in downs:
        if node == TARGET:
            continue
        if node.hook not in deltas:
            raise InputError(f"{node} is no node of these components")
        length, units = deltas[node.hook].shape[1:3]
        if not 0 <= node.unit < units or (node.position or 0) >= length:
            raise InputError(f"{node}: {node.hook} has {units} units and {length} positions")


def _exact(runs: Runs, *, edges: Sequence[Edge]) -> _ScoredEdges:
    wanted: dict[Node, list[Node]] = {}
    for up, down in edges:
        if (up.position is not None) != runs.by_position:
            raise InputError(
                f"{up}: an edge starts at one position with by_position=True, and only then"
            )
        wanted.setdefault(up, []).append(down)
    base, other, effects = exact_edges(runs, wanted)
    downs = tuple(dict.fromkeys(down for _, down in edges))
    sizes: dict[str, int] = {}
    for up in wanted:
        sizes[up.hook] = max(sizes.get(up.hook, 0), up.unit + 1)
    length = (runs.base.shape[1],) if runs.by_position else ()
    scores = {
        hook: base.new_full((len(base), len(downs), *length, size), torch.nan)
        for hook, size in sizes.items()
    }
    for (up, down), effect in effects.items():
        into = scores[up.hook][:, downs.index(down), ..., up.unit]
        if up.position is None:
            into[:] = effect
        else:
            runs.pairs.put(into, up.position, effect)
    return base, other, downs, scores


def _depth(hook: str) -> int:
    layer = layer_of(hook)
    return -1 if layer is None else layer
