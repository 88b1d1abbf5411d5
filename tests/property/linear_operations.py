"""Operations that are linear in what flows through them, and constants that are added."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.property.operation import Env, Op, always, constant, tagged
from tests.property.program import Node


def _make_linear(env: Env, node: Node, widths: list[int]) -> nn.Module:
    out, bias = node.args[0], bool(node.args[1])
    layer = nn.Linear(widths[0], out, bias=bias, dtype=env.dtype)
    layer.weight.data = env.weight(node, out, widths[0])
    if bias:
        layer.bias.data = env.const(node, out, which=1, scale=0.3)
    return layer


def _linear(env: Env, node: Node, x: Tensor) -> Tensor:
    out = node.args[0]
    bias = env.const(node, out, which=1, scale=0.3) if node.args[1] else None
    y = torch.einsum("bti,oi->bto", x, env.weight(node, out, x.shape[-1]))
    return y if bias is None else y + bias


def _raw_linear(env: Env, node: Node, x: Tensor) -> Tensor:
    out, style = node.args
    weight = env.weight(node, out, x.shape[-1])
    if style == "linear":
        return F.linear(x, weight)
    if style == "matmul":
        return x @ weight.T
    if style == "einsum":
        return torch.einsum("...i,oi->...o", x, weight)
    if style == "rows":  # the constant is the first factor
        return (weight @ x.transpose(-1, -2)).transpose(-1, -2)
    return F.linear(x, weight, env.const(node, out, which=1, scale=0.3))  # "biased"


def _factor(env: Env, node: Node, x: Tensor) -> Tensor:
    kind = node.args[0]
    shape = {"scalar": (1,), "feature": (x.shape[-1],), "full": tuple(x.shape[-2:])}[kind]
    return env.const(node, *shape)


def _scale(env: Env, node: Node, x: Tensor) -> Tensor:
    c, style = _factor(env, node, x), node.args[1]
    if style == "rmul":
        return c * x
    if style == "div":
        return x / (c.abs() + 0.5)
    if style == "neg":
        return -x
    if style == "number":
        return x * 0.75
    if style == "mul_":
        return x.clone().mul_(c)
    if style == "out":  # a write into a buffer that carries no gradient
        y = torch.zeros_like(x)
        y += x * c
        return y
    return x * c


def _scale_real(env: Env, node: Node, x: Tensor) -> Tensor:
    c, style = _factor(env, node, x), node.args[1]
    c = {"div": 1 / (c.abs() + 0.5), "neg": -torch.ones_like(c), "number": 0.75}.get(style, c)
    return x * c


def _shift(env: Env, node: Node, x: Tensor) -> Tensor:
    c, style = _factor(env, node, x), node.args[1]
    if style == "sub":
        return x - c
    if style == "rsub":
        return c - x
    if style == "add_":
        return x.clone().add_(c)
    if style == "number":
        return x + 0.75
    return x + c


def _shift_real(env: Env, node: Node, x: Tensor) -> Tensor:
    c, style = _factor(env, node, x), node.args[1]
    c = torch.full_like(c, 0.75) if style == "number" else c
    sign = -1.0 if style == "rsub" else 1.0
    return sign * x + (-c if style == "sub" else c)


def _add(env: Env, node: Node, a: Tensor, b: Tensor) -> Tensor:
    style = node.args[0]
    if style == "sub":
        return a - b
    if style == "add_":
        y = a.clone() if a.shape[-1] == max(a.shape[-1], b.shape[-1]) else a.expand(b.shape).clone()
        y += b
        return y
    if style == "alpha":
        return torch.add(a, b, alpha=0.5)
    if style == "stack":
        return torch.stack(torch.broadcast_tensors(a, b)).sum(0)
    return a + b


def _add_real(env: Env, node: Node, a: Tensor, b: Tensor) -> Tensor:
    sign = {"sub": -1.0, "alpha": 0.5}.get(node.args[0], 1.0)
    return a + sign * b


def _joins(node: Node, live: list[bool], mode: str) -> str:
    """A value without relevance that is added or put beside is a constant."""
    return "sure" if all(live) or (mode == "taught" and node.op in ("add", "cat")) else "may"


def _reduce(env: Env, node: Node, x: Tensor) -> Tensor:
    kind, dim = node.args
    if kind == "mean":
        return x.mean(dim, keepdim=True).expand_as(x)
    if kind == "sum":
        return x.sum(dim, keepdim=True).repeat(*[1] * x.ndim) + torch.zeros_like(x)
    if kind == "cumsum":
        return x.cumsum(dim)
    if kind == "max":
        return x.max(dim, keepdim=True).values.expand_as(x)
    if kind == "centre":
        return x - x.mean(dim, keepdim=True)
    return x.amax(dim, keepdim=True).expand_as(x)  # "amax"


def _reduce_real(env: Env, node: Node, x: Tensor) -> Tensor:
    kind, dim = node.args
    n = x.shape[dim]
    if kind == "max":
        best = x.detach().max(dim, keepdim=True).indices
        return x.gather(dim, best).expand_as(x)
    if kind == "amax":  # shared where several are the largest
        largest = (x == x.amax(dim, keepdim=True)).to(x.dtype)
        return (x * (largest / largest.sum(dim, keepdim=True))).sum(dim, keepdim=True).expand_as(x)
    mixing = torch.ones(n, n, dtype=x.dtype)
    if kind == "cumsum":
        mixing = mixing.tril()
    if kind in ("mean", "centre"):
        mixing = mixing / n
    if kind == "centre":
        mixing = torch.eye(n, dtype=x.dtype) - mixing
    sizes = "bti,oi->bto" if dim == -1 else "bid,oi->bod"
    return torch.einsum(sizes, x, mixing)


def _move(env: Env, node: Node, x: Tensor) -> Tensor:
    """Entries go elsewhere and stay what they are."""
    kind, dim, k = node.args
    n = x.shape[dim]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(node.seed))
    if kind == "flip":
        return x.flip(dim)
    if kind == "roll":
        return x.roll(k, dim)
    if kind == "select":
        return x.index_select(dim, order)
    if kind == "gather":
        index = order if dim == -1 else order[:, None]
        return x.gather(dim, index.expand(x.shape))
    if kind == "index":
        return x[..., order] if dim == -1 else x[..., order, :]
    if kind == "unbind":
        return torch.stack(x.unbind(dim)[::-1], dim)
    if kind == "split":
        return torch.cat(x.split(max(1, k), dim)[::-1], dim)
    if kind == "scatter":
        index = (order if dim == -1 else order[:, None]).expand(x.shape)
        return torch.zeros_like(x).scatter(dim, index, x)
    if kind == "index_add":
        return torch.zeros_like(x).index_add(dim, order, x)
    if kind == "index_copy":
        return torch.zeros_like(x).index_copy(dim, order, x)
    if kind == "put":
        y = torch.zeros_like(x)
        if dim == -1:
            y[..., order] = x
        else:
            y[..., order, :] = x
        return y
    if kind == "sort":
        return x.sort(dim).values
    return x.topk(n, dim).values  # "topk"


MOVES = (
    "flip", "roll", "select", "gather", "index", "unbind", "split", "scatter", "index_add",
    "index_copy", "put", "sort", "topk",
)  # fmt: skip


def _move_real(env: Env, node: Node, x: Tensor) -> Tensor:
    kind, dim, k = node.args
    n = x.shape[dim]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(node.seed))
    if kind in ("sort", "topk"):  # ties fall as they fall in the operation itself
        kept = x.detach()
        found = kept.sort(dim) if kind == "sort" else kept.topk(n, dim)
        return x.gather(dim, found.indices)
    places = torch.arange(n)
    if kind in ("flip", "unbind"):
        order = places.flip(0)
    elif kind == "roll":
        order = (places - k) % n
    elif kind == "split":
        order = torch.cat(places.split(max(1, k))[::-1])
    elif kind in ("scatter", "index_add", "index_copy", "put"):
        order = order.argsort()
    matrix = torch.eye(n, dtype=x.dtype)[order]
    return torch.einsum("bti,oi->bto" if dim == -1 else "bid,oi->bod", x, matrix)


def _slice(env: Env, node: Node, x: Tensor) -> Tensor:
    start, stop, step = node.args
    if step == 1:
        return x.narrow(-1, start, stop - start)
    return x[..., start:stop:step]


def _slice_real(env: Env, node: Node, x: Tensor) -> Tensor:
    start, stop, step = node.args
    return x.index_select(-1, torch.arange(start, stop, step))


def _tokens(env: Env, node: Node, x: Tensor) -> Tensor:
    mixing = env.const(node, x.shape[-2], x.shape[-2], scale=0.6)
    style = node.args[0]
    if style == "matmul":
        return mixing @ x
    if style == "tril":
        return torch.einsum("qk,bkd->bqd", mixing.tril(), x)
    return torch.stack([mixing @ row for row in x])  # "rows"


def _tokens_real(env: Env, node: Node, x: Tensor) -> Tensor:
    mixing = env.const(node, x.shape[-2], x.shape[-2], scale=0.6)
    mixing = mixing.tril() if node.args[0] == "tril" else mixing
    return sum(mixing[:, k, None] * x[:, k, None] for k in range(x.shape[1]))  # type: ignore[return-value]


def _reshape(env: Env, node: Node, x: Tensor) -> Tensor:
    kind = node.args[0]
    if kind == "heads":
        return x.view(*x.shape[:-1], 2, -1).transpose(-1, -2).reshape(x.shape)
    if kind == "there":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "strided":
        half = x.contiguous().as_strided(x.shape, x.contiguous().stride())
        return half.clone()
    if kind == "flat":
        return x.flatten(-2).unflatten(-1, x.shape[-2:])
    if kind == "unfold":
        return x.unfold(-1, 2, 2).flatten(-2)
    if kind == "pad":
        return F.pad(x, (1, 0))[..., :-1]
    if kind == "shift":
        return F.pad(x, (0, 0, 1, 0))[..., :-1, :]
    if kind == "cast":
        return x.to(torch.float32).to(x.dtype)
    if kind == "tile":
        return x[..., : x.shape[-1] // 2].repeat(1, 1, 2)
    if kind == "repeat":
        return x[..., ::2].repeat_interleave(2, dim=-1)
    if kind == "tril":
        return x.tril(0)
    if kind == "masked":
        return x.masked_fill(_mask(node, x), 0.0)
    return F.dropout(x, 0.3, training=False)  # "dropout"


RESHAPES = (
    "heads", "there", "strided", "flat", "unfold", "pad", "shift", "cast", "tile", "repeat", "tril",
    "masked", "dropout",
)  # fmt: skip


def _mask(node: Node, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(node.seed)
    return torch.rand(x.shape[-2:], generator=generator) < 0.3


def _reshape_real(env: Env, node: Node, x: Tensor) -> Tensor:
    kind, n = node.args[0], x.shape[-1]
    if kind == "heads":
        order = torch.arange(n).reshape(2, -1).T.flatten()
        return x[..., order]
    if kind in ("pad", "shift"):
        dim = -1 if kind == "pad" else -2
        keep = torch.ones(x.shape[dim], dtype=x.dtype)
        keep[0] = 0
        return x.roll(1, dim) * (keep if dim == -1 else keep[:, None])
    if kind == "tile":
        return x[..., torch.arange(n) % (n // 2)]
    if kind == "repeat":
        return x[..., torch.arange(n) // 2 * 2]
    if kind == "tril":
        return x * torch.ones(x.shape[-2:], dtype=x.dtype).tril(0)
    if kind == "masked":
        return x * (~_mask(node, x)).to(x.dtype)
    if kind == "cast":
        return x.to(torch.float32).to(x.dtype)
    return x


def _where(env: Env, node: Node, a: Tensor, b: Tensor) -> Tensor:
    if node.args[0] == "value":  # chosen by what flows: the choice is a constant
        return torch.where(a > b, a, b)
    return torch.where(_mask(node, a), a, b)


def _where_real(env: Env, node: Node, a: Tensor, b: Tensor) -> Tensor:
    first = (a > b).detach() if node.args[0] == "value" else _mask(node, a)
    return a * first.to(a.dtype) + b * (~first).to(a.dtype)


def _make_convolution(env: Env, node: Node, widths: list[int]) -> nn.Module:
    n = widths[0]
    layer = nn.Conv1d(n, n, 3, padding=1, groups=n, bias=bool(node.args[0]), dtype=env.dtype)
    layer.weight.data = env.const(node, n, 1, 3, scale=0.6)
    if node.args[0]:
        assert layer.bias is not None
        layer.bias.data = env.const(node, n, which=1, scale=0.3)
    return layer


def _convolution_real(env: Env, node: Node, x: Tensor) -> Tensor:
    n = x.shape[-1]
    weight = env.const(node, n, 1, 3, scale=0.6)[:, 0]
    padded = torch.cat([torch.zeros_like(x[:, :1]), x, torch.zeros_like(x[:, :1])], dim=1)
    y = sum(padded[:, k : k + x.shape[1]] * weight[:, k] for k in range(3))
    return y + env.const(node, n, which=1, scale=0.3) if node.args[0] else y  # type: ignore[return-value, operator]


def _checkpointed(env: Env, node: Node, x: Tensor) -> Tensor:
    mixing = env.weight(node, x.shape[-1], x.shape[-1])
    out: Tensor = checkpoint(lambda x: x @ mixing, x, use_reentrant=node.args[0] == "reentrant")
    return out


def _inactive(env: Env, node: Node, x: Tensor) -> Tensor:
    return x.clamp(-1e4, 1e4)


LINEAR: dict[str, Op] = {
    "linear": Op(
        lambda env, node, x: env.module(node)(x),
        _linear,
        width=lambda node, widths: int(node.args[0]),
        make=_make_linear,
        tags=tagged("linear"),
    ),
    "raw_linear": Op(
        _raw_linear,
        lambda env, node, x: _linear(
            env, Node("linear", node.inputs, (node.args[0], node.args[1] == "biased"), node.seed), x
        ),
        width=lambda node, widths: int(node.args[0]),
        status=lambda node, live, mode: (
            "may" if node.args[1] == "biased" and mode != "taught" else "sure"
        ),
    ),
    "scale": Op(_scale, _scale_real),
    "shift": Op(_shift, _shift_real, status=constant, tags=tagged("constant")),
    "add": Op(
        _add,
        _add_real,
        arity=2,
        width=lambda node, widths: max(widths),
        status=_joins,
    ),
    "reduce": Op(
        _reduce,
        _reduce_real,
        status=lambda node, live, mode: "may" if node.args[0] == "amax" else "sure",
        tags=tagged("reduction"),
    ),
    "move": Op(_move, _move_real, tags=tagged("move")),
    "slice": Op(
        _slice,
        _slice_real,
        width=lambda node, widths: len(range(*node.args)),
        tags=tagged("view"),
    ),
    "cat": Op(
        lambda env, node, a, b: torch.cat([a, b], dim=-1),
        arity=2,
        width=lambda node, widths: sum(widths),
        status=_joins,
    ),
    "tokens": Op(_tokens, _tokens_real),
    "reshape": Op(_reshape, _reshape_real, tags=tagged("view")),
    "where": Op(_where, _where_real, arity=2, status=_joins),
    "detach": Op(
        lambda env, node, x: x.detach(),
        status=always("may"),
        tags=tagged("detach"),
    ),
    "convolution": Op(
        lambda env, node, x: env.module(node)(x.transpose(1, 2)).transpose(1, 2),
        _convolution_real,
        make=_make_convolution,
    ),
    "checkpoint": Op(
        _checkpointed,
        lambda env, node, x: x @ env.weight(node, x.shape[-1], x.shape[-1]),
        status=always("may"),
    ),
    "guard": Op(_inactive, lambda env, node, x: x),
}
