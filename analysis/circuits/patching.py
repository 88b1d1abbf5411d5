"""Exact activation patching: one forward pass a node (Meng et al. 2022; Zhang and Nanda 2024).

A node of the base run is set to what it is in the other run, everything after it is recomputed, and
the change of the gap is its effect. Blocks below the node are not run again, and a node that is the
same in both runs is not run at all: its effect is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lenslrp.analysis.circuits.nodes import Node, below, gaps, patched, read
from lenslrp.analysis.circuits.pairs import Pairs
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.batch import Batch

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def exact_effects(
    model: TransformerBridge,
    base: Batch,
    other: Batch,
    pairs: Pairs,
    hooks: Mapping[str, str],
    *,
    by_position: bool,
    only: Sequence[Node] | None,
    passes: PassCount,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Values of the base and the other run, and the effect of every node, NaN where not asked for.

    Args:
        base, other: what the two runs read.
        hooks: hook point -> component.
        only: the nodes to patch; all if not given.
        passes: counts forward passes of one pair.
    """
    outputs: dict[int, Any] = {}
    base_value, there = read(model, base, pairs, hooks, record=outputs)
    other_value, given = read(model, other, pairs, hooks)
    passes.forward += 2 * len(pairs)
    effects = {}
    for hook, component in hooks.items():
        delta = given[hook] - there[hook]
        differs = (delta.abs().amax(dim=3) > 0) & pairs.mask[..., None].to(delta.device)
        length, units = delta.shape[1:3]
        shape = (len(pairs), length, units) if by_position else (len(pairs), units)
        found = base_value.new_full(shape, float("nan"))
        positions = range(length) if by_position else (None,)
        nodes = [Node(hook, unit, position) for unit in range(units) for position in positions]
        if only is not None:
            nodes = [n for n in only if n.hook == hook and (n.position is not None) == by_position]
        replay = below(outputs, hook)
        for node in nodes:
            effect = torch.zeros_like(base_value)
            if differs[node.place(pairs)].any():
                edit = patched(node, component, given[hook], pairs)
                effect = gaps(model, base, pairs, edits=[edit], replay=replay) - base_value
                passes.forward += len(pairs)
            if node.position is None:
                found[:, node.unit] = effect
            else:
                pairs.put(found[..., node.unit], node.position, effect)
        effects[hook] = found
    return base_value, other_value, effects
