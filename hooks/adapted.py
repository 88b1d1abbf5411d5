"""Linear layers with an adapter of PEFT on them (LoRA, DoRA, IA3): one linear layer to a rule.

``y = W x + b`` becomes ``y = W' x + b'``, in as many operations as the adapter has. Under epsilon
they stay on the graph, where each is linear. A rule that reads the weight gets W', as if the
adapter were merged.

``hook_adapter`` is made here: what the adapter adds to the layer's output, [batch, pos, d_out]. Its
relevance is the share of the output's that the fine-tuning brought; what remains belongs to the
layer as it was. A hook that changes it (sets it to 0, say) changes the model's output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformers.pytorch_utils import Conv1D

from lenslrp.errors import InputError
from lenslrp.hooks import functions as F
from lenslrp.hooks.constants import measure_bias
from lenslrp.hooks.context import Context
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.linear_rules import Epsilon, LinearRule
from lenslrp.hooks.packed import attach_unpacked, is_packed_linear
from lenslrp.hooks.structure import NamedModules

ADAPTER_PACKAGE = "peft.tuners."


class AdapterPoint(HookPoint):
    """The hook point at what an adapter adds."""


_points: WeakKeyDictionary[nn.Module, AdapterPoint] = WeakKeyDictionary()


def base_of(layer: nn.Module) -> nn.Module | None:
    """The linear layer that adapters are on; ``None`` where a module is nothing of the kind."""
    base: nn.Module | None = layer
    while base is not None and type(base).__module__.startswith(ADAPTER_PACKAGE):
        base = base._modules.get("base_layer")
    return base if base is not layer and isinstance(base, nn.Linear | Conv1D) else None


def is_adapted(layer: nn.Module) -> bool:
    """Whether a module is a linear layer with an adapter on it."""
    return base_of(layer) is not None


def has_adapter(module: nn.Module) -> bool:
    """Whether an adapter that is not merged is on a module, so that its weight is not all of it."""
    inside = type(module).__module__.startswith(ADAPTER_PACKAGE) and hasattr(module, "base_layer")
    return inside and not getattr(module, "merged", False)


def adapter_points(parts: NamedModules) -> dict[str, nn.Module]:
    """Hook points at adapters that are not merged, by name; the same ones at every call."""
    inside = {id(part) for _, layer in parts if is_adapted(layer) for part in layer.children()}
    return {
        f"{path}.hook_adapter": _points.setdefault(layer, AdapterPoint())
        for path, layer in parts
        if is_adapted(layer) and id(layer) not in inside and not getattr(layer, "merged", False)
    }


def attach_adapted(at: Attached, ctx: Context, path: str, layer: nn.Module, role: str) -> None:
    """The rule of a linear layer for one with an adapter on it; and its hook point."""
    rule, base, run = ctx.composite[role], base_of(layer), layer.forward
    assert base is not None
    attach_adapter_point(at, ctx, path, layer, base, isinstance(rule, LinearRule))
    if isinstance(rule, LinearRule):
        attach_unpacked(at, ctx, path, layer, role, rule)
        return
    if is_packed_linear(base):
        attach_unpacked(at, ctx, f"{path}.base_layer", base, role, rule, meters=False)
    if ctx.accounts is not None and _has_constants(layer):
        site = ctx.site(path, layer, role, Epsilon())
        at.meter(layer, lambda y: measure_bias(y, _constant(run, base, y), site))


def _has_constants(layer: nn.Module) -> bool:
    return any(getattr(part, "bias", None) is not None for part in layer.modules())


def _constant(run: Callable[[Tensor], Tensor], base: Any, y: Tensor) -> Tensor:
    """What the layer gives for an input of zeros, [out]."""
    width = base.nx if isinstance(base, Conv1D) else base.in_features
    with torch.no_grad():
        return run(y.new_zeros(1, width))[0]


def attach_adapter_point(
    at: Attached, ctx: Context, path: str, layer: nn.Module, base: Any, ruled: bool
) -> None:
    """Pass what adapters add through their hook point, where that has hooks."""
    point = _points.setdefault(layer, AdapterPoint())
    site = ctx.site(f"{path}.hook_adapter", layer, "linear", Epsilon())
    own: dict[str, Any] = {}  # what the base layer gave for the layer's own input

    def begin(_: nn.Module, args: tuple[Any, ...]) -> None:
        own.clear()
        if point._forward_hooks:
            own["x"] = args[0]

    def note(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        if "x" in own and own["x"].data_ptr() == args[0].data_ptr():
            own.setdefault("y", (y, y._version))

    def shown(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        if "x" not in own:
            return y
        x, (without, version) = own.pop("x"), own.pop("y", (None, 0))
        # IA3 scales what it gives the base layer; AdaLoRA writes to what it gets of it.
        if without is None or without._version != version:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not ruled):
                without = base(x)
        without = without.view_as(without)  # apart from what the layer makes of it
        if ctx.accounts is not None:
            measure_bias(without, base.bias, site)
        added = y - without
        changed = point(added)
        same = torch.equal(changed, added)
        if ruled and not same:
            raise InputError(
                f"{site.hook} can be read under a rule that reads weights, and not changed: the "
                "layer without its adapter has a rule of its own then. Use epsilon for its role"
            )
        if not y.requires_grad:
            return y if same else without + changed
        return F.apply(F.Rejoined, without, changed, y if same else None, site)

    at.first_pre_hook(layer, begin)
    at.hook(base, note)
    at.first_hook(layer, shown)
