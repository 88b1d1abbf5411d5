"""Each rule of ``lenslrp.hooks.rules`` equals its slow re-implementation, float64, 1e-10.

The engine's rules take a gradient g and return a gradient; the slow rules take relevance and
return relevance. The link is R_out = y g and R_in = x g_x. ``LINEAR_RULES`` and ``OTHER_RULES``
are the one place where the names and arguments of the engine's functions for them appear.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lenslrp.hooks import linear_rules, rule_types, rules
from tests.oracles import slow_rules as slow

EPS = 1e-6  # large enough for a missing or misplaced stabiliser to show at 1e-10
TINY = 1e-20  # the engine's own stabiliser in float64
GAMMA, ALPHA, BETA, CAP, TEMPERATURE, VARIANCE_EPS = 0.25, 2.0, 1.0, 5.0, 2.0, 1e-5
ROWS, N_IN, N_OUT = 3, 7, 5


@dataclass(frozen=True)
class Case:
    """One operation at one input: y = f(x), and the gradient that arrives at y."""

    x: Tensor
    y: Tensor
    g: Tensor
    weight: Tensor
    bias: Tensor | None


Rule = Callable[[Case], Tensor]
LinearRule = Callable[[Case], tuple[Tensor, Tensor]]  # gradient at x, relevance the bias took
SlowLinearRule = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal to 1e-10, which every comparison of this file uses."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------ inputs


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def linear_case(sign: str, biased: bool) -> Case:
    """A linear layer on inputs of one or both signs; some inputs and weights are exactly 0."""
    generator = torch.Generator().manual_seed(3)
    x = noise(generator, ROWS, N_IN)
    x = {"both": x, "positive": x.abs(), "negative": -x.abs()}[sign]
    x[0, 2] = 0.0
    weight = noise(generator, N_OUT, N_IN)
    weight[1, 3] = 0.0
    bias = noise(generator, N_OUT) if biased else None
    y = torch.einsum("bi,ji->bj", x, weight) + (0.0 if bias is None else bias)
    return Case(x, y, noise(generator, ROWS, N_OUT), weight, bias)


def elementwise_case(function: Callable[[Tensor], Tensor]) -> Case:
    """An element-wise function, at 0 and close to 0 as well."""
    generator = torch.Generator().manual_seed(4)
    x = 2.0 * noise(generator, ROWS, N_IN)
    x[0, 0], x[0, 1], x[1, 0] = 0.0, 1e-9, -1e-9
    return Case(x, function(x), noise(generator, ROWS, N_IN), torch.ones(N_IN), None)


def norm_case(biased: bool) -> Case:
    """Inputs of a norm with learned weight; ``y`` is left to the caller."""
    generator = torch.Generator().manual_seed(5)
    x = noise(generator, ROWS, N_IN) + 0.5
    weight = 1.0 + 0.3 * noise(generator, N_IN)
    bias = 0.4 * noise(generator, N_IN) if biased else None
    return Case(x, x, noise(generator, ROWS, N_IN), weight, bias)


def rms_norm_case() -> Case:
    """y = w x / rms(x)."""
    case = norm_case(biased=False)
    scale = (case.x.pow(2).mean(-1, keepdim=True) + VARIANCE_EPS).sqrt()
    return Case(case.x, case.weight * case.x / scale, case.g, case.weight, None)


def deviation(x: Tensor) -> Tensor:
    """LayerNorm's denominator, [rows, 1]."""
    return (x.var(-1, unbiased=False, keepdim=True) + VARIANCE_EPS).sqrt()


def layer_norm_case(biased: bool) -> Case:
    """y = w (x - mean) / deviation + b."""
    case = norm_case(biased)
    y = case.weight * (case.x - case.x.mean(-1, keepdim=True)) / deviation(case.x)
    y = y if case.bias is None else y + case.bias
    return Case(case.x, y, case.g, case.weight, case.bias)


def softmax_case(masked: bool) -> Case:
    """Softmax rows; the masked ones hide their last entries behind -inf."""
    case = elementwise_case(lambda x: x)
    x = case.x.clone()
    if masked:
        x[:, N_IN - 2 :] = -math.inf
    return Case(x, x.softmax(-1), case.g, case.weight, None)


