"""How nodes are scored: by coefficients of one pass, of several, or by patching one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Bool
from torch import Tensor

from lenslrp.analysis.circuits.measured_pairs import MeasuredPairs, batch_of, metric_values
from lenslrp.analysis.circuits.metrics import METRICS, Metric
from lenslrp.analysis.circuits.nodes import (
    Node,
    Runs,
    Units,
    delivering,
    masking,
    outputs_before,
    patched,
)
from lenslrp.analysis.circuits.pairs import Pairs, ordered
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.errors import InputError
from lenslrp.hooks import Composite, GradientTimesInput, RelP
from lenslrp.leaves import Leaves
from lenslrp.progress import progress_bar
from lenslrp.running import architecture
from lenslrp.sessions import Session

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False)
class Scorer:
    """What scores nodes: the rules, attached, and which nodes or how many steps."""

    session: Session | None
    only: Sequence[Node] | None
    steps: int


_ScoredNodes = tuple[Tensor, Tensor, dict[str, Tensor]]  # metrics of both runs, scores


class _Method(Protocol):
    def __call__(self, runs: Runs, scorer: Scorer) -> _ScoredNodes: ...


def _product(runs: Runs, hook: str, delta: Tensor, g: Tensor) -> Tensor:
    """Delta times coefficient, [pair, unit] or [pair, pos, unit]."""
    sums: Tensor = torch.einsum("bpuf,bpuf->bpu", delta, g)
    return sums if runs.by_position else sums.sum(dim=1)


def _backward(
    runs: Runs, session: Session, on: Callable[[str, Units, Units], None], **options: Any
) -> Tensor:
    """One forward and backward pass; every hook point's activation and coefficient are handed on.

    Returns the metric, [pair].
    """
    _, cache = session.run_with_relevance(
        target=runs.pairs,
        names_filter=list(runs.hooks),
        reduce=delivering(runs.hooks, on),
        **masking(runs.pairs, runs.base.device),
        **options,
    )
    runs.passes.forward += len(runs.pairs)
    runs.passes.backward += len(runs.pairs)
    return cache.target.value


def _relevance(runs: Runs, scorer: Scorer) -> _ScoredNodes:
    """Two forward passes and one backward pass for all nodes."""
    other, other_units = runs.read_other()
    scores: dict[str, Tensor] = {}

    def score(hook: str, x: Tensor, g: Tensor) -> None:
        scores[hook] = _product(runs, hook, runs.exchanged(other_units.pop(hook), x) - x, g)

    assert scorer.session is not None
    base = _backward(runs, scorer.session, score, input=runs.base)
    return base, other, scores


def _integrated(runs: Runs, scorer: Scorer) -> _ScoredNodes:
    """Two forward passes, and a forward and a backward pass for each step."""
    (base, base_units, start), (other, other_units, end) = (
        embedded(runs.model, read) for read in (runs.read, runs.read_other)
    )
    scores: dict[str, Tensor] = {}

    def score(hook: str, x: Tensor, g: Tensor) -> None:
        step = _product(runs, hook, other_units[hook] - base_units[hook], g) / scorer.steps
        scores[hook] = scores[hook] + step if hook in scores else step

    assert scorer.session is not None
    for step in range(scorer.steps):
        embeds = torch.lerp(start, end, (step + 0.5) / scorer.steps)
        _backward(runs, scorer.session, score, inputs_embeds=embeds)
    return base, other, scores


def embedded(
    model: TransformerBridge, read: Callable[..., tuple[Tensor, dict[str, Tensor]]]
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """One forward pass, by `read`: the metric, the units' activations, the tokens' embeddings."""
    leaves = Leaves()
    value, units = read(leaves=leaves)
    if len(leaves.tokens) != 1:
        raise InputError(
            f"{architecture(model)} embeds its tokens in {len(leaves.tokens)} places: "
            "integrated scores are of models that do it in one"
        )
    return value, units, leaves.tokens[0].detach()


def _exact(runs: Runs, scorer: Scorer) -> _ScoredNodes:
    """Two forward passes, and one for each node, in which what comes after it is recomputed.

    Blocks below a node are not run again, and a node that is the same in both runs is not run at
    all: its effect is 0. Nodes that were not asked for are NaN.
    """
    model, pairs = runs.model, runs.pairs
    outputs: dict[int, Any] = {}
    base, base_units = runs.read(record=outputs)
    other, read = runs.read_other()
    other_units = {hook: runs.exchanged(x, base_units[hook]) for hook, x in read.items()}
    batch = batch_of(model, runs.base, pairs)
    scores = {}
    for hook, component in progress_bar("hook points", runs.hooks.items()):
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
                patched_run = metric_values(model, batch, pairs, edits=[edit], replay=replay)
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


def require_slope(measured: MeasuredPairs, method: str, direction: str) -> None:
    """Refuse what no estimate from one of the runs can tell.

    Raises:
        InputError: a metric without a gradient at the base run; a straight line between prompts of
            different lengths.
    """
    flat = measured.metric.stationary and direction == "noising"
    if flat and method in ("relevance", "attribution"):
        raise InputError(
            f"the gradient of {measured.metric.name} is 0 at the clean run, which is the base run "
            "here: give direction='denoising', or method='integrated' or 'exact'"
        )
    if measured.counterpart is not None and method == "integrated":
        raise InputError(
            "integrated scores go along the straight line between two prompts, and these have "
            "different numbers of tokens: give another method"
        )


def answered(
    model: TransformerBridge, pairs: Pairs, metric: Metric, clean: Tensor, passes: PassCount
) -> Bool[Tensor, " pair"]:
    """`Pairs.correct`, from the metric of the clean run where that says it."""
    if metric is METRICS["logit_difference"]:
        return clean > 0
    passes.forward += len(MeasuredPairs.of(pairs, "logit_difference"))
    return pairs.correct(model)


def common_fields(
    model: TransformerBridge,
    pairs: Pairs,
    measured: MeasuredPairs,
    direction: str,
    runs: Sequence[Sequence[Tensor]],
    passes: PassCount,
) -> dict[str, Any]:
    """What scores of nodes and of edges hold alike.

    Args:
        runs: the metric of the base run's rows, in chunks, and of the other run's.
    """
    base, other = (measured.folded(torch.cat(list(chunks)).detach()) for chunks in runs)
    corrupt, clean = ordered(direction, base, other)
    seen = ordered(direction, measured.seen_from("corrupt"), measured.seen_from("clean"))[0]
    return {
        "clean": clean,
        "corrupt": corrupt,
        "mask": seen.mask.unflatten(0, (measured.parts, -1)).any(dim=0),
        "correct": answered(model, pairs, measured.metric, clean, passes),
        "passes": passes,
        "metric": measured.metric.name,
    }
