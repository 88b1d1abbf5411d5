"""Weights whose products have a rule other than epsilon: a graph that reaches them has a gap."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from transformer_lens.model_bridge.generalized_components import AttentionBridge

from lenslrp.errors import InputError
from lenslrp.hooks.components import LINEAR_CLASSES
from lenslrp.hooks.composites import Composite
from lenslrp.hooks.convolution import CONVOLUTION_CLASSES
from lenslrp.hooks.declared import ROUTER_SPEC
from lenslrp.hooks.linear_rules import LinearRule
from lenslrp.hooks.packed import is_packed_linear
from lenslrp.hooks.rule_types import Operations
from lenslrp.hooks.sharding import is_sharded
from lenslrp.hooks.sites import has_values
from lenslrp.hooks.structure import NamedModules, original


def ruled_weights(
    parts: NamedModules,
    composite: Composite,
    roles: dict[int, str],
    operations_of: dict[int, Operations],
) -> dict[int, str]:
    """Addresses of weights whose products have a rule other than epsilon, and where they are.

    Batched experts, say, keep theirs as parameters of their own, one matrix after another.
    """
    addresses: dict[int, str] = {}
    if not any(isinstance(rule, LinearRule) for rule in composite.rules.values()):
        return addresses
    ruled: dict[str, bool] = {}
    attended = attended_parts(parts)
    for path, module in parts:
        layer: Any = module
        # A parametrised weight is a new tensor at every call.
        if isinstance(module, nn.Embedding) or parametrize.is_parametrized(module):
            continue
        if is_packed_linear(module):
            continue  # no operation on the graph reads it
        if isinstance(module, LINEAR_CLASSES):
            role, matrices = roles.get(id(module), linear_role(module)), [layer.weight]
        elif operations_of.get(id(module)) == ROUTER_SPEC:
            continue
        else:
            role = "projection" if id(module) in attended else "linear"
            weights = [w for w in module._parameters.values() if w is not None]
            matrices = [m for w in weights if w.ndim in (2, 3) for m in (w if w.ndim == 3 else [w])]
        if role not in ruled:  # a check of a protocol is slow, and roles are few
            ruled[role] = bool(role) and isinstance(composite[role], LinearRule)
        if ruled[role]:
            if any(is_sharded(m) for m in matrices):
                raise InputError(
                    f"{path}: {composite[role].name} reads its weight, which FSDP gathers for the "
                    f"pass only: use epsilon for its role ({role!r}), or load the model whole"
                )
            held = [m for m in matrices if m.numel() and has_values(m)]  # others have no address
            addresses.update((m.data_ptr(), path) for m in held)
    return addresses


def attended_parts(parts: NamedModules) -> set[int]:
    """What lies inside attention that has a bridge."""
    attentions = [original(m) for _, m in parts if isinstance(m, AttentionBridge)]
    return {id(part) for module in attentions if module is not None for part in module.modules()}


def linear_role(module: nn.Module) -> str:
    """The role of a linear layer that has no other."""
    return "convolution" if isinstance(module, CONVOLUTION_CLASSES) else "linear"
