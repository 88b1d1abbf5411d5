"""Several methods' scores of the same nodes or edges, as one.

Methods err in different nodes, so their mean can rank better than each does: the parallel ensemble
of Mondorf et al. (2025). Their sequential one is `learn_masks` with `init=`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from lenslrp.analysis.circuits.edges import EdgeScores
from lenslrp.analysis.circuits.scores import NodeScores
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.errors import InputError

Scores = TypeVar("Scores", NodeScores, EdgeScores)


def ensemble(scores: Sequence[Scores]) -> Scores:
    """The mean of several scores, each divided by its root mean square over nodes or edges.

    Args:
        scores: two or more of the same nodes or edges and the same pairs, metric and direction.

    Returns:
        Scores without a unit: 1 is a node of typical size. Their passes are the sum of all.

    Raises:
        InputError: fewer than two, or scores that are not of the same things.

    Examples:
        >>> relevance = score_nodes(model, pairs, components=["heads"])
        >>> integrated = score_nodes(model, pairs, components=["heads"], method="integrated")
        >>> circuit = prune(ensemble([relevance, integrated]), nodes=10)
    """
    if len(scores) < 2:
        raise InputError(f"an ensemble is of two or more scores, not {len(scores)}")
    first = scores[0]
    for other in scores[1:]:
        for what, differs in _differences(first, other).items():
            if differs:
                raise InputError(f"an ensemble is of scores of the same {what}")
    scales = [_size(each) for each in scores]
    values = {
        hook: torch.stack(
            [each.values[hook] / scale for each, scale in zip(scores, scales, strict=True)]
        ).mean(dim=0)
        for hook in first.values
    }
    method = "ensemble of " + ", ".join(each.method for each in scores)
    counts = [(each.passes.forward, each.passes.backward) for each in scores]
    passes = PassCount(*map(sum, zip(*counts, strict=True)))
    return replace(first, method=method, values=values, passes=passes)


def _differences(one: Scores, other: Scores) -> dict[str, bool]:
    """What must be the same -> whether it is not."""
    if type(one) is not type(other):
        return {"kind": True}
    shapes = [{hook: value.shape for hook, value in each.values.items()} for each in (one, other)]
    into = [each.into if isinstance(each, EdgeScores) else () for each in (one, other)]
    a, b = (torch.stack((each.clean, each.corrupt)) for each in (one, other))
    return {
        "direction": one.direction != other.direction,
        "metric": one.metric != other.metric,
        "pairs": a.shape != b.shape or not torch.allclose(a, b, rtol=1e-3),
        "nodes": shapes[0] != shapes[1] or into[0] != into[1],
    }


def _size(scores: NodeScores | EdgeScores) -> Tensor:
    """Root mean square of the mean over pairs; where nothing was scored is left out.

    Raises:
        InputError: all are 0.
    """
    every = torch.cat([value.nanmean(dim=0).flatten() for value in scores.values.values()])
    size = every[~every.isnan()].square().mean().sqrt()
    if not size > 0:
        raise InputError(f"all scores of {scores.method!r} are 0: they rank nothing")
    return size
