"""Writes in place into views and slices.

The reference knows a view by the places of its entries alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles import explicit_hosts as rules
from tests.property.operation import Env, Form, Op, always, tagged
from tests.property.program import Node

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "head": lambda y: y[..., : y.shape[-1] // 2],
    "tail": lambda y: y[..., y.shape[-1] // 2 :],
    "stride": lambda y: y[..., ::2],
    "rows": lambda y: y[..., 1:, :],
    "viewed": lambda y: y.view(*y.shape[:-1], 2, -1)[..., 0, :],
    "turned": lambda y: y.transpose(-1, -2)[..., :-1],
    "thin": lambda y: y.unsqueeze(-1)[..., 4:, 0],
    "narrow": lambda y: y.narrow(-2, 0, 2),
    "flat": lambda y: y.view(len(y), -1)[:, : y[0].numel() // 2],
    "all": lambda y: y.view(y.shape),
}
EFFECTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Tensor], str]] = {
    # written, the same as a function, status
    "tanh_": (lambda y: y.tanh_(), torch.tanh, "identity"),
    "silu_": (lambda y: F.silu(y, inplace=True), F.silu, "identity"),
    "relu_": (lambda y: y.relu_(), torch.relu, "identity"),
    "mul_": (lambda y: y.mul_(1.5), lambda y: y * 1.5, "linear"),
    "neg_": (lambda y: y.neg_(), lambda y: -y, "linear"),
    "zero_": (lambda y: y.zero_(), torch.zeros_like, "linear"),
    "add_": (lambda y: y.add_(0.5), lambda y: y + 0.5, "constant"),
    "fill_": (lambda y: y.fill_(0.5), lambda y: torch.full_like(y, 0.5), "constant"),
    "pow_": (lambda y: y.pow_(2), lambda y: y**2, "identity"),
    "sigmoid_": (lambda y: y.sigmoid_(), torch.sigmoid, "unknown"),
    "exp_": (lambda y: y.exp_(), torch.exp, "unknown"),
    "clamp_": (lambda y: y.clamp_(-0.1, 0.1), lambda y: y.clamp(-0.1, 0.1), "unknown"),
}


def _write(env: Env, node: Node, a: Tensor) -> Tensor:
    """args are (view, effect, own): ``own`` writes into a copy."""
    view, effect, own = node.args
    # Into the tensor itself only where nobody else reads it.
    writes = not own and env.owned and a.is_contiguous()
    y = a if writes else a.clone(memory_format=torch.contiguous_format)
    EFFECTS[effect][0](VIEWS[view](y))
    return y


def _replace(a: Tensor, view: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    """``a`` with the entries that a view shows changed, by their places alone."""
    flat = a.reshape(-1)
    places = VIEWS[view](torch.arange(flat.numel()).view(a.shape))
    new = change(flat[places.reshape(-1)].view(places.shape)).reshape(-1)
    source = torch.arange(flat.numel())
    source[places.reshape(-1)] = flat.numel() + torch.arange(new.numel())
    return torch.cat([flat, new])[source].view(a.shape)


def _write_real(env: Env, node: Node, a: Tensor) -> Tensor:
    view, effect, _ = node.args
    return _replace(a, view, EFFECTS[effect][1])


def _write_rule(env: Env, node: Node, a: Tensor) -> Tensor:
    view, effect, _ = node.args
    _, function, kind = EFFECTS[effect]
    if kind == "identity":
        return _replace(a, view, lambda y: rules.elementwise(function, y))
    return _replace(a, view, function)


def _write_status(node: Node, live: list[bool], mode: str) -> str:
    if not live[0]:
        return "sure"
    return "none" if EFFECTS[node.args[1]][2] == "unknown" else "may"


def _assign(env: Env, node: Node, a: Tensor, b: Tensor) -> Tensor:
    """args are (view, how): part of ``b`` goes where a view shows ``a``."""
    view, how = node.args
    y = a.clone(memory_format=torch.contiguous_format)
    shown = VIEWS[view](y)
    given = VIEWS[view](b.clone(memory_format=torch.contiguous_format))
    if how == "copy_":
        shown.copy_(given)
    elif how == "set":
        shown[...] = given
    elif how == "add_":
        shown += given
    elif how == "sub_":
        shown.sub_(given)
    else:  # "mul_"
        shown *= given
    return y


def _assign_form(rule: bool) -> Form:
    def assign(env: Env, node: Node, a: Tensor, b: Tensor) -> Tensor:
        view, how = node.args
        flat = b.reshape(-1)
        given = flat[VIEWS[view](torch.arange(flat.numel()).view(b.shape))]

        def change(shown: Tensor) -> Tensor:
            if how in ("copy_", "set"):
                return given
            if how == "mul_":
                return rules.times(shown, given) if rule else shown * given
            return shown + given if how == "add_" else shown - given

        return _replace(a, view, change)

    return assign


WRITTEN: dict[str, Op] = {
    "write": Op(_write, _write_real, _write_rule, status=_write_status, tags=tagged("inplace")),
    "assign": Op(
        _assign,
        _assign_form(False),
        _assign_form(True),
        arity=2,
        status=always("may"),
        tags=tagged("inplace"),
    ),
}
