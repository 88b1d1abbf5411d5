"""Element-wise functions that have a rule, and functions of all kinds that have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.oracles import explicit_hosts as rules
from tests.property.operation import Env, Op, of_the_model, tagged
from tests.property.program import Node

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": F.elu,
    "tanh": torch.tanh,
    "mish": F.mish,
    "hardswish": F.hardswish,
}
WRITTEN = {
    "silu": lambda x: F.silu(x, inplace=True),
    "relu": torch.relu_,
    "leaky_relu": lambda x: F.leaky_relu_(x, 0.1),
    "elu": F.elu_,
    "tanh": torch.tanh_,
    "mish": lambda x: F.mish(x, inplace=True),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
}
ACTIVATIONS: dict[str, Callable[[bool], nn.Module]] = {
    "silu": lambda inplace: nn.SiLU(inplace=inplace),
    "gelu": lambda inplace: nn.GELU(),
    "relu": lambda inplace: nn.ReLU(inplace=inplace),
    "leaky_relu": lambda inplace: nn.LeakyReLU(0.1, inplace=inplace),
    "elu": lambda inplace: nn.ELU(inplace=inplace),
    "tanh": lambda inplace: nn.Tanh(),
    "mish": lambda inplace: nn.Mish(inplace=inplace),
    "hardswish": lambda inplace: nn.Hardswish(inplace=inplace),
}


def _activation(env: Env, node: Node, x: Tensor) -> Tensor:
    copies = node.args[1] == "clone" or (node.args[1] == "inplace" and not env.owned)
    out: Tensor = env.module(node)(x.clone() if copies else x)
    return out


def _function(env: Env, node: Node, x: Tensor) -> Tensor:
    name, style = node.args
    if style == "written":
        return WRITTEN[name](x.clone())
    if style == "vmap":
        out: Tensor = torch.vmap(FUNCTIONS[name])(x)
        return out
    if style == "checkpoint":
        kept: Tensor = checkpoint(FUNCTIONS[name], x, use_reentrant=False)
        return kept
    return FUNCTIONS[name](x)


def _function_real(env: Env, node: Node, x: Tensor) -> Tensor:
    return FUNCTIONS[node.args[0]](x)


def _function_rule(env: Env, node: Node, x: Tensor) -> Tensor:
    return rules.elementwise(FUNCTIONS[node.args[0]], x)


class Tripled(torch.autograd.Function):
    """A function whose backward is not its derivative: three times as much."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g


class Add(Tripled):
    """Bears the name of a linear operation."""


class Clone(Tripled):
    """Another one."""


def _tampered(x: Tensor) -> Tensor:
    """The same values, whose gradient somebody changes."""
    y = x * 1
    if y.requires_grad:
        y.register_hook(lambda g: 2 * g)
    return y


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda x: torch.exp(0.3 * x),
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "cos": torch.cos,
    "sin": torch.sin,
    "square": lambda x: x.pow(2),
    "root": lambda x: (x * x + 1).sqrt(),
    "erf": torch.erf,
    "clamp": lambda x: x.clamp(-0.1, 0.1),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "positions": lambda x: x.softmax(-2),
    "cumprod": lambda x: x.cumprod(-1),
    "logsumexp": lambda x: x.logsumexp(-1, keepdim=True).expand_as(x),
    "length": lambda x: x.norm(dim=-1, keepdim=True).expand_as(x),
    "deviation": lambda x: x.std(-1, keepdim=True).expand_as(x),
    "round": torch.round,
    "sign": torch.sign,
    "abs": torch.abs,
    "maximum": lambda x: torch.maximum(x, torch.full_like(x, 0.05)),
    "glu": lambda x: F.glu(x, -1).repeat(1, 1, 2),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "reciprocal": lambda x: 1 / (x.pow(2) + 1),
    "gradient": _tampered,
    "function": Tripled.apply,
    "function named Add": Add.apply,
    "function named Clone": Clone.apply,
}
LEAKS = frozenset({"sigmoid", "softplus", "softmax", "positions"})
"""Plain gradients in a module declared as ``Operations()``."""
HOMOGENEOUS = frozenset({"abs"})
"""Without a rule, yet the identity rule and the plain gradient agree."""


def _unknown(env: Env, node: Node, x: Tensor) -> Tensor:
    return UNKNOWN[node.args[0]](x)


def _unknown_rule(env: Env, node: Node, x: Tensor) -> Tensor:
    return x if node.args[0] == "gradient" else UNKNOWN[node.args[0]](x)


def _unknown_status(node: Node, live: list[bool], mode: str) -> str:
    name = node.args[0]
    if not live[0]:
        return "sure"
    if name in HOMOGENEOUS or name == "gradient":
        return "may"
    return "sure" if mode == "taught" and name in LEAKS else "none"


FUNCTIONAL: dict[str, Op] = {
    "activation": Op(
        _activation,
        _function_real,
        _function_rule,
        status=of_the_model,
        make=lambda env, node, widths: ACTIVATIONS[node.args[0]](node.args[1] != "plain"),
        tags=tagged("activation"),
    ),
    "function": Op(
        _function,
        _function_real,
        _function_rule,
        status=lambda node, live, mode: (
            "sure" if not live[0] or (mode == "taught" and node.args[1] == "call") else "may"
        ),
        tags=tagged("function"),
    ),
    "unknown": Op(_unknown, None, _unknown_rule, status=_unknown_status, tags=tagged("unknown")),
}
