"""Which nodes carry the difference between a clean and a corrupted prompt?

The effect of a node is what a metric, the logit difference of the two answers by default, gains
when the node, and it alone, is set to what it is in the other run. Exact activation patching (Meng
et al. 2022; Zhang and Nanda 2024) needs a forward pass for every node; the other methods estimate
the effect of all nodes at once, by activation difference times coefficient:

* **relevance patching** (RelP, Rezaei Jafari et al. 2025): the coefficient is the gradient as LRP
  rules modify it, from one backward pass over the base run. Relevance is activation times this
  coefficient; the score is (other activation - base activation) times it;
* **attribution patching** (Nanda 2023; Syed et al. 2023): the plain gradient of the base run;
* **integrated gradients** (Hanna et al. 2024): plain gradients averaged along the straight line
  between the embeddings of the two runs; or relevance coefficients, with a composite. One step is
  the midpoint, which serves both runs better than either end does.

"Denoising" patches clean activations into the corrupted run and "noising" corrupted ones into the
clean run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lenslrp.analysis.circuits.faces import facts_of
from lenslrp.analysis.circuits.files import Saved
from lenslrp.analysis.circuits.measured_pairs import MeasuredPairs
from lenslrp.analysis.circuits.metrics import Metric, MetricFunction
from lenslrp.analysis.circuits.node_methods import (
    NODE_METHODS,
    Scorer,
    common_fields,
    require_slope,
)
from lenslrp.analysis.circuits.nodes import (
    Node,
    largest,
    paired_runs,
    place_components,
    require_positions,
)
from lenslrp.analysis.circuits.pairs import PAIRS_AT_ONCE, Pairs, ordered
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.errors import InputError
from lenslrp.hooks import Composite
from lenslrp.hooks.structure import layer_of, unchanged
from lenslrp.sessions import Session
from lenslrp.views.cards import ROWS, Face, Shown

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False, repr=False)
class NodeScores(Shown, Saved):
    """What each node does to a metric, estimated or exact, in the metric's unit.

    Attributes:
        method, direction: how they were computed.
        components: hook point -> component name, in the model's order.
        values: hook point -> [pair, unit], or [pair, pos, unit]; NaN where a node was not scored.
        clean, corrupt: [pair], the metric of each run.
        mask: [pair, pos], True where a token of the base run is real.
        passes: of one pair through the model.
        correct: [pair], whether the clean run prefers the answer to the incorrect one; None where
            that is not known.
        metric: its name.
    """

    made_from: ClassVar = {"passes": lambda count: PassCount(**count)}

    method: str
    direction: str
    components: Mapping[str, str]
    values: Mapping[str, Tensor]
    clean: Float[Tensor, " pair"]
    corrupt: Float[Tensor, " pair"]
    mask: Tensor
    passes: PassCount
    correct: Bool[Tensor, " pair"] | None = None
    metric: str = "logit_difference"

    def face(self) -> Face:
        frame = self.to_dataframe()
        return Face(
            f"Scores of nodes: {self.method}, {self.direction}",
            {"nodes": len(frame), **facts_of(self)},
            largest(frame, "score", ROWS).dropna(axis=1, how="all"),
            ["score"],
            [f"The largest in size; in units of {self.metric.replace('_', ' ')}, mean over pairs."],
        )

    @property
    def by_position(self) -> bool:
        """Whether each node stands for one position."""
        return next(iter(self.values.values())).ndim == 3

    def of(self, component: str) -> Float[Tensor, "pair node"]:
        """All scores of a component class; padding and what was not scored are NaN.

        Args:
            component: its name.

        Returns:
            [pair, node], in the metric's unit; nodes of all layers, one after the other.

        Raises:
            InputError: the component was not scored.

        Examples:
            >>> scores = score_nodes(gpt2, pairs, components=["heads"])
            >>> scores.of("heads").shape  # 12 layers of 12 heads
            torch.Size([100, 144])
        """
        scores = [self.values[h] for h, name in self.components.items() if name == component]
        if not scores:
            known = ", ".join(dict.fromkeys(self.components.values()))
            raise InputError(f"no scores of {component!r}; there are {known}")
        if self.by_position:
            scores = [v.masked_fill(~self.mask[..., None].to(v.device), torch.nan) for v in scores]
        return torch.cat([value.flatten(1) for value in scores], dim=1)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a node.

        Columns: `component`, `layer`, `hook`, `unit`, `position` (`None` for all), `score` (mean
        over pairs), `std` over pairs.
        """
        frames = []
        for hook, name in self.components.items():
            value = self.values[hook].double().cpu().numpy()
            scored = np.ma.masked_invalid(value)
            mean, std = (np.ma.filled(x, np.nan) for x in (scored.mean(axis=0), scored.std(axis=0)))
            grid = np.indices(mean.shape).reshape(mean.ndim, -1)
            frame = pd.DataFrame({"component": name, "layer": layer_of(hook), "hook": hook,
                                  "unit": grid[-1]})  # fmt: skip
            frame["position"] = grid[0] if self.by_position else None
            frames.append(frame.assign(score=mean.ravel(), std=std.ravel()))
        return pd.concat(frames, ignore_index=True).dropna(subset=["score"])

    def top(self, k: int = 10, *, component: str | None = None) -> pd.DataFrame:
        """The `k` rows of `to_dataframe` whose score is largest in size.

        Args:
            k: how many.
            component: of this class only.

        Raises:
            InputError: the component was not scored.
        """
        frame = self.to_dataframe()
        if component is not None:
            self.of(component)
            frame = frame[frame["component"] == component]
        return largest(frame, "score", k)


