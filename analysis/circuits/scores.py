"""Which nodes carry the difference between a clean and a corrupted prompt?

The effect of a node is what the logit difference of the two answers gains when the node, and it
alone, is set to what it is in the other run. Exact activation patching (Meng et al. 2022; Zhang and
Nanda 2024) needs a forward pass for every node; the other methods estimate the effect of all nodes
at once, by activation difference times coefficient:

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

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.analysis.circuits.nodes import (
    Node,
    Runs,
    Units,
    batch_of,
    delivering,
    largest,
    logit_differences,
    masking,
    outputs_before,
    paired_runs,
    patched,
    place_components,
    require_positions,
)
from lenslrp.analysis.circuits.pairs import Pairs, ordered
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.errors import InputError
from lenslrp.hooks import Composite, GradientTimesInput, RelP
from lenslrp.hooks.structure import layer_of, unchanged
from lenslrp.leaves import Leaves
from lenslrp.running import architecture
from lenslrp.sessions import Session

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

PAIRS_AT_ONCE = 32
"""How many pairs run at once."""


@dataclass(frozen=True, eq=False)
class NodeScores:
    """What each node does to the logit difference, estimated or exact, in logits.

    Attributes:
        method, direction: how they were computed.
        components: hook point -> component name, in the model's order.
        values: hook point -> [pair, unit], or [pair, pos, unit]; NaN where a node was not scored.
        clean, corrupt: [pair], the logit difference of each run.
        mask: [pair, pos], True where a token is real.
        passes: of one pair through the model.
    """

    method: str
    direction: str
    components: Mapping[str, str]
    values: Mapping[str, Tensor]
    clean: Float[Tensor, " pair"]
    corrupt: Float[Tensor, " pair"]
    mask: Tensor
    passes: PassCount

    @property
    def by_position(self) -> bool:
        """Whether each node stands for one position."""
        return next(iter(self.values.values())).ndim == 3

    def of(self, component: str) -> Float[Tensor, "pair node"]:
        """All scores of a component class; padding and what was not scored are NaN.

        Args:
            component: its name.

        Returns:
            [pair, node], in logits; nodes of all layers, one after the other.

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
        over pairs, logits), `std` over pairs.
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


@dataclass(frozen=True, eq=False)
class _Scorer:
    """What scores nodes: the rules, attached, and which nodes or how many steps."""

    session: Session | None
    only: Sequence[Node] | None
    steps: int


_ScoredNodes = tuple[Tensor, Tensor, dict[str, Tensor]]  # logit differences of both runs, scores


class _Method(Protocol):
    def __call__(self, runs: Runs, scorer: _Scorer) -> _ScoredNodes: ...


def _product(runs: Runs, hook: str, delta: Tensor, g: Tensor) -> Tensor:
    """Delta times coefficient, [pair, unit] or [pair, pos, unit]."""
    sums: Tensor = torch.einsum("bpuf,bpuf->bpu", delta, g)
    return sums if runs.by_position else sums.sum(dim=1)


def _backward(
    runs: Runs, scorer: _Scorer, on: Callable[[str, Units, Units], None], **options: Any
) -> Tensor:
    """One forward and backward pass; every hook point's activation and coefficient are handed on.

    Returns the logit difference, [pair].
    """
    assert scorer.session is not None
    _, cache = scorer.session.run_with_relevance(
        target=runs.pairs,
        names_filter=list(runs.hooks),
        reduce=delivering(runs.hooks, on),
        **masking(runs.pairs, runs.base.device),
        **options,
    )
    runs.passes.forward += len(runs.pairs)
    runs.passes.backward += len(runs.pairs)
    return cache.target.value


def _relevance(runs: Runs, scorer: _Scorer) -> _ScoredNodes:
    """Two forward passes and one backward pass for all nodes."""
    other, other_units = runs.read(runs.other)
    scores: dict[str, Tensor] = {}

    def score(hook: str, x: Tensor, g: Tensor) -> None:
        scores[hook] = _product(runs, hook, other_units.pop(hook) - x, g)

    base = _backward(runs, scorer, score, input=runs.base)
    return base, other, scores


def _integrated(runs: Runs, scorer: _Scorer) -> _ScoredNodes:
    """Two forward passes, and a forward and a backward pass for each step."""
    (base, base_units, start), (other, other_units, end) = (
        _embedded(runs, tokens) for tokens in (runs.base, runs.other)
    )
    scores: dict[str, Tensor] = {}

    def score(hook: str, x: Tensor, g: Tensor) -> None:
        step = _product(runs, hook, other_units[hook] - base_units[hook], g) / scorer.steps
        scores[hook] = scores[hook] + step if hook in scores else step

    for step in range(scorer.steps):
        embeds = torch.lerp(start, end, (step + 0.5) / scorer.steps)
        _backward(runs, scorer, score, inputs_embeds=embeds)
    return base, other, scores


