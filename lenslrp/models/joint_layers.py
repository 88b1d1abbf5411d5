"""Splits joint projections that have no plain weight by rows of their output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformer_lens.model_bridge.generalized_components import (
    JointGateUpMLPBridge,
    JointQKVAttentionBridge,
)

from lenslrp.hooks.joint import rows_of, splits, stand_in
from lenslrp.hooks.structure import original

Split = Callable[[Any], tuple[nn.Module, ...]]


def split_by_rows(adapter: Any) -> None:
    """Change how an adapter's templates split joint projections, before blocks are made of them."""
    for template in _templates(adapter.component_mapping or {}):
        if isinstance(template, JointGateUpMLPBridge):
            template.split_gate_up_matrix = by_rows(
                template.split_gate_up_matrix, template.fused_attr
            )
        elif isinstance(template, JointQKVAttentionBridge) and "qkv" in template.submodules:
            name = str(template.submodules["qkv"].name)
            template.split_qkv_matrix = by_rows(template.split_qkv_matrix, name)


def by_rows(split: Split, name: str) -> Split:
    """The same split, of the layer's output where there is no weight to split."""

    def parts(owner: Any) -> tuple[nn.Module, ...]:
        component = owner._modules.get(name)
        joint = component if original(component) is None else original(component)
        if joint is None or splits(joint):
            return split(owner)
        owner._modules[name] = stand_in(joint)
        try:
            return rows_of(split(owner), joint)
        finally:
            owner._modules[name] = component

    return parts


def _templates(components: dict[str, Any]) -> Iterator[Any]:
    for component in components.values():
        yield component
        yield from _templates(getattr(component, "submodules", None) or {})
