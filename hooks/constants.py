"""What constants take of the relevance that passes them: biases, and what a user's hooks add.

A constant on the path is one more contribution and absorbs its share ([A] Eq. 8); no token gets it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.weak import WeakTensorKeyDictionary

from lenslrp.hooks.context import Context
from lenslrp.hooks.functions import same
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.linear_rules import Epsilon
from lenslrp.hooks.sites import Site, has_values, row_sums, state_of, widest
from lenslrp.hooks.state import users_hooks
from lenslrp.hooks.structure import NamedModules

NUMBERS_AT_ONCE = 1 << 22
"""How many numbers of a gradient are widened at once."""


def measure_bias(y: Tensor, bias: Tensor | None, site: Site, dim: int = -1) -> None:
    """Report ``sum(bias * g)`` when the gradient at ``y`` arrives; the bias is along ``dim``.

    In chunks: a float64 copy of the gradient of all logits would be the largest tensor of the pass.
    Accounts that keep rows get one amount for each.
    """
    if bias is None or not y.requires_grad or _is_zero(bias):
        return  # TransformerLens gives every unembedding a bias of zeros

    def measure(g: Tensor) -> None:
        dtype, last = widest(g), g.detach().movedim(dim, -1)
        n_rows = 1 if site.accounts is None or site.accounts.rows is None else site.accounts.rows
        rows = last.reshape(n_rows, -1, last.shape[-1])
        summed = torch.zeros(n_rows, rows.shape[-1], dtype=dtype, device=g.device)
        for chunk in rows.split(max(1, NUMBERS_AT_ONCE // (n_rows * rows.shape[-1])), dim=1):
            summed += chunk.sum(dim=1, dtype=dtype)
        site.report("biases", summed @ bias.detach().to(g.device, dtype))

    y.register_hook(measure)


def _is_zero(bias: Tensor) -> bool:
    """Looked at once, and again when it has been written to: the host has to wait for it."""
    state = state_of(bias) if has_values(bias) else None
    if state is not None and _zeros.get(bias, (None,))[0] != state:
        _zeros[bias] = (state, not bool(bias.any()))
    return state is not None and _zeros[bias][1]


_zeros: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class _Ahead:
    """A value ahead of hooks: the tensor, its values, and where autograd stood."""

    tensor: Tensor
    values: Tensor
    version: int
    edge: GradientEdge | None
    begun: int
    touched: int


class EditMeter:
    """Accounts for what a user's hooks on one module add to the value that passes them.

    The value leaves with ``<y, g_y>`` and, along the graph that the hooks made, enters with
    ``<x, g_x>``: the rest is what constants took. A value that is written in place is gone
    afterwards; it is kept only with ``copies``.

    Attributes:
        missed: a value was written in place and not kept, so that nothing could be measured.
        touched: how often hooks have reached for gradients so far. One that changes a gradient
            would pass for a constant, so that nothing is measured there.
    """

    def __init__(self, site: Site, copies: bool) -> None:
        self.site, self.copies = site, copies
        self.missed = False
        self.touched: Callable[[], int] = int
        self._ahead: _Ahead | None = None

    def before(self, x: Any) -> None:
        """Called with the value ahead of the hooks."""
        self._ahead = None
        if isinstance(x, Tensor) and torch.is_grad_enabled():
            values = x.detach().clone() if self.copies else x
            edge = get_gradient_edge(x) if x.requires_grad else None
            self._ahead = _Ahead(x, values, x._version, edge, sequence_number(), self.touched())

    def after(self, y: Any) -> None:
        """Called with the value behind the hooks."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or not isinstance(y, Tensor) or not y.requires_grad:
            return
        written = ahead.tensor._version != ahead.version
        if (y is ahead.tensor and not written) or self.touched() > ahead.touched:
            return
        if written and not self.copies:
            self.missed = True
            return
        consumers = _consumers(y, ahead.edge, ahead.begun)
        if consumers is None:
            return  # values from elsewhere were mixed in: what they take is no constant's
        site, x = self.site, ahead.values.detach()
        kept = same(y, self.copies)
        y.register_hook(lambda g: site.report("biases", row_sums(kept, g)))

        def leaving(slots: list[int]) -> Callable[..., None]:
            def measure(grad_inputs: tuple[Tensor | None, ...], _: Any) -> None:
                for slot in slots:
                    g = grad_inputs[slot]
                    if g is not None:
                        site.report("biases", -row_sums(x, g))

            return measure

        for node, slots in consumers:
            node.register_hook(leaving(slots))