def score_nodes(
    model: TransformerBridge,
    pairs: Pairs,
    *,
    method: str = "relevance",
    metric: str | Metric | MetricFunction = "logit_difference",
    components: Sequence[str] = ("heads", "neurons"),
    direction: str = "denoising",
    by_position: bool = False,
    composite: Composite | None = None,
    steps: int = 5,
    only: Iterable[Node] | None = None,
    chunk: int = PAIRS_AT_ONCE,
) -> NodeScores:
    """The effect of every node on a metric, estimated or exact.

    RelP is of Rezaei Jafari et al. (2025), attribution patching of Nanda (2023), integrated
    gradients along prompts of Hanna et al. (2024).

    Args:
        model: a `TransformerBridge` of a decoder, in eval mode.
        pairs: clean and corrupted prompts.
        method: `"relevance"`, `"attribution"`, `"integrated"` or `"exact"`.
        metric: what is measured of a run: `"logit_difference"` of the answer and the incorrect one
            (of answers of several tokens, the difference of their log-probabilities),
            `"log_prob"` of the answer, `"kl"` (minus the KL divergence from the clean run),
            `"margin"` (the answer's logit less the largest other one), a function
            `metric(logits, pairs, clean_logits)` of [pair, token, vocab] that returns [pair], or a
            `Metric`. Backward passes start with its gradient at the logits.
        components: names from `lenslrp.analysis.circuits.nodes.COMPONENTS`. `"residual"` needs
            `by_position`: the whole stream of one layer, patched at all positions, is the run.
        direction: `"denoising"`: clean activations in the corrupted run; `"noising"`: corrupted
            activations in the clean run.
        by_position: one node a position, or all positions together.
        composite: the rules of `"relevance"`, `RelP()` if not given, or of `"integrated"`, plain
            gradients if not given.
        steps: of `"integrated"`.
        only: of `"exact"`: the nodes to patch. The other methods score all nodes anyway.
        chunk: how many pairs run at once.

    Returns:
        Scores in the metric's unit (logits, or nats): what the metric of the base run gains. A
        final soft-cap on the logits (Gemma 2) is not part of what coefficients are taken of, as
        everywhere in LensLRP.

    Raises:
        InputError: a choice that does not exist, or does not go with the method.

    Examples:
        >>> pairs = template_pairs(model, "indirect_object", 100)
        >>> scores = score_nodes(model, pairs)
        >>> scores.passes  # of one pair each, however many nodes there are
        PassCount(forward=200, backward=100)
    """
    if method not in NODE_METHODS:
        raise InputError(f"method must be one of {', '.join(NODE_METHODS)}, not {method!r}")
    if composite is not None and method not in ("relevance", "integrated"):
        raise InputError(f"a composite is for 'relevance' and 'integrated', not {method!r}")
    if only is not None and method != "exact":
        raise InputError(f"only is for method='exact'; {method!r} scores all nodes in one pass")
    if "residual" in components and not by_position:
        raise InputError(
            "the residual stream patched at all positions is the other run: give by_position=True"
        )
    if "tokens" in components and method == "integrated":
        raise InputError(
            "integrated scores go along the straight line between the two runs' tokens, and are of "
            "the nodes behind them: leave 'tokens' out"
        )
    if chunk < 1 or steps < 1:
        raise InputError(f"chunk and steps must be at least 1, not {chunk} and {steps}")
    if len(pairs) == 0:
        raise InputError("no pairs to score")
    score, rules = NODE_METHODS[method]
    measured = MeasuredPairs.of(pairs, metric)
    require_slope(measured, method, direction)
    whole = ordered(direction, measured.seen_from("corrupt"), measured.seen_from("clean"))[0]
    hooks = place_components(model, components)
    passes = PassCount()
    nodes = None if only is None else list(only)
    require_positions(nodes or (), whole)
    with ExitStack() as stack:
        stack.enter_context(unchanged(model))
        session = None
        if rules is not None:
            session = Session(model, composite or rules(), ledger=False, logits="target",
                              stays=False)  # fmt: skip
            stack.enter_context(session)
        scorer = Scorer(session, nodes, steps)
        chunks = paired_runs(model, measured, chunk, direction, hooks, by_position, passes)
        scored = [score(runs, scorer) for runs in chunks]
    bases, others, scores = zip(*scored, strict=True)
    wide = partial(whole.padded, only=nodes or ()) if by_position else torch.as_tensor
    values = {
        hook: measured.folded(torch.cat([wide(part[hook]) for part in scores])) for hook in hooks
    }
    fields = common_fields(model, pairs, measured, direction, (bases, others), passes)
    return NodeScores(method, direction, hooks, values, **fields)