def _embedded(runs: Runs, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """One forward pass: the logit difference, the units' activations, the tokens' embeddings."""
    leaves = Leaves()
    value, units = runs.read(tokens, leaves=leaves)
    if len(leaves.tokens) != 1:
        raise InputError(
            f"{architecture(runs.model)} embeds its tokens in {len(leaves.tokens)} places: "
            "integrated scores are of models that do it in one"
        )
    return value, units, leaves.tokens[0].detach()


def _exact(runs: Runs, scorer: _Scorer) -> _ScoredNodes:
    """Two forward passes, and one for each node, in which what comes after it is recomputed.

    Blocks below a node are not run again, and a node that is the same in both runs is not run at
    all: its effect is 0. Nodes that were not asked for are NaN.
    """
    model, pairs = runs.model, runs.pairs
    outputs: dict[int, Any] = {}
    base, base_units = runs.read(runs.base, record=outputs)
    other, other_units = runs.read(runs.other)
    batch = batch_of(model, runs.base, pairs)
    scores = {}
    for hook, component in runs.hooks.items():
        delta = other_units[hook] - base_units[hook]
        differs = (delta.abs().amax(dim=3) > 0) & pairs.mask[..., None].to(delta.device)
        length, units = delta.shape[1:3]
        shape = (len(pairs), length, units) if runs.by_position else (len(pairs), units)
        effects = base.new_full(shape, torch.nan)
        positions = range(length) if runs.by_position else (None,)
        nodes = [Node(hook, unit, position) for unit in range(units) for position in positions]
        if scorer.only is not None:
            nodes = [
                node for node in scorer.only
                if node.hook == hook and (node.position is not None) == runs.by_position
            ]  # fmt: skip
        replay = outputs_before(outputs, hook)
        for node in nodes:
            effect = torch.zeros_like(base)
            if differs[node.place(pairs)].any():
                edit = patched(node, component, other_units[hook], pairs)
                patched_run = logit_differences(model, batch, pairs, edits=[edit], replay=replay)
                effect = patched_run - base
                runs.passes.forward += len(pairs)
            if node.position is None:
                effects[:, node.unit] = effect
            else:
                pairs.put(effects[..., node.unit], node.position, effect)
        scores[hook] = effects
    return base, other, scores


NODE_METHODS: Mapping[str, tuple[_Method, Callable[[], Composite] | None]] = {
    "relevance": (_relevance, RelP),
    "attribution": (_relevance, GradientTimesInput),
    "integrated": (_integrated, GradientTimesInput),
    "exact": (_exact, None),
}
"""Method -> how its scores are made, and under which rules, if any."""


def score_nodes(
    model: TransformerBridge,
    pairs: Pairs,
    *,
    method: str = "relevance",
    components: Sequence[str] = ("heads", "neurons"),
    direction: str = "denoising",
    by_position: bool = False,
    composite: Composite | None = None,
    steps: int = 5,
    only: Iterable[Node] | None = None,
    chunk: int = PAIRS_AT_ONCE,
) -> NodeScores:
    """The effect of every node on the logit difference, estimated or exact.

    RelP is of Rezaei Jafari et al. (2025), attribution patching of Nanda (2023), integrated
    gradients along prompts of Hanna et al. (2024).

    Args:
        model: a `TransformerBridge` of a decoder, in eval mode.
        pairs: clean and corrupted prompts.
        method: `"relevance"`, `"attribution"`, `"integrated"` or `"exact"`.
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
        Scores in logits: what the logit difference of the base run gains. A final soft-cap on the
        logits (Gemma 2) is not part of what coefficients are taken of, as everywhere in LensLRP.

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
    if chunk < 1 or steps < 1:
        raise InputError(f"chunk and steps must be at least 1, not {chunk} and {steps}")
    if len(pairs) == 0:
        raise InputError("no pairs to score")
    score, rules = NODE_METHODS[method]
    hooks = place_components(model, components)
    passes = PassCount()
    nodes = None if only is None else list(only)
    require_positions(nodes or (), pairs)
    with ExitStack() as stack:
        stack.enter_context(unchanged(model))
        session = None
        if rules is not None:
            session = Session(model, composite or rules(), ledger=False, logits="target",
                              stays=False)  # fmt: skip
            stack.enter_context(session)
        scorer = _Scorer(session, nodes, steps)
        chunks = paired_runs(model, pairs, chunk, direction, hooks, by_position, passes)
        scored = [score(runs, scorer) for runs in chunks]
    bases, others, scores = zip(*scored, strict=True)
    corrupt, clean = ordered(direction, torch.cat(bases).detach(), torch.cat(others))
    wide = partial(pairs.padded, only=nodes or ()) if by_position else torch.as_tensor
    values = {hook: torch.cat([wide(part[hook]) for part in scores]) for hook in hooks}
    return NodeScores(
        method, direction, hooks, values, clean, corrupt, pairs.mask, passes
    )  # fmt: skip