def by_row(rule: Callable[[Tensor, Tensor], Tensor], case: Case) -> Tensor:
    """A slow rule, which takes vectors, on every row: (relevance of the output, x) -> R_in."""
    relevance = case.g * case.y
    return torch.stack([rule(r, x) for r, x in zip(relevance, case.x, strict=True)])


# ------------------------------------------------------------------ the table

LINEAR = {
    f"{sign}-{'bias' if biased else 'no-bias'}": linear_case(sign, biased)
    for sign in ("both", "positive", "negative")
    for biased in (False, True)
}
ELEMENTWISE = {
    "silu": elementwise_case(torch.nn.functional.silu),
    "gelu": elementwise_case(torch.nn.functional.gelu),
    "relu": elementwise_case(torch.relu),
}
RMS_NORM = {"rms": rms_norm_case()}
LAYER_NORM = {"no-bias": layer_norm_case(False), "bias": layer_norm_case(True)}

# name: (the engine's rule, the slow rule); linear layers, with the bias's part
LINEAR_RULES: dict[str, tuple[LinearRule, SlowLinearRule]] = {
    "gamma": (
        lambda c: rules.gamma_linear(c.g, c.x, c.weight, c.bias, GAMMA, EPS),
        lambda r, x, w, b: slow.gamma(r, x, w, b, GAMMA, EPS),
    ),
    "gamma-of-0-is-epsilon": (
        lambda c: rules.gamma_linear(c.g, c.x, c.weight, c.bias, 0.0, EPS),
        lambda r, x, w, b: slow.epsilon(r, x, w, b, EPS),
    ),
    "alpha-beta": (
        lambda c: rules.alpha_beta_linear(c.g, c.x, c.weight, c.bias, ALPHA, BETA, EPS),
        lambda r, x, w, b: slow.alpha_beta(r, x, w, b, ALPHA, BETA, EPS),
    ),
    "z+": (
        lambda c: rules.zplus_linear(c.g, c.x, c.weight, c.bias, EPS),
        lambda r, x, w, b: slow.z_plus(r, x, w, b, EPS),
    ),
    "Gamma": (
        lambda c: linear_rules.Gamma(GAMMA).backward(c.g, c.x, c.weight, c.bias),
        lambda r, x, w, b: slow.gamma(r, x, w, b, GAMMA, TINY),
    ),
    "AlphaBeta": (
        lambda c: linear_rules.AlphaBeta(ALPHA, BETA).backward(c.g, c.x, c.weight, c.bias),
        lambda r, x, w, b: slow.alpha_beta(r, x, w, b, ALPHA, BETA, TINY),
    ),
    "ZPLUS": (
        lambda c: linear_rules.ZPLUS.backward(c.g, c.x, c.weight, c.bias),
        lambda r, x, w, b: slow.z_plus(r, x, w, b, TINY),
    ),
}

# name: (inputs, the engine's gradient at x, the slow rule's relevance of x)
OTHER_RULES: dict[str, tuple[dict[str, Case], Rule, Rule]] = {
    "identity": (
        ELEMENTWISE,
        lambda c: rules.identity(c.g, c.x, c.y, EPS),
        lambda c: by_row(lambda r, x: slow.identity(r, x, EPS), c),
    ),
    "Identity": (
        ELEMENTWISE,
        lambda c: c.g * rule_types.Identity(EPS).factor(c.x, c.y),
        lambda c: by_row(lambda r, x: slow.identity(r, x, EPS), c),
    ),
    "RMS-norm": (
        RMS_NORM,
        lambda c: rules.identity(c.g, c.x, c.y, EPS),
        lambda c: by_row(lambda r, x: slow.rms_norm_identity(r, x, EPS), c),
    ),
    "LayerNorm": (
        LAYER_NORM,
        lambda c: rules.layer_norm_identity(c.g, c.weight, 1.0 / deviation(c.x)),
        lambda c: by_row(
            lambda r, x: slow.layer_norm_identity(r, x, c.weight, c.bias, VARIANCE_EPS), c
        ),
    ),
}
LINEAR_TABLE = [
    pytest.param(engine, reference, case, id=f"{name}-{label}")
    for name, (engine, reference) in LINEAR_RULES.items()
    for label, case in LINEAR.items()
]
OTHER_TABLE = [
    pytest.param(engine, reference, case, id=f"{name}-{label}")
    for name, (cases, engine, reference) in OTHER_RULES.items()
    for label, case in cases.items()
]


