"""Every rule written out as the paper prints it: relevance in, relevance out, by loops.

Nothing here knows gradients. ``relevance`` is that of an operation's output and what is
returned is that of its input. Equations are those of Achtibat et al. 2024 (arXiv:2402.05602)
unless another source is named. Linear layers take vectors: x [in], weight [out, in], bias [out]
or None; a bias is an input that is always 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def stabilised(value: float, eps: float) -> float:
    """The value moved away from 0 by ``eps``; 0 counts as positive."""
    return value + eps if value >= 0.0 else value - eps


def _contributions(x: Tensor, weight: Tensor, bias: Tensor | None, j: int) -> list[float]:
    """x_i w_ji for every input i, then b_j."""
    terms = [x[i].item() * weight[j, i].item() for i in range(x.numel())]
    return [*terms, 0.0 if bias is None else bias[j].item()]


def epsilon(
    relevance: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """Eq. 8: R_i = sum_j x_i w_ji / stab(z_j) R_j."""
    received = torch.zeros_like(x)
    for j in range(weight.shape[0]):
        terms = _contributions(x, weight, bias, j)
        z = stabilised(math.fsum(terms), eps)
        for i in range(x.numel()):
            received[i] += terms[i] / z * relevance[j]
    return received


def gamma(
    relevance: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: float,
    eps: float,
) -> Tensor:
    """Eq. 24, the generalised gamma rule, with its four sign cases of input and output.

    The output's sign says which contributions are favoured, the input's sign says which weights
    make such contributions: output > 0 favours w+ for x > 0 and w- for x < 0; output < 0 the
    other way round.
    """
    received = torch.zeros_like(x)
    for j in range(weight.shape[0]):
        z = math.fsum(_contributions(x, weight, bias, j))
        if z == 0.0:
            continue

        def weighted(value: float, w: float, positive: bool = z > 0.0) -> float:
            w_plus, w_minus = max(w, 0.0), min(w, 0.0)
            if positive and value >= 0.0:
                return value * (w + gamma * w_plus)
            if positive and value < 0.0:
                return value * (w + gamma * w_minus)
            if value >= 0.0:
                return value * (w + gamma * w_minus)
            return value * (w + gamma * w_plus)

        terms = [weighted(x[i].item(), weight[j, i].item()) for i in range(x.numel())]
        terms.append(0.0 if bias is None else weighted(1.0, bias[j].item()))
        denominator = stabilised(math.fsum(terms), eps)
        for i in range(x.numel()):
            received[i] += terms[i] / denominator * relevance[j]
    return received


def alpha_beta(
    relevance: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alpha: float,
    beta: float,
    eps: float,
) -> Tensor:
    """R_i = sum_j (alpha z_ij+ / sum_i z_ij+ - beta z_ij- / sum_i z_ij-) R_j; alpha - beta = 1."""
    if not math.isclose(alpha - beta, 1.0):
        raise ValueError(f"alpha - beta must be 1, not {alpha - beta}")
    received = torch.zeros_like(x)
    for j in range(weight.shape[0]):
        terms = _contributions(x, weight, bias, j)
        gain = stabilised(math.fsum(t for t in terms if t > 0.0), eps)
        loss = math.fsum(t for t in terms if t < 0.0)
        loss = loss - eps if loss < 0.0 else eps
        for i in range(x.numel()):
            if terms[i] > 0.0:
                received[i] += alpha * terms[i] / gain * relevance[j]
            else:
                received[i] -= beta * terms[i] / loss * relevance[j]
    return received


def z_plus(relevance: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Eq. 25: only positive contributions count; alpha = 1, beta = 0."""
    received = torch.zeros_like(x)
    for j in range(weight.shape[0]):
        terms = [max(t, 0.0) for t in _contributions(x, weight, bias, j)]
        denominator = stabilised(math.fsum(terms), eps)
        for i in range(x.numel()):
            received[i] += terms[i] / denominator * relevance[j]
    return received


