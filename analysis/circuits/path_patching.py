"""Exact path patching along single edges (Wang et al. 2022; Goldowsky-Dill et al. 2023).

For each upstream node one forward pass, in which that node is as in the other run while every other
node is held at its base value, tells what each downstream node would become; for each downstream
node one more, in which it is set to that and everything after it is recomputed, tells the effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lenslrp.analysis.circuits.nodes import (
    COMPONENTS,
    TARGET,
    Kind,
    Node,
    as_units,
    below,
    gaps,
    patched,
    read,
)
from lenslrp.analysis.circuits.pairs import Pairs
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.batch import Batch
from lenslrp.edits import Edit
from lenslrp.hooks.structure import layer_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def exact_edges(
    model: TransformerBridge,
    base: Batch,
    other: Batch,
    pairs: Pairs,
    hooks: Mapping[str, str],
    edges: Mapping[Node, Sequence[Node]],
    passes: PassCount,
) -> tuple[Tensor, Tensor, dict[tuple[Node, Node], Tensor]]:
    """Values of the base and the other run, and the effect of every edge, [pair].

    Args:
        base, other: what the two runs read.
        hooks: hook point -> component: the nodes that are held.
        edges: upstream node -> downstream nodes.
        passes: counts forward passes of one pair.
    """
    outputs: dict[int, Any] = {}
    base_value, here = read(model, base, pairs, hooks, record=outputs)
    other_value, there = read(model, other, pairs, hooks)
    passes.forward += 2 * len(pairs)
    effects = {}
    for up, downs in edges.items():
        at = up.place(pairs)
        if torch.equal(there[up.hook][at], here[up.hook][at]):
            effects.update({(up, down): torch.zeros_like(base_value) for down in downs})
            continue
        found: dict[str, Tensor] = {}
        replay = below(outputs, up.hook)
        holds = [
            Edit(name, function=partial(_hold, name=name, kind=COMPONENTS[component].kind,
                                        here=here, up=up, at=at, there=there, to=found))
            for name, component in hooks.items()
            if layer_of(name) not in replay
        ]  # fmt: skip
        direct = gaps(model, base, pairs, edits=holds, replay=replay)
        passes.forward += len(pairs)
        for down in downs:
            if down == TARGET:
                effects[up, down] = direct - base_value
                continue
            # Hook points of blocks that were replayed lie before the upstream node.
            became = found.get(down.hook, here[down.hook])
            place = down.place(pairs)
            if torch.equal(became[place], here[down.hook][place]):
                effects[up, down] = torch.zeros_like(base_value)
                continue
            edit = patched(down, hooks[down.hook], became, pairs)
            value = gaps(model, base, pairs, edits=[edit], replay=below(outputs, down.hook))
            effects[up, down] = value - base_value
            passes.forward += len(pairs)
    return base_value, other_value, effects


def _hold(
    x: Tensor,
    *,
    name: str,
    kind: Kind,
    here: Mapping[str, Tensor],
    up: Node,
    at: tuple[Any, ...],
    there: Mapping[str, Tensor],
    to: dict[str, Tensor],
) -> Tensor:
    """Take down what a hook point would become, and go on with its base values."""
    to[name] = as_units(kind, x, name).clone()
    held = x.clone()
    units = as_units(kind, held, name)
    units.copy_(here[name])
    if name == up.hook:
        units[at] = there[name][at]
    return held
