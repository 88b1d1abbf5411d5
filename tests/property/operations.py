"""The operations that programs are made of: what runs in the model, and what is right.

Each has three forms. ``run`` is what the module in the model does, with views, writes in place and
sub-modules. ``real`` computes the same values in another way, without either; ``rule`` is a
surrogate with the same values whose gradient hands relevance out by the operation's rule. A
``status`` says what may be expected where the operation stands in code that nobody declared
(``bare``) and in a module declared as ``Operations()`` (``taught``):

- ``sure``: a rule is known, so relevance should be given, and be right;
- ``may``: right or refused;
- ``none``: nothing says what is right, so it must be refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.oracles import explicit_hosts as rules
from tests.property.program import Node

Form = Callable[..., Tensor]


class Env:
    """Constants of nodes, in the type of the model, and the modules of a part."""

    def __init__(
        self,
        dtype: torch.dtype,
        modules: dict[str, nn.Module] | None = None,
        rounded: torch.dtype | None = None,
    ) -> None:
        self.dtype, self.modules = dtype, modules
        self.rounded = rounded or dtype
        self.owned = False  # whether the node that runs is the only one to read its input

    def const(self, node: Node, *shape: int, which: int = 0, scale: float = 1.0) -> Tensor:
        """The same numbers at every call; rounded to the model's type in the reference as well."""
        generator = torch.Generator().manual_seed(node.seed * 7 + which)
        made = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return made.to(self.rounded).to(self.dtype)

    def weight(self, node: Node, out: int, into: int) -> Tensor:
        return self.const(node, out, into, scale=1.2 / into**0.5)

    def module(self, node: Node) -> Any:
        assert self.modules is not None
        return self.modules[key_of(node)]


def key_of(node: Node) -> str:
    """The name of a node's sub-module."""
    name = next((a for a in node.args if isinstance(a, str) and a.startswith("@")), "")
    text = f"{node.op}_{node.seed}_{'_'.join(str(a) for a in node.args)}"
    return name[1:] or text.replace(".", "_").replace("@", "")


@dataclass(frozen=True)
class Op:
    """One operation; see the module's docstring.

    ``status`` gets the node, whether each input is live, and the mode: ``bare`` code of a module,
    ``taught`` code of one declared as ``Operations()``, or a ``hook``.
    """

    run: Form
    real: Form | None = None
    rule: Form | None = None
    arity: int = 1
    width: Callable[[Node, list[int]], int] = lambda node, widths: widths[0]
    status: Callable[[Node, list[bool], str], str] = lambda node, live, mode: "sure"
    make: Callable[[Env, Node, list[int]], nn.Module] | None = None
    tags: frozenset[str] = frozenset()

    def form(self, name: str) -> Form:
        if name == "run":
            return self.run
        real = self.real or self.run
        return real if name == "real" else self.rule or real


def rank(statuses: list[str]) -> str:
    """The worst of several statuses."""
    return next((s for s in ("none", "may") if s in statuses), "sure")


def _always(status: str) -> Callable[[Node, list[bool], str], str]:
    return lambda node, live, mode: status


def _constant(node: Node, live: list[bool], mode: str) -> str:
    """The graph of bare code shows no constant that is added: only the account does."""
    return "may" if mode == "bare" else "sure"


def _tags(*names: str) -> frozenset[str]:
    return frozenset(names)


# ------------------------------------------------------------------ linear


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


def _module(node: Node, live: list[bool], mode: str) -> str:
    """A module that only a hook knows of is no part of the model, and gets no rule."""
    return "may" if mode == "hook" and live[0] else "sure"


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
    if kind in ("max", "amax"):
        best = x.detach().argmax(dim, keepdim=True)
        return x.gather(dim, best.expand_as(x.narrow(dim, 0, 1))).expand_as(x)
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
    "flip roll select gather index unbind split scatter index_add index_copy put sort topk"
).split()


def _move_real(env: Env, node: Node, x: Tensor) -> Tensor:
    kind, dim, k = node.args
    n = x.shape[dim]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(node.seed))
    if kind in ("sort", "topk"):
        return x.gather(dim, x.detach().argsort(dim=dim, descending=kind == "topk", stable=True))
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


RESHAPES = "heads there strided flat unfold pad shift cast tile repeat tril masked dropout".split()


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


# ------------------------------------------------------------------ element-wise functions

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


def _unknown_status(node: Node, live: list[bool], mode: str) -> str:
    name = node.args[0]
    if not live[0]:
        return "sure"
    if name in HOMOGENEOUS:
        return "may"
    return "sure" if mode == "taught" and name in LEAKS else "none"