def sequence_number() -> int:
    """The number that autograd gives to a node made now; later ones have larger numbers."""
    node: Any = torch.zeros(1, requires_grad=True).clone().grad_fn
    return int(node._sequence_nr())


def _consumers(
    y: Tensor, edge: GradientEdge | None, begun: int
) -> list[tuple[Any, list[int]]] | None:
    """The nodes made since ``begun`` that take the value of ``edge``, and by which inputs.

    ``None`` where one of them takes something else that is older.
    """
    start, number = (None, 0) if edge is None else (edge.node, edge.output_nr)
    consumers: list[tuple[Any, list[int]]] = []
    stack, seen = [y.grad_fn], set()
    while stack:
        node: Any = stack.pop()
        if node in seen:
            continue
        if node._sequence_nr() <= begun or not node.next_functions:
            return None
        seen.add(node)
        slots = []
        for slot, (below, at) in enumerate(node.next_functions):
            if below is not None and below is start and at == number:
                slots.append(slot)
            elif below is not None:
                stack.append(below)
        if slots:
            consumers.append((node, slots))
    return consumers


def meter_edits(at: Attached, ctx: Context, parts: NamedModules) -> list[EditMeter]:
    """Meter every module that has hooks of the user's; called before any rule is attached."""
    meters: list[EditMeter] = []

    def meter(path: str, module: nn.Module) -> EditMeter:
        meters.append(EditMeter(ctx.site(path, module, "linear", Epsilon()), ctx.copies))
        return meters[-1]

    for path, module in parts if ctx.accounts is not None else ():
        if any(True for _ in users_hooks(module, ("_forward_hooks",))):
            out = meter(path, module)
            at.first_hook(module, lambda _, args, y, out=out: out.before(_first(y)))
            at.hook(module, lambda _, args, y, out=out: out.after(_first(y)))
        if any(True for _ in users_hooks(module, ("_forward_pre_hooks",))):
            into = meter(path, module)
            at.first_pre_hook(module, lambda _, args, into=into: into.before(_first(args)))
            at.pre_hook(module, lambda _, args, into=into: into.after(_first(args)))
    return meters


def watch_gradients(at: Attached, parts: NamedModules) -> list[str]:
    """Fills with the names of modules whose backward hooks, the user's own, change a gradient."""
    changed: list[str] = []
    for path, module in parts:
        for hooks in (module._backward_hooks, module._backward_pre_hooks):
            for key, hook in list(hooks.items()):
                at.undo.append(partial(_put_back, hooks, key, hook))
                hooks[key] = _watched(hook, path, changed)
    return changed


def _watched(hook: Callable[..., Any], path: str, changed: list[str]) -> Callable[..., Any]:
    def watched(module: nn.Module, gradients: Any, *rest: Any) -> Any:
        replaced = hook(module, gradients, *rest)
        pairs = zip(_tuple(replaced), _tuple(gradients), strict=False)
        if replaced is not None and not all(a is b or torch.equal(a, b) for a, b in pairs):
            changed.append(path)
        return replaced

    return watched


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _put_back(hooks: dict[int, Any], key: int, hook: Any) -> None:
    if key in hooks:  # else it has been removed meanwhile
        hooks[key] = hook


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple | list) and value else value
