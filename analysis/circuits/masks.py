"""Masks over nodes, trained by gradient descent: a selection that is learned, not read off.

Each node has a gate between what it is in the clean run (1) and what it is when it is ablated (0).
Gates are drawn from the hard concrete distribution (Louizos et al. 2018), which is 0 or 1 most of
the time and can be differentiated; Bhaskar et al. (2024) train such masks over edges.
There a penalty drives the mask to one size. Here the size is a constraint: every row of a step
draws a size, and the gates' log odds are shifted until that many are open on average. So one
training run ranks the nodes for circuits of all sizes, and descends the areas over size that
circuits are judged by (`lenslrp.analysis.circuits.curves`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lenslrp.analysis.circuits.ablation import ablations
from lenslrp.analysis.circuits.curves import SHARES
from lenslrp.analysis.circuits.measured_pairs import MeasuredPairs
from lenslrp.analysis.circuits.metrics import Metric, MetricFunction, metric_of
from lenslrp.analysis.circuits.node_methods import answered
from lenslrp.analysis.circuits.nodes import place_components
from lenslrp.analysis.circuits.pairs import PAIRS_AT_ONCE, Pairs
from lenslrp.analysis.circuits.pruning import mean_scores, ranking
from lenslrp.analysis.circuits.scores import NodeScores
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.errors import InputError
from lenslrp.hooks.structure import unchanged
from lenslrp.progress import progress_bar

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

OBJECTIVES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "cmd": lambda kept: (1 - kept).abs().mean(),
    "cpr": lambda kept: -kept.mean(),
}
"""Name -> what is made small, of the share of the metric that each pair keeps."""

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
"""Of the hard concrete distribution, as in Louizos et al."""


def learn_masks(
    model: TransformerBridge,
    pairs: Pairs,
    *,
    init: NodeScores | None = None,
    by: str = "score",
    components: Sequence[str] = ("heads", "neurons"),
    metric: str | Metric | MetricFunction | None = None,
    objective: str = "cmd",
    shares: Sequence[float] = SHARES,
    pooled: bool = False,
    steps: int = 100,
    rate: float = 0.1,
    ablation: str = "corrupt",
    reference: Pairs | None = None,
    seed: int = 0,
    chunk: int = PAIRS_AT_ONCE,
) -> NodeScores:
    """A ranking of nodes, trained so that the best of them keep the metric.

    Args:
        model: a `TransformerBridge` of a decoder, in eval mode.
        pairs: to train on; what the nodes of all of them are set to is held in memory.
        init: scores whose ranking the training starts from; all nodes are level if not given.
        by: how `init` ranks, as for `prune`.
        components: names from `lenslrp.analysis.circuits.nodes.COMPONENTS`; those of `init`, if
            given.
        metric: what is measured of a run, as for `score_nodes`; `"kl"` keeps the distribution. That
            of `init` if not given, or the logit difference.
        objective: `"cmd"`: what is kept of the metric shall be that of the whole model; `"cpr"`: it
            shall be as large as possible.
        shares: the sizes to train for.
        pooled: whether sizes are of all nodes together, as for `faithfulness_curve`.
        steps: each a forward and a backward pass of `chunk` pairs.
        rate: the learning rate of Adam, in log odds.
        ablation, reference: as for `verify`.
        seed: of sizes and gates.
        chunk: how many pairs run at once.

    Returns:
        Log odds of the gates, the same for all pairs, for `prune` with `by="score"`; where masks
        are pooled, with a number of `nodes`. `corrupt` is the floor of `verify`.

    Raises:
        InputError: a choice that does not exist, scores that do not rank all nodes, no size that
            leaves something to choose, nothing of the metric to keep.

    Examples:
        >>> scores = score_nodes(model, find, components=["heads", "mlp"])
        >>> masks = learn_masks(model, find, init=scores, pooled=True)
        >>> prune(masks, nodes=12).sizes()
        {'heads': (10, 144), 'mlp': (2, 12)}
    """
    if objective not in OBJECTIVES:
        raise InputError(f"objective must be one of {', '.join(OBJECTIVES)}, not {objective!r}")
    if steps < 1 or chunk < 1:
        raise InputError(f"steps and chunk must be at least 1, not {steps} and {chunk}")
    if len(pairs) == 0:
        raise InputError("no pairs to train on")
    placed = place_components(model, components) if init is None else init.components
    measured = metric_of(metric, ["logit_difference" if init is None else init.metric])
    names = list(dict.fromkeys(placed.values()))
    groups = [names] if pooled else [[name] for name in names]
    hooks_of = [[h for n in names for h, other in placed.items() if other == n] for names in groups]
    generator = torch.Generator().manual_seed(seed)
    with unchanged(model):
        parts = list(ablations(model, pairs, placed, measured, ablation, reference, chunk))
        clean, floor = (torch.cat([getattr(p, n) for p in parts]) for n in ("clean", "floor"))
        passes = PassCount(forward=(2 + measured.reads_clean) * sum(len(p.rows) for p in parts))
        if ablation == "mean":
            passes.forward += 2 * len(MeasuredPairs.of(reference or pairs, "logit_difference"))
        total = float((clean - floor).mean())
        if total <= 0:
            raise InputError(nothing_to_keep(measured, clean, floor))
        widths = [[parts[0].instead[hook].shape[2] for hook in hooks] for hooks in hooks_of]
        odds = [torch.zeros(sum(each)) for each in widths]
        if init is not None:
            for names, start in zip(groups, odds, strict=True):
                mean = torch.cat([mean_scores(init, name) for name in names])
                start[ranking(mean, by, generator)] = _ranked(len(start))
        sizes = _sizes([len(each) for each in odds], shares)
        optimizer = torch.optim.Adam([each.requires_grad_() for each in odds], lr=rate)
        for step in progress_bar("masks", range(steps)):
            part = parts[step % len(parts)]
            drawn = torch.randint(len(sizes), part.clean.shape, generator=generator)
            keep: dict[str, Tensor] = {}
            for index, (hooks, each) in enumerate(zip(hooks_of, odds, strict=True)):
                opened = gates(each, sizes[:, index], drawn, generator)
                keep.update(zip(hooks, opened.split(widths[index], dim=1), strict=True))
            value = part.run(keep, gradients=True)
            loss = OBJECTIVES[objective]((value - part.floor) / total)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            passes.forward += len(part.rows)
            passes.backward += len(part.rows)
    correct = answered(model, pairs, measured, clean, passes)
    values: dict[str, Tensor] = {}
    for hooks, each, width in zip(hooks_of, odds, widths, strict=True):
        values.update(zip(hooks, each.detach().expand(len(pairs), -1).split(width, 1), strict=True))
    return NodeScores("masks", "denoising", placed, {hook: values[hook] for hook in placed},
                      clean, floor, pairs.mask, passes, correct, measured.name)  # fmt: skip


def nothing_to_keep(metric: Metric, clean: Tensor, floor: Tensor) -> str:
    """What is wrong where the clean runs' metric, [pair], is not above the floor's."""
    return (
        f"the mean {metric.name} of the clean runs is {float(clean.mean()):.3g}, not above the "
        f"floor's, {float(floor.mean()):.3g}: there is nothing for masks to keep"
    )


def _ranked(n: int) -> Float[Tensor, " n"]:
    """Log odds by rank, the best first."""
    return torch.logit(1 - (torch.arange(n) + 0.5) / n)


def _sizes(nodes: Sequence[int], shares: Sequence[float]) -> Float[Tensor, "size class"]:
    """What share of each class is open, for the sizes that leave something to choose."""
    counts = [[int(share * n) for n in nodes] for share in shares]
    usable = [[k / n for k, n in zip(row, nodes, strict=True)] for row in counts
              if any(0 < k < n for k, n in zip(row, nodes, strict=True))]  # fmt: skip
    if not usable:
        raise InputError(f"of {nodes} nodes, the shares {list(shares)} leave nothing to choose")
    return torch.tensor(usable)


def gates(
    odds: Float[Tensor, " node"],
    shares: Float[Tensor, " size"],
    drawn: Int[Tensor, " row"],
    generator: torch.Generator,
) -> Float[Tensor, "row node"]:
    """Gates from 0 to 1, of which a share is not closed, on average."""
    tau = thresholds(odds, shares)[drawn, None]
    noise = torch.rand(len(drawn), len(odds), generator=generator).logit(eps=1e-6)
    closed = TEMPERATURE * math.log(-LOW / HIGH)  # a gate's odds of not being closed are less this
    soft = torch.sigmoid((odds - tau + closed + noise) / TEMPERATURE)
    return (LOW + (HIGH - LOW) * soft).clamp(0, 1)


def thresholds(
    odds: Float[Tensor, " node"], shares: Float[Tensor, " size"]
) -> Float[Tensor, " size"]:
    """What is taken from all log odds so that the mean probability is a share, by bisection.

    Its gradient is that of the equation it solves: where one node's odds rise, all others fall.
    """
    fixed = odds.detach()
    low = (fixed.min() - 50).expand(len(shares))
    high = (fixed.max() + 50).expand(len(shares))
    for _ in range(50):
        tau = (low + high) / 2
        above = torch.sigmoid(fixed - tau[:, None]).mean(dim=1) > shares
        low, high = torch.where(above, tau, low), torch.where(above, high, tau)
    z = fixed - tau[:, None]
    slope = torch.sigmoid(z) * torch.sigmoid(-z)
    return tau + (slope / slope.sum(dim=1, keepdim=True)) @ (odds - fixed)