def _inactive(env: Env, node: Node, x: Tensor) -> Tensor:
    return x.clamp(-1e4, 1e4)


# ------------------------------------------------------------------ products


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
        return rules.product(torch.matmul, a, b)

    return _attended(env, node, q, k, v, matmul, lambda p, v: rules.product(_mixed, p, v))


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
    if variant == "constant":
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


# ------------------------------------------------------------------ writes in place

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "head": lambda y: y[..., : y.shape[-1] // 2],
    "tail": lambda y: y[..., y.shape[-1] // 2 :],
    "stride": lambda y: y[..., ::2],
    "rows": lambda y: y[..., 1:, :],
    "viewed": lambda y: y.view(*y.shape[:-1], 2, -1)[..., 0, :],
    "turned": lambda y: y.transpose(-1, -2)[..., :-1],
    "thin": lambda y: y.unsqueeze(-1)[..., 4:, 0],
    "narrow": lambda y: y.narrow(-2, 0, 2),
    "flat": lambda y: y.view(-1)[: y.numel() // 2],
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


OPS: dict[str, Op] = {
    "linear": Op(
        lambda env, node, x: env.module(node)(x),
        _linear,
        width=lambda node, widths: int(node.args[0]),
        make=_make_linear,
        tags=_tags("linear"),
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
    "shift": Op(_shift, _shift_real, status=_constant, tags=_tags("constant")),
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
        tags=_tags("reduction"),
    ),
    "move": Op(_move, _move_real, tags=_tags("move")),
    "slice": Op(
        _slice,
        _slice_real,
        width=lambda node, widths: len(range(*node.args)),
        tags=_tags("view"),
    ),
    "cat": Op(
        lambda env, node, a, b: torch.cat([a, b], dim=-1),
        arity=2,
        width=lambda node, widths: sum(widths),
        status=_joins,
    ),
    "tokens": Op(_tokens, _tokens_real),
    "reshape": Op(_reshape, _reshape_real, tags=_tags("view")),
    "where": Op(_where, _where_real, arity=2, status=_joins),
    "detach": Op(
        lambda env, node, x: x.detach(),
        status=_always("may"),
        tags=_tags("detach"),
    ),
    "convolution": Op(
        lambda env, node, x: env.module(node)(x.transpose(1, 2)).transpose(1, 2),
        _convolution_real,
        make=_make_convolution,
    ),
    "checkpoint": Op(
        _checkpointed,
        lambda env, node, x: x @ env.weight(node, x.shape[-1], x.shape[-1]),
        status=_always("may"),
    ),
    "activation": Op(
        _activation,
        _function_real,
        _function_rule,
        status=_module,
        make=lambda env, node, widths: ACTIVATIONS[node.args[0]](node.args[1] != "plain"),
        tags=_tags("activation"),
    ),
    "function": Op(
        _function,
        _function_real,
        _function_rule,
        status=lambda node, live, mode: (
            "sure"
            if not live[0] or (mode == "taught" and node.args[1] == "call")
            else "may"
        ),
        tags=_tags("function"),
    ),
    "unknown": Op(_unknown, status=_unknown_status, tags=_tags("unknown")),
    "guard": Op(_inactive, lambda env, node, x: x),
    "product": Op(
        _product,
        _product_real,
        _product_rule,
        arity=2,
        width=lambda node, widths: widths[0] if node.args[0] == "column" else max(widths),
        status=_product_status,
        tags=_tags("product"),
    ),
    "ratio": Op(_ratio, arity=2, status=_ratio_status, tags=_tags("unknown")),
    "norm": Op(
        lambda env, node, x: env.module(node)(x),
        _norm_real,
        _norm_rule,
        status=_module,
        make=_make_norm,
        tags=_tags("norm"),
    ),
    "raw_norm": Op(_raw_norm, None, _raw_norm_rule, status=_always("may"), tags=_tags("norm")),
    "attend": Op(
        _attend,
        None,
        _attend_rule,
        arity=3,
        width=lambda node, widths: widths[2],
        status=_attend_status,
        tags=_tags("attend", "product"),
    ),
    "write": Op(_write, _write_real, _write_rule, status=_write_status, tags=_tags("inplace")),
    "assign": Op(
        _assign,
        _assign_form(False),
        _assign_form(True),
        arity=2,
        status=_always("may"),
        tags=_tags("inplace"),
    ),
}  # fmt: skip
