"""Mixtures of experts: routers, batched experts, and hook points at every expert's neurons.

An expert's output times its router weight is a product of two factors ([A] Prop. 3.2): half to each
under ``router="uniform"``, everything to the expert under ``"constant"``. Experts are batched
parameters without components, in one of several implementations (a loop, batched or grouped
products), so their operations are intercepted one by one (:mod:`lenslrp.hooks.operations`),
whichever implementation runs.

TransformerLens has no hook points inside them. ``blocks.L.mlp.hook_expert_post`` is made here: the
neurons of the experts that each position was sent to, [batch, pos, slot, neuron]; which expert sits
in a slot is in ``R.routing``. Where experts run one after the other it fires once for each, with
zeros in the others' slots.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import MoEBridge
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from lenslrp.errors import InputError
from lenslrp.hooks.context import Context
from lenslrp.hooks.declared import GATED_MLP_SPEC, ROUTER_SPEC
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.linear_rules import LinearRule
from lenslrp.hooks.operations import PRODUCT_FUNCTIONS, OperationIntercept, attach_operations
from lenslrp.hooks.rule_types import Operations
from lenslrp.hooks.structure import NamedModules, original

ROUTER_CLASSES = re.compile("Router|Gating|Statics")
EXPERT_CLASSES = re.compile("Experts$")
"""Class names of what a mixture is made of; anything else inside it has rules of its own."""

MIXTURE_SPEC = Operations(gated=True, attention=False)
"""A mixture's own code: the weight of a shared expert, a product before the experts."""

BATCHED_PRODUCT_FUNCTIONS = frozenset({"bmm", "grouped_mm", "_grouped_mm"})


class ExpertPoint(HookPoint):
    """A hook point whose firings in one pass are parts of one tensor, to be added up."""


_points: WeakKeyDictionary[nn.Module, ExpertPoint] = WeakKeyDictionary()


@dataclass
class Mixture:
    """One mixture of experts, and what is learnt of its routing while it runs.

    Attributes:
        path: of its bridge component.
        block: the Hugging Face module that routes and calls the experts.
        shape: batch and positions of the current input.
        chosen: the experts that each position was sent to, [batch * pos, slot].
        running: intercepts the operations of the experts that run.
    """

    path: str
    block: nn.Module
    shape: tuple[int, ...] = ()
    chosen: Tensor | None = None
    running: Any = None

    def parts(self) -> NamedModules:
        """Routers and experts inside the block, under their names there."""
        parts: dict[int, tuple[str, nn.Module]] = {}
        for name, module in self.block.named_modules():
            kind = type(module).__name__
            if module is not self.block and (
                ROUTER_CLASSES.search(kind) or EXPERT_CLASSES.search(kind)
            ):
                parts[id(module)] = (name.replace("._original_component", ""), module)
        return list(parts.values())

    def specs(self) -> Iterator[tuple[nn.Module, Operations]]:
        """Each module whose own code is intercepted, and which of its operations have a rule."""
        yield self.block, MIXTURE_SPEC
        for _, module in self.parts():
            yield (
                module,
                ROUTER_SPEC if ROUTER_CLASSES.search(type(module).__name__) else GATED_MLP_SPEC,
            )

    def batched_experts(self) -> nn.Module | None:
        """The module with all experts' weights, whose neurons get a hook point."""
        for _, module in self.parts():
            if hasattr(module, "down_proj") and EXPERT_CLASSES.search(type(module).__name__):
                return module
        return None


def mixtures(parts: NamedModules) -> list[Mixture]:
    """The mixtures of a bridge."""
    mixtures: list[Mixture] = []
    for path, module in parts:
        if not isinstance(module, MoEBridge):
            continue
        inner = original(module)
        if inner is None or module.bound_dense:
            continue
        mixture = Mixture(path, inner)
        if mixture.parts() and not EXPERT_CLASSES.search(type(inner).__name__):
            mixtures.append(mixture)
    bridged = {id(mixture.block) for mixture in mixtures}
    unbridged = ((path, m) for path, m in parts if id(m) not in bridged and _is_mixture(m))
    return mixtures + [Mixture(path, module) for path, module in unbridged]


def _is_mixture(module: nn.Module) -> bool:
    """Whether a module of transformers routes and calls experts; NemotronH's has no bridge."""
    if not type(module).__module__.startswith("transformers."):
        return False
    kinds = [type(child).__name__ for child in module.children()]
    routes = any(ROUTER_CLASSES.search(kind) for kind in kinds)
    return routes and any(EXPERT_CLASSES.search(kind) for kind in kinds)


def router_roles(
    parts: NamedModules, mixed: list[Mixture], operations_of: dict[int, Operations]
) -> dict[int, str]:
    """Linear layers that weigh experts: they keep the epsilon rule, whatever that of the others."""
    roles: dict[int, str] = {}
    for _, module in parts:
        if operations_of.get(id(module)) == ROUTER_SPEC:
            roles.update((id(inner), "router") for inner in module.modules())
            roles[id(module)] = ""
    for mixture in mixed:  # the weight of a shared expert: one number a position
        for inner in mixture.block.modules():
            if isinstance(inner, nn.Linear) and inner.out_features == 1:
                roles[id(inner)] = "router"
    return roles


