"""Exact activation patching: one forward pass a node (Meng et al. 2022; Zhang and Nanda 2024).

A node of the base run is set to what it is in the other run, everything after it is recomputed, and
the change of the gap is its effect. Blocks below the node are not run again, and a node that is the
same in both runs is not run at all: its effect is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lenslrp.analysis.nodes import (
    COMPONENTS,
    Node,
    Units,
    as_units,
    forward,
    read,
    recorded,
    replayed,
)
from lenslrp.analysis.pairs import Pairs
from lenslrp.analysis.question import Passes
from lenslrp.hooks.components import layer_of


def exact_effects(
    model: Any,
    base: Tensor,
    other: Tensor,
    pairs: Pairs,
    hooks: Mapping[str, str],
    *,
    by_position: bool,
    only: Sequence[Node] | None,
    passes: Passes,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Values of the base and the other run, and the effect of every node, NaN where not asked for.

    Args:
        base, other: [pair, pos] tokens of the two runs.
        hooks: hook point -> component.
        only: the nodes to patch; all if not given.
        passes: counts forward passes of one pair.
    """
    outputs: dict[int, Any] = {}
    with recorded(model, outputs):
        base_value, there = read(model, base, pairs, hooks)
    other_value, given = read(model, other, pairs, hooks)
    passes.forward += 2 * len(pairs)
    wanted = None if only is None else set(only)
    effects = {}
    for hook, component in hooks.items():
        delta = given[hook] - there[hook]
        differs = (delta.abs().amax(dim=3) > 0) & pairs.mask[..., None].to(delta.device)
        moved = differs.any(dim=0)  # [pos, unit]
        length, units = moved.shape
        shape = (len(pairs), length, units) if by_position else (len(pairs), units)
        found = base_value.new_full(shape, float("nan"))
        layer = layer_of(hook) or 0
        with replayed(model, outputs, layer):
            for unit in range(units):
                for position in range(length) if by_position else (None,):
                    if wanted is not None and Node(hook, unit, position) not in wanted:
                        continue
                    at = (slice(None), unit) if position is None else (slice(None), position, unit)
                    if not moved[position if position is not None else slice(None), unit].any():
                        found[at] = 0.0
                        continue
                    kind = COMPONENTS[component].kind
                    set_it = partial(
                        put, units=given[hook], kind=kind, unit=unit, position=position
                    )
                    with model.hooks(fwd_hooks=[(hook, set_it)]):
                        patched = forward(model, base, pairs)
                    passes.forward += len(pairs)
                    found[at] = patched - base_value
        effects[hook] = found
    return base_value, other_value, effects


def put(x: Tensor, hook: Any, units: Units, kind: Any, unit: int, position: int | None) -> Tensor:
    """``x`` with one node as it is in the other run."""
    patched = x.clone()
    where = slice(None) if position is None else position
    as_units(kind, patched, str(hook.name))[:, where, unit] = units[:, where, unit]
    return torch.as_tensor(patched)