@pytest.mark.parametrize(("engine", "reference", "case"), LINEAR_TABLE)
def test_linear_rule_equals_slow_rule(
    engine: LinearRule, reference: SlowLinearRule, case: Case
) -> None:
    gradient, _ = engine(case)
    expected = by_row(lambda r, x: reference(r, x, case.weight, case.bias), case)
    assert_close(case.x * gradient, expected)


@pytest.mark.parametrize(("engine", "reference", "case"), LINEAR_TABLE)
def test_bias_takes_what_an_input_of_one_would_receive(
    engine: LinearRule, reference: SlowLinearRule, case: Case
) -> None:
    bias = torch.zeros(N_OUT, dtype=torch.float64) if case.bias is None else case.bias
    weight = torch.cat([case.weight, bias[:, None]], dim=1)
    one = torch.ones(1, dtype=torch.float64)
    received = by_row(lambda r, x: reference(r, torch.cat([x, one]), weight, None), case)
    _, taken = engine(case)
    assert_close(taken.sum(-1), received[:, -1])


@pytest.mark.parametrize(("engine", "reference", "case"), OTHER_TABLE)
def test_rule_equals_slow_rule(engine: Rule, reference: Rule, case: Case) -> None:
    assert_close(case.x * engine(case), reference(case))


# ------------------------------------------------------------------ rules of another shape


def test_stabiliser_moves_away_from_zero() -> None:
    values = torch.tensor([2.0, -2.0, 0.0, 1e-9, -1e-9], dtype=torch.float64)
    expected = [slow.stabilised(value, EPS) for value in values.tolist()]
    assert rules.stabilise(values, EPS).tolist() == expected


@pytest.mark.parametrize("case", LINEAR.values(), ids=LINEAR)
def test_epsilon_rule_is_the_plain_gradient(case: Case) -> None:
    relevance = by_row(lambda r, x: slow.epsilon(r, x, case.weight, case.bias, 0.0), case)
    x = case.x.clone().requires_grad_()
    y = torch.nn.functional.linear(x, case.weight, case.bias)
    (gradient,) = torch.autograd.grad(y, x, case.g)
    assert_close(case.x * gradient, relevance)


@pytest.mark.parametrize("masked", [False, True])
def test_softmax_rule_is_the_plain_gradient(masked: bool) -> None:
    case = softmax_case(masked)
    relevance = by_row(slow.softmax_taylor, case)
    x = case.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.softmax(x, dim=-1), x, case.g)
    finite = torch.where(case.x.isneginf(), 0.0, case.x)
    assert_close(finite * gradient, relevance)
    explicit = rules.softmax_taylor(case.g, case.y)
    assert_close(finite * explicit, relevance)
    if masked:
        assert (gradient[:, N_IN - 2 :] == 0).all()
        assert (explicit[:, N_IN - 2 :] == 0).all()


def slow_jacobian_rows(g: Tensor, x: Tensor, temperature: float = 1.0) -> Tensor:
    """The Jacobian of softmax at a temperature, times g, row by row."""
    pairs = zip(g, x, strict=True)
    return torch.stack([slow.softmax_gim(g_row, row, temperature) for g_row, row in pairs])


@pytest.mark.parametrize("masked", [False, True])
def test_gim_softmax_equals_slow_rule(masked: bool) -> None:
    case = softmax_case(masked)
    expected = slow_jacobian_rows(case.g, case.x, TEMPERATURE)
    actual = rules.softmax_gim(case.g, case.x, TEMPERATURE)
    compensation = rules.softmax_gim_compensation(case.g, case.x, TEMPERATURE)
    through_autograd = slow_jacobian_rows(compensation, case.x)
    assert_close(actual, expected)
    assert_close(through_autograd, expected)
    if masked:
        assert (actual[:, N_IN - 2 :] == 0).all()
        assert (compensation[:, N_IN - 2 :] == 0).all()


