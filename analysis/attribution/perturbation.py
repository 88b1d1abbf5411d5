"""Units set to a baseline: occlusion one at a time, KernelSHAP many at a time.

KernelSHAP (Lundberg & Lee 2017) is the weighted least squares whose solution is the Shapley value
when every coalition is evaluated. captum's needs scikit-learn, enforces the sum by a weight of 1e6
and never enumerates; here the sum holds exactly (Covert & Lee 2021), every coalition is evaluated
where there are few enough, and samples come in pairs of a coalition and its complement.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lenslrp.analysis.passes.problems import AttributionProblem
from lenslrp.errors import InputError


def occlusion(
    problem: AttributionProblem, *, seed: int, baseline: str | Tensor = "zero"
) -> Float[Tensor, "batch units"]:
    """What the value loses when one unit is set to the baseline, in units of the target.

    Args:
        baseline: see `AttributionProblem.baseline`.
    """
    batch, units = problem.mask.shape
    alone = torch.eye(units, dtype=torch.bool)[:, None].expand(-1, batch, -1)
    without = problem.ablated(~alone, problem.baseline(baseline))
    problem.passes.forward += 1  # the unchanged input
    return (problem.explained.value - without).T


def kernel_shap(
    problem: AttributionProblem,
    *,
    seed: int,
    samples: int | None = None,
    baseline: str | Tensor = "zero",
) -> Float[Tensor, "batch units"]:
    """Shapley values of the units, in units of the target; they sum to ``f(x) - f(baseline)``.

    Args:
        samples: coalitions evaluated, beside none and all: eight for every unit by default. Where
            there are no more than that (2^n - 2), all are evaluated and the values are exact.
        baseline: see `AttributionProblem.baseline`.

    Raises:
        InputError: too few samples.
    """
    mask = problem.mask.cpu()
    batch, units = mask.shape
    sample_count = 8 * units if samples is None else samples
    if sample_count < 2:
        raise InputError(f"samples must be at least 2, not {samples}")
    plans = [
        coalitions(int(real.sum()), sample_count, problem.generator(row, seed))
        for row, real in enumerate(mask)
    ]
    keep = torch.ones(max(len(plan) for plan, _ in plans) + 1, batch, units, dtype=torch.bool)
    keep[0] = ~mask
    for row, (plan, _) in enumerate(plans):
        keep[1 : len(plan) + 1, row, mask[row]] = plan
    values = problem.ablated(keep, problem.baseline(baseline)).cpu().double()
    problem.passes.forward += 1  # the unchanged input
    shapley = torch.zeros(batch, units, dtype=torch.float64)
    for row, (plan, weights) in enumerate(plans):
        at_baseline, at_plan = values[0, row], values[1 : len(plan) + 1, row]
        total = problem.explained.value[row].cpu().double() - at_baseline
        gains = at_plan - at_baseline
        shapley[row, mask[row]] = least_squares(plan.double(), weights, gains, total)
    return shapley.to(problem.inputs.device)


def coalitions(
    units: int, samples: int, generator: torch.Generator
) -> tuple[Bool[Tensor, "samples units"], Float[Tensor, " samples"]]:
    """Which coalitions to evaluate, and the weight of each: all of them, or pairs drawn at random.

    The kernel gives one coalition of s of n units the weight (n - 1) / (C(n, s) s (n - s)).
    """
    if units < 2:
        return torch.zeros(0, units, dtype=torch.bool), torch.zeros(0, dtype=torch.float64)
    if units < 31 and 2**units - 2 <= samples:
        numbers = torch.arange(1, 2**units - 1)
        plan = (numbers[:, None] >> torch.arange(units)) & 1 == 1
        sizes = plan.sum(dim=1).tolist()
        weights = [(units - 1) / (math.comb(units, s) * s * (units - s)) for s in sizes]
        return plan, torch.tensor(weights, dtype=torch.float64)
    size = torch.arange(1, units)
    chance = 1 / (size * (units - size)).double()
    drawn = size[torch.multinomial(chance, samples // 2, replacement=True, generator=generator)]
    order = torch.rand(len(drawn), units, generator=generator).argsort(dim=1).argsort(dim=1)
    plan = order < drawn[:, None]
    return torch.cat([plan, ~plan]), torch.ones(2 * len(plan), dtype=torch.float64)


def least_squares(
    plan: Float[Tensor, "samples units"],
    weights: Float[Tensor, " samples"],
    values: Float[Tensor, " samples"],
    total: Float[Tensor, ""],
) -> Float[Tensor, " units"]:
    """Least squares of ``plan @ phi = values`` under ``phi.sum() = total`` (Lagrange's system)."""
    units = plan.shape[1]
    system = torch.ones(units + 1, units + 1, dtype=torch.float64)
    system[:units, :units] = plan.T @ (weights[:, None] * plan)
    system[units, units] = 0
    right = torch.cat([plan.T @ (weights * values), total[None]])
    # Fewer samples than units leave more than one solution: the shortest is taken.
    solution: Tensor = torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution
    return solution[:units, 0]
