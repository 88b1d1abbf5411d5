"""Convolutions and group norms: against the slow rules, and against zennit's stored results.

A convolution is a sparse linear layer. The slow rules take it as the dense matrix that it is, which
is found by convolving one unit vector after another.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lenslrp.hooks import AlphaBeta, Gamma
from lenslrp.hooks import functions as F
from lenslrp.hooks.convolution import attach_convolution, unfold_windows
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.linear_rules import ZPLUS, LinearRule
from lenslrp.hooks.norms import is_norm
from lenslrp.hooks.rule_types import Normalisation
from lenslrp.hooks.sites import Accounts, Site
from tests.conftest import ROOT
from tests.oracles import slow_rules as slow

REFERENCE = ROOT / "tests" / "reference"
TINY = 1e-20
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
RULES: dict[str, tuple[LinearRule, Callable[..., Tensor]]] = {
    "gamma": (Gamma(0.25), lambda r, x, w, b: slow.gamma(r, x, w, b, 0.25, TINY)),
    "alpha-beta": (AlphaBeta(2.0, 1.0), lambda r, x, w, b: slow.alpha_beta(r, x, w, b, 2, 1, TINY)),
    "z+": (ZPLUS, lambda r, x, w, b: slow.z_plus(r, x, w, b, TINY)),
}
CONVOLUTIONS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "patches": (lambda: nn.Conv2d(3, 4, 2, stride=2), (3, 4, 6)),
    "no-bias": (lambda: nn.Conv2d(2, 3, 2, stride=2, bias=False), (2, 4, 4)),
    "overlapping": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 5, 4)),
    "oblong": (lambda: nn.Conv2d(1, 3, (2, 3), stride=(1, 2), padding=(0, 1)), (1, 3, 5)),
    "dilated": (lambda: nn.Conv1d(2, 3, 3, dilation=2, padding=2), (2, 7)),
    "grouped": (lambda: nn.Conv1d(4, 6, 2, groups=2), (4, 5)),
    "depthwise": (lambda: nn.Conv1d(3, 3, 2, groups=3, padding=1), (3, 4)),
    "same": (lambda: nn.Conv1d(2, 2, 4, padding="same"), (2, 6)),
    "reflecting": (lambda: nn.Conv1d(1, 2, 3, padding=1, padding_mode="reflect"), (1, 6)),
    "volume": (lambda: nn.Conv3d(1, 2, 2, stride=2), (1, 2, 4, 4)),
}


def ruled(module: Any, rule: LinearRule, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Accounts]:
    """(output, gradient at x, books) of a module with ``rule`` in its place."""
    at, books = Attached(), Accounts()
    site = Site("layer", "Conv", "convolution", rule, None, accounts=books)
    attach_convolution(at, module, rule, site)
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    (gradient,) = torch.autograd.grad(y, leaf, g)
    for undo in reversed(at.undo):
        undo()
    assert site.forward == site.backward == module.groups
    return y.detach(), gradient, books


def made(name: str) -> tuple[Any, Tensor, Tensor]:
    """(module, x [2, ...], its output) in float64."""
    build, shape = CONVOLUTIONS[name]
    module = build().double().requires_grad_(False)
    x = torch.randn(2, *shape, dtype=torch.float64)
    return module, x, module(x)


def dense(module: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """A convolution of inputs of ``shape`` as a matrix [out, in], and its bias at each output."""
    size = torch.Size(shape).numel()
    units = torch.eye(size, dtype=torch.float64).view(size, *shape)
    zero = module(torch.zeros(1, *shape, dtype=torch.float64))
    bias = None if module.bias is None else zero.flatten()
    return (module(units) - zero).flatten(1).T, bias


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_a_convolution_under_a_rule_equals_the_slow_rule(name: str, rule: str) -> None:
    module, x, y = made(name)
    g = torch.randn_like(y)
    engine, reference = RULES[rule]
    output, gradient, books = ruled(module, engine, x, g)
    assert torch.equal(output, y)
    assert output.stride() == y.stride()
    if name == "reflecting":  # one input, several weights: windows see what a matrix cannot
        assert float((x * gradient).sum()) == pytest.approx(_received(books, g * y))
        return
    weight, bias = dense(module, tuple(x.shape[1:]))
    for row in range(2):
        expected = reference((g * y)[row].flatten(), x[row].flatten(), weight, bias)
        received = (x * gradient)[row].flatten()
        torch.testing.assert_close(received, expected, rtol=1e-9, atol=1e-12)
    assert float((x * gradient).sum()) == pytest.approx(_received(books, g * y))


def _received(books: Accounts, relevance: Tensor) -> float:
    """What is left for the input when bias and stabiliser have had theirs."""
    return float(relevance.sum()) - sum(float(amount) for amount in books.terms.values())


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_windows_are_what_each_output_looks_at(name: str) -> None:
    module, x, y = made(name)
    seen = unfold_windows(x, module)
    rank = len(module.kernel_size)
    assert seen.shape[1 : 1 + rank] == y.shape[2:]
    ins, outs = module.in_channels // module.groups, module.out_channels // module.groups
    for group in range(module.groups):
        into = seen.narrow(1 + rank, group * ins, ins).flatten(1 + rank)
        weight = module.weight[group * outs : (group + 1) * outs].flatten(1)
        found = into @ weight.T
        if module.bias is not None:
            found = found + module.bias[group * outs : (group + 1) * outs]
        torch.testing.assert_close(
            found.movedim(-1, 1), y[:, group * outs : (group + 1) * outs], rtol=1e-9, atol=1e-12
        )


# ------------------------------------------------------------------- zennit

STORED = json.loads((REFERENCE / "zennit_rules.json").read_text(encoding="utf-8"))["layers"]
ZENNIT: dict[str, LinearRule] = {
    "gamma_0.25": Gamma(0.25),
    "gamma_0.05": Gamma(0.05),
    "z_plus": ZPLUS,
    "alpha_beta": AlphaBeta(2.0, 1.0),
}


@pytest.mark.parametrize("rule", list(ZENNIT))
@pytest.mark.parametrize("layer", list(STORED))
def test_linear_layers_and_convolutions_equal_zennit(layer: str, rule: str) -> None:
    tensors = load_file(REFERENCE / "zennit_rules.safetensors")
    module: Any = getattr(nn, STORED[layer]["class"])(**STORED[layer]["settings"]).double()
    module.weight = nn.Parameter(tensors[f"{layer}.weight"], requires_grad=False)
    if module.bias is not None:
        module.bias = nn.Parameter(tensors[f"{layer}.bias"], requires_grad=False)
    x, relevance = tensors[f"{layer}.x"], tensors[f"{layer}.relevance"]
    g = relevance / module(x)
    if isinstance(module, nn.Linear):
        gradient, _ = ZENNIT[rule].backward(g, x, module.weight, module.bias)
    else:
        _, gradient, _ = ruled(module, ZENNIT[rule], x, g)
    expected = tensors[f"{layer}.{rule}"]
    torch.testing.assert_close(x * gradient, expected, rtol=1e-9, atol=1e-10)


# ------------------------------------------------------------------- group norm


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_is_a_layer_norm_of_every_group(groups: int, affine: bool) -> None:
    module = nn.GroupNorm(groups, 6, affine=affine).double().requires_grad_(False)
    if affine:
        module.weight.add_(torch.randn(6) * 0.3)
        module.bias.add_(torch.randn(6) * 0.3)
    assert is_norm(module)
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    y = module(x)
    g = torch.randn_like(y)
    site = Site("norm", "GroupNorm", "norm", Normalisation(), None)
    leaf = x.clone().requires_grad_()
    gain = module.weight if affine else None
    out = F.apply(F.GroupNorm, leaf, y, gain, groups, module.eps, site)
    assert torch.equal(out, y)
    (gradient,) = torch.autograd.grad(out, leaf, g)
    size = 6 // groups
    weight = torch.ones(6).double() if gain is None else gain
    bias = torch.zeros(6).double() if module.bias is None else module.bias
    for row in range(2):
        for group in range(groups):
            own = slice(group * size, (group + 1) * size)
            expected = slow.layer_norm_identity(
                (g * y)[row, own].flatten(),
                x[row, own].flatten(),
                weight[own].repeat_interleave(5),
                bias[own].repeat_interleave(5),
                module.eps,
            )
            received = (x * gradient)[row, own].flatten()
            torch.testing.assert_close(received, expected, rtol=1e-9, atol=1e-12)


def test_a_subclass_of_group_norm_with_a_forward_of_its_own_is_not_taken_for_one() -> None:
    class Odd(nn.GroupNorm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) ** 2

    assert not is_norm(Odd(1, 4))