def identity(relevance: Tensor, x: Tensor, eps: float) -> Tensor:
    """Eq. 9: all relevance of f(x_i) goes to x_i, less what the stabiliser takes."""
    received = torch.zeros_like(x)
    for i in range(x.numel()):
        received[i] = relevance[i] * x[i] / stabilised(x[i].item(), eps)
    return received


def softmax_values(x: Tensor, temperature: float = 1.0) -> list[float]:
    """Softmax of one row; entries of -inf get exactly 0."""
    top = max(x.tolist())
    powers = [math.exp((value - top) / temperature) for value in x.tolist()]
    return [power / math.fsum(powers) for power in powers]


def softmax_taylor(relevance: Tensor, x: Tensor) -> Tensor:
    """Eq. 13: R_i = x_i (R_i - s_i sum_j R_j); exactly 0 where x is masked with -inf."""
    s = softmax_values(x)
    total = math.fsum(relevance.tolist())
    received = torch.zeros_like(x)
    for i in range(x.numel()):
        if x[i] > -math.inf:
            received[i] = x[i] * (relevance[i] - s[i] * total)
    return received


def softmax_gim(gradient: Tensor, x: Tensor, temperature: float) -> Tensor:
    """GIM (arXiv:2505.17630): the Jacobian of a warmer softmax, times a gradient; a gradient.

    d s_j / d x_i = s_j (delta_ij - s_i), with s taken at ``temperature`` and no factor 1/T.
    """
    s = softmax_values(x, temperature)
    received = torch.zeros_like(x)
    for i in range(x.numel()):
        for j in range(x.numel()):
            received[i] += s[j] * ((1.0 if i == j else 0.0) - s[i]) * gradient[j]
    return received


def uniform_matmul(relevance: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 14 and 15 on o_jp = sum_i a_ji b_ip: every product's relevance, half to each factor."""
    to_a, to_b = torch.zeros_like(a), torch.zeros_like(b)
    for j in range(a.shape[0]):
        for p in range(b.shape[1]):
            o = math.fsum(a[j, i].item() * b[i, p].item() for i in range(a.shape[1]))
            for i in range(a.shape[1]):
                share = a[j, i] * b[i, p] / o * relevance[j, p]
                to_a[j, i] += 0.5 * share
                to_b[i, p] += 0.5 * share
    return to_a, to_b


def uniform_product(relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Prop. 3.2 with two factors, element by element: half of the relevance to each."""
    return relevance / 2.0, relevance / 2.0


def rms_norm_identity(relevance: Tensor, x: Tensor, eps: float) -> Tensor:
    """Eq. 19: the norm is a constant factor for each element, so relevance passes unchanged."""
    return identity(relevance, x, eps)


def layer_norm_identity(
    relevance: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, variance_eps: float
) -> Tensor:
    """Prop. 3.4: the deviation is constant; mean-centring is a linear layer (Eq. 8).

    LayerNorm is then the matrix M_ji = w_j (delta_ij - 1/n) / deviation, with its bias.
    """
    n = x.numel()
    mean = math.fsum(x.tolist()) / n
    variance = math.fsum((value - mean) ** 2 for value in x.tolist()) / n
    deviation = math.sqrt(variance + variance_eps)
    matrix = torch.zeros(n, n, dtype=x.dtype)
    for j in range(n):
        for i in range(n):
            matrix[j, i] = weight[j] * ((1.0 if i == j else 0.0) - 1.0 / n) / deviation
    return epsilon(relevance, x, matrix, bias, 0.0)


def softcap_identity(relevance: Tensor, capped: Tensor, cap: float) -> Tensor:
    """Identity rule on y = cap tanh(x / cap), and 0 where y is masked or tanh has saturated."""
    received = torch.zeros_like(capped)
    for i in range(capped.numel()):
        if abs(capped[i].item()) < cap:
            received[i] = relevance[i]
    return received