def test_half_is_the_uniform_rule_of_a_matrix_product() -> None:
    generator = torch.Generator().manual_seed(6)
    a, b, g = noise(generator, 3, 4), noise(generator, 4, 5), noise(generator, 3, 5)
    to_a, to_b = slow.uniform_matmul(g * (a @ b), a, b)
    halved = rules.uniform(g)
    assert_close(a * (halved @ b.T), to_a)
    assert_close(b * (a.T @ halved), to_b)


def test_half_is_the_uniform_rule_of_an_elementwise_product() -> None:
    generator = torch.Generator().manual_seed(7)
    a, b, g = (noise(generator, 6) for _ in range(3))
    to_a, to_b = slow.uniform_product(g * a * b)
    assert_close(a * (b * rules.uniform(g)), to_a)
    assert_close(b * (a * rules.uniform(g)), to_b)


def test_softcap_compensation_makes_tanh_an_identity() -> None:
    generator = torch.Generator().manual_seed(8)
    x, g = 4.0 * noise(generator, 12), noise(generator, 12)
    y = CAP * torch.tanh(x / CAP)
    expected = slow.softcap_identity(g * y, y, CAP)
    derivative = 1.0 - (y / CAP).square()  # what autograd multiplies by on its way to x
    actual = x * rules.softcap_compensation(g, y, CAP) * derivative
    assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_softcap_gives_exactly_zero_where_nothing_can_pass(dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    y = torch.tensor([-math.inf, lowest, CAP, -CAP, 0.5 * CAP], dtype=dtype)
    g = torch.tensor([math.inf, math.nan, 1.0, 1.0, 1.0], dtype=dtype)
    received = rules.softcap_compensation(g, y, CAP)
    assert (received[:4] == 0).all()
    assert received[4] > 0
    assert (slow.softcap_identity(g * y, y, CAP)[:4] == 0).all()


# ------------------------------------------------------------------ the slow rules themselves


def slow_linear_rules(bias: Tensor | None) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The linear rules without a stabiliser, as functions of (relevance, x, weight)."""
    return {
        "epsilon": lambda r, x, w: slow.epsilon(r, x, w, bias, 0.0),
        "gamma": lambda r, x, w: slow.gamma(r, x, w, bias, GAMMA, 0.0),
        "z+": lambda r, x, w: slow.z_plus(r, x, w, bias, 0.0),
        "alpha-beta": lambda r, x, w: slow.alpha_beta(r, x, w, bias, ALPHA, BETA, 0.0),
    }


@pytest.mark.parametrize("name", list(slow_linear_rules(None)))
def test_slow_linear_rules_conserve_without_bias(name: str) -> None:
    case = LINEAR["both-no-bias"]
    received = by_row(lambda r, x: slow_linear_rules(None)[name](r, x, case.weight), case)
    assert_close(received.sum(-1), (case.g * case.y).sum(-1))


def test_slow_alpha_beta_of_1_and_0_is_z_plus() -> None:
    case = LINEAR["both-bias"]
    received = by_row(lambda r, x: slow.alpha_beta(r, x, case.weight, case.bias, 1, 0, EPS), case)
    expected = by_row(lambda r, x: slow.z_plus(r, x, case.weight, case.bias, EPS), case)
    assert_close(received, expected)


def test_slow_gamma_re_weights_contributions_of_the_outputs_sign() -> None:
    """The four sign cases of Eq. 24 are one statement about contributions x_i w_ji."""
    case = LINEAR["both-bias"]
    assert case.bias is not None
    terms = torch.cat(
        [case.x[:, None, :] * case.weight, case.bias[:, None].expand(ROWS, N_OUT, 1)], dim=-1
    )
    z = terms.sum(-1, keepdim=True)
    favoured = torch.where(z > 0, terms.clamp(min=0), terms.clamp(max=0))
    terms = terms + GAMMA * favoured
    shares = terms / terms.sum(-1, keepdim=True) * (case.g * case.y)[..., None]
    received = by_row(lambda r, x: slow.gamma(r, x, case.weight, case.bias, GAMMA, 0.0), case)
    assert_close(received, shares[..., :N_IN].sum(1))


def test_slow_alpha_beta_refuses_other_sums() -> None:
    case = LINEAR["both-bias"]
    with pytest.raises(ValueError, match="alpha - beta must be 1, not 2"):
        slow.alpha_beta(case.y[0], case.x[0], case.weight, case.bias, 3.0, 1.0, EPS)
