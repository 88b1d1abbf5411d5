"""Products and quotients of branches, norms and attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracles import explicit_hosts as rules
from tests.property.operation import Env, Form, Op, always, of_the_model, tagged
from tests.property.program import Node


def _product(env: Env, node: Node, a: Tensor, b: Tensor) -> Tensor:
    style = node.args[0]
    if style == "mul_":
        y = a.clone() if a.shape[-1] >= b.shape[-1] else a.expand(b.shape).clone()
        y.mul_(b)
        return y
    if style == "einsum":
        return torch.einsum("bti,bti->bti", *torch.broadcast_tensors(a, b))
    if style == "addcmul":
        return torch.addcmul(torch.zeros_like(a * b), a, b)
    if style == "column":
        return a * b.mean(-1, keepdim=True)
    return a * b


def _product_rule(env: Env, node: Node, a: Tensor, b: Tensor) -> Tensor:
    return rules.times(a, b.mean(-1, keepdim=True) if node.args[0] == "column" else b)


def _product_real(env: Env, node: Node, a: Tensor, b: Tensor) -> Tensor:
    return a * (b.mean(-1, keepdim=True) if node.args[0] == "column" else b)


def _product_status(node: Node, live: list[bool], mode: str) -> str:
    if not all(live):
        return "sure"
    return "sure" if mode == "taught" and node.args[0] not in ("einsum", "addcmul") else "may"


def _ratio(env: Env, node: Node, a: Tensor, b: Tensor) -> Tensor:
    return a / (1.5 + b * b if node.args[0] == "square" else b.abs() + 1.5)


def _ratio_rule(env: Env, node: Node, a: Tensor, b: Tensor) -> Tensor:
    """The denominator is a product as well; the division has its plain gradient."""
    return a / (1.5 + rules.times(b, b) if node.args[0] == "square" else b.abs() + 1.5)


def _ratio_status(node: Node, live: list[bool], mode: str) -> str:
    if not live[1]:
        return "sure"
    return "may" if mode == "taught" else "none"


# ------------------------------------------------------------------ norms


def _make_norm(env: Env, node: Node, widths: list[int]) -> nn.Module:
    kind, n = node.args[0], widths[0]
    norm = nn.LayerNorm(n) if kind == "layer" else nn.RMSNorm(n, eps=1e-5)
    norm.weight.data = 1 + env.const(node, n, scale=0.2)
    if kind == "layer":
        norm.bias.data = env.const(node, n, which=1, scale=0.3)
    return norm.to(env.dtype)


def _norm_real(env: Env, node: Node, x: Tensor) -> Tensor:
    n = x.shape[-1]
    weight = (1 + env.const(node, n, scale=0.2)).to(env.rounded).to(x.dtype)
    if node.args[0] == "layer":
        return F.layer_norm(x, (n,), weight, env.const(node, n, which=1, scale=0.3))
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def _norm_rule(env: Env, node: Node, x: Tensor) -> Tensor:
    n = x.shape[-1]
    weight = (1 + env.const(node, n, scale=0.2)).to(env.rounded).to(x.dtype)
    if node.args[0] == "layer":
        return rules.layer_norm(x, weight, env.const(node, n, which=1, scale=0.3), 1e-5)
    return rules.rms_norm(x, weight, 1e-5, False)


def _raw_norm(env: Env, node: Node, x: Tensor) -> Tensor:
    """A norm in plain Python: args are (centred, what is averaged over, gain)."""
    return _normed(env, node, x, lambda scale: scale)


def _normed(env: Env, node: Node, x: Tensor, held: Callable[[Tensor], Tensor]) -> Tensor:
    centred, over, gain = node.args
    x = x - x.mean(-1, keepdim=True) if centred else x
    if over == "l1":
        scale = x.abs().mean(-1, keepdim=True) + 1e-3
    elif over == "max":
        scale = x.abs().amax(-1, keepdim=True) + 1e-3
    else:
        dims = {"features": (-1,), "tokens": (-2,), "all": (-2, -1)}[over]
        scale = (x.pow(2).mean(dims, keepdim=True) + 1e-5).sqrt()
    y = x / held(scale)
    return y * (1 + env.const(node, x.shape[-1], scale=0.2)) if gain else y


def _raw_norm_rule(env: Env, node: Node, x: Tensor) -> Tensor:
    return _normed(env, node, x, lambda scale: scale.detach())


# ------------------------------------------------------------------ attention


def _attend(env: Env, node: Node, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """args are (heads, variant, causal)."""
    return _attended(env, node, q, k, v, torch.matmul, _mixed)


def _attend_rule(env: Env, node: Node, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def matmul(a: Tensor, b: Tensor) -> Tensor:
        return rules.attention_product(env.composite, a, b)

    def mixed(p: Tensor, v: Tensor) -> Tensor:
        return rules.product(_mixed, p, v)

    return _attended(env, node, q, k, v, matmul, mixed)


def _mixed(p: Tensor, v: Tensor) -> Tensor:
    return (p.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


def _attended(
    env: Env, node: Node, q: Tensor, k: Tensor, v: Tensor, matmul: Form, mixed: Form
) -> Tensor:
    heads, variant, causal = node.args
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    t, d = q.shape[-2:]
    hidden = torch.ones(t, t, dtype=torch.bool).triu(1) & bool(causal)
    scores = matmul(q * d**-0.5, k.transpose(-2, -1))
    if variant == "key term":
        scores = scores + k.mean(-1).unsqueeze(-2)
    if variant == "bias":
        scores = scores + env.const(node, heads, t, t, scale=0.5)
    if variant == "sigmoid":
        pattern = torch.sigmoid(scores).masked_fill(hidden, 0.0)
    elif variant == "linear":
        pattern = scores.masked_fill(hidden, 0.0)
    else:
        pattern = scores.masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1)
    if variant == "constant" or env.composite == "CPLRP":
        pattern = pattern.detach()
    if variant == "halved":
        pattern = pattern * 0.5
    if variant == "renormed":
        first = pattern.masked_fill(torch.eye(t, dtype=torch.bool), 0.0)
        pattern = first / (first.sum(-1, keepdim=True) + 0.5)
    z = mixed(pattern, v) if variant == "mulsum" else matmul(pattern, v)
    if variant == "plus v":
        z = z + v
    if variant == "differential":
        other = (0.5 * scores).masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1)
        z = z - 0.3 * matmul(other, v)
    return z.transpose(1, 2).flatten(2)


ATTENTIONS = (
    "standard", "key term", "bias", "sigmoid", "linear", "constant", "halved", "renormed",
    "mulsum", "plus v", "differential",
)  # fmt: skip


def _attend_status(node: Node, live: list[bool], mode: str) -> str:
    variant = node.args[1]
    if variant == "standard":
        return "sure" if all(live) else "may"
    if variant in ("sigmoid", "renormed") and any(live[:2]):
        return "may" if mode == "taught" else "none"
    return "may"


BRANCHES: dict[str, Op] = {
    "product": Op(
        _product,
        _product_real,
        _product_rule,
        arity=2,
        width=lambda node, widths: widths[0] if node.args[0] == "column" else max(widths),
        status=_product_status,
        tags=tagged("product"),
    ),
    "ratio": Op(_ratio, None, _ratio_rule, arity=2, status=_ratio_status, tags=tagged("unknown")),
    "norm": Op(
        lambda env, node, x: env.module(node)(x),
        _norm_real,
        _norm_rule,
        status=of_the_model,
        make=_make_norm,
        tags=tagged("norm"),
    ),
    "raw_norm": Op(_raw_norm, None, _raw_norm_rule, status=always("may"), tags=tagged("norm")),
    "attend": Op(
        _attend,
        None,
        _attend_rule,
        arity=3,
        width=lambda node, widths: widths[2],
        status=_attend_status,
        tags=tagged("attend", "product"),
    ),
}