def expert_points(parts: NamedModules) -> dict[str, nn.Module]:
    """Hook points at the neurons of experts: name -> hook point, the same ones at every call."""
    points: dict[str, nn.Module] = {}
    for mixture in mixtures(parts):
        experts = mixture.batched_experts()
        if experts is not None:
            points[f"{mixture.path}.hook_expert_post"] = _points.setdefault(experts, ExpertPoint())
    return points


class ExpertIntercept(OperationIntercept):
    """Intercepts the operations of batched experts, and shows their neurons to the hook point."""

    def __init__(self, *args: Any, mixture: Mixture, point: HookPoint | None) -> None:
        super().__init__(*args)
        self.mixture, self.point = mixture, point
        self.rows: Tensor | None = None  # of [batch * pos * slot], in the order they are computed
        mixture.running = self

    def intercept(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in BATCHED_PRODUCT_FUNCTIONS and isinstance(self.sites["linear"].rule, LinearRule):
            raise InputError(
                f"{self.mixture.path}: a {self.sites['linear'].rule.name} rule on experts needs "
                "them one by one; call model.original_model.set_experts_implementation('eager')"
            )
        neurons = name in PRODUCT_FUNCTIONS and _alike(*args[:2])
        out = super().intercept(func, name, args, kwargs)
        if name == "where" and len(args) == 1 and self.mixture.chosen is not None:
            slot, token = out
            self.rows = token * self.mixture.chosen.shape[-1] + slot
        elif name == "sort" and self.mixture.chosen is not None:
            self.rows = out[1]
        return self.shown(out) if neurons else out

    def shown(self, y: Tensor) -> Tensor:
        """Pass neurons [row, neuron] through the hook point, as [batch, pos, slot, neuron]."""
        chosen = self.mixture.chosen
        if self.point is None or not self.point._forward_hooks or chosen is None:
            return y
        rows = torch.arange(chosen.numel(), device=y.device) if self.rows is None else self.rows
        if y.ndim == 3:  # every expert sees every token, [expert, token, neuron]
            rows = rows.view(chosen.shape).T.flatten()
        flat = y.flatten(0, -2)
        if len(rows) != len(flat) or not y.requires_grad:
            return y
        spread = flat.new_zeros(chosen.numel(), y.shape[-1]).index_copy(0, rows, flat)
        shape = (*self.mixture.shape, chosen.shape[-1], y.shape[-1])
        shown: Tensor = self.point(spread.view(shape))
        return shown.reshape(chosen.numel(), y.shape[-1])[rows].view_as(y)


def _alike(a: Any = None, b: Any = None) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.ndim > 1


def gpt_oss_gate(mode: ExpertIntercept, experts: Any, gate_up: Tensor) -> Tensor:
    """``(up + 1) * glu`` with clipped factors: each clip and the glu are element-wise."""

    def glu(x: Tensor) -> Tensor:
        x = x.clamp(min=None, max=experts.limit)
        return x * torch.sigmoid(x * experts.alpha)

    def clipped(x: Tensor) -> Tensor:
        return x.clamp(min=-experts.limit, max=experts.limit)

    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    return (mode.activation(clipped, up, gate=False) + 1) * mode.activation(glu, gate)


EXPERT_GATES: dict[type[nn.Module], Any] = {GptOssExperts: gpt_oss_gate}
"""Experts whose gating is more than an activation times a projection."""


def attach_mixture(at: Attached, ctx: Context, _: str, __: nn.Module, mixture: Mixture) -> None:
    """Intercept the operations of one mixture: its own code, its routers, its experts."""

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        mixture.shape, mixture.chosen = tuple(x.shape[:-1]), None

    def routed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        chosen = next((v for v in tensors if not v.is_floating_point() and v.ndim == 2), None)
        if chosen is None and len(tensors) == 1 and mixture.path in ctx.experts:
            every = torch.arange(ctx.experts[mixture.path], device=tensors[0].device)
            chosen = every.expand(math.prod(mixture.shape), -1)
        if chosen is not None:
            mixture.chosen = chosen
            ctx.routing[mixture.path] = chosen.reshape(*mixture.shape, -1)

    at.pre_hook(mixture.block, begin, with_kwargs=True)
    attach_operations(at, ctx, mixture.path, mixture.block, MIXTURE_SPEC)
    neurons: Any = mixture.batched_experts()
    if neurons is not None:
        ctx.experts[mixture.path] = int(neurons.down_proj.shape[0])
    for name, module in mixture.parts():
        path = f"{mixture.path}.{name}"
        if ROUTER_CLASSES.search(type(module).__name__):
            attach_operations(at, ctx, path, module, ROUTER_SPEC)
            continue
        point = _points.setdefault(module, ExpertPoint()) if module is neurons else None
        attach_operations(
            at,
            ctx,
            path,
            module,
            GATED_MLP_SPEC,
            mode=ExpertIntercept,
            mixture=mixture,
            point=point,
        )
        at.pre_hook(module, routed, with_kwargs=True)
        gate = EXPERT_GATES.get(type(module))
        if gate is not None:
            at.attribute(
                module,
                "_apply_gate",
                lambda x, gate=gate, module=module: gate(mixture.running, module, x),
            )
