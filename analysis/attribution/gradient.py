"""Gradients averaged over changed inputs: Integrated Gradients and SmoothGrad.

Both attribute the embeddings (or pixels) and are summed over each unit. Integrated Gradients is
captum's (``pip install 'lenslrp[evaluate]'``). SmoothGrad is not: captum's ``NoiseTunnel`` draws
from torch's global generator and has one noise level for the whole batch, so that the
relevance of a row would depend on the rows beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lenslrp.analysis.passes.problems import AttributionProblem
from lenslrp.extras import require


def integrated_gradients(
    problem: AttributionProblem, *, seed: int, steps: int = 32, baseline: str | Tensor = "zero"
) -> Tensor:
    """``(x - x') * integral of df/dx along the line from x' to x`` (Sundararajan et al. 2017).

    In units of the target; sums to ``f(x) - f(x')``, but for the error of the integral.

    Args:
        steps: of Gauss-Legendre's rule.
        baseline: x', see `AttributionProblem.baseline`.

    Raises:
        MissingExtraError: captum is not installed.
    """
    require("captum", "integrated_gradients")
    from captum.attr import IntegratedGradients

    def value(inputs: Tensor) -> Tensor:  # captum's rows are steps x batch, the batch innermost
        return problem.values(inputs.unflatten(0, (-1, len(problem.inputs)))).flatten()

    relevance: Tensor = IntegratedGradients(value).attribute(
        problem.inputs,
        problem.baseline(baseline),
        n_steps=steps,
        internal_batch_size=max(problem.chunk, len(problem.inputs)),
    )
    return relevance


@torch.no_grad()
def smoothgrad(
    problem: AttributionProblem,
    *,
    seed: int,
    samples: int = 20,
    noise: float = 0.1,
    times_input: bool = True,
) -> Tensor:
    """The mean gradient over inputs with Gaussian noise (Smilkov et al. 2017), times the input.

    In units of the target with ``times_input``, else of the target per unit of embedding.

    Args:
        samples: how many noisy copies.
        noise: standard deviation, as a share of the range of the row's own values.
        times_input: multiply by the input without noise. Without it, the gradient's entries are
            summed as they are.
    """
    x = problem.inputs
    noisy = x.expand(samples, *x.shape).clone()
    for row, values in enumerate(x):
        real = problem.mask[row] if problem.grid is None else ...
        width = noise * (values[real].max() - values[real].min())
        shape = (samples, *values[real].shape)
        draw = torch.randn(shape, generator=problem.generator(row, seed)).to(x)
        noisy[:, row, real] += draw * width
    mean = problem.gradients(noisy).mean(dim=0)
    return mean * x if times_input else mean
