"""Exact path patching along single edges (Wang et al. 2022; Goldowsky-Dill et al. 2023).

For each upstream node one forward pass, in which that node is as in the other run while every other
node is held at its base value, tells what each downstream node would become; for each downstream
node one more, in which it is set to that and everything after it is recomputed, tells the effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lenslrp.analysis.nodes import (
    COMPONENTS,
    TARGET,
    Node,
    as_units,
    forward,
    read,
    recorded,
    replayed,
)
from lenslrp.analysis.pairs import Pairs
from lenslrp.analysis.patching import put
from lenslrp.analysis.question import Passes
from lenslrp.hooks.components import layer_of


def exact_edges(
    model: Any,
    base: Tensor,
    other: Tensor,
    pairs: Pairs,
    hooks: Mapping[str, str],
    edges: Mapping[Node, Sequence[Node]],
    passes: Passes,
) -> tuple[Tensor, Tensor, dict[tuple[Node, Node], Tensor]]:
    """Values of the base and the other run, and the effect of every edge, [pair].

    Args:
        base, other: [pair, pos] tokens of the two runs.
        hooks: hook point -> component: the nodes that are held.
        edges: upstream node -> downstream nodes.
        passes: counts forward passes of one pair.
    """
    outputs: dict[int, Any] = {}
    with recorded(model, outputs):
        base_value, here = read(model, base, pairs, hooks)
    other_value, there = read(model, other, pairs, hooks)
    passes.forward += 2 * len(pairs)
    effects = {}
    for up, downs in edges.items():
        at = (*pairs.batch.place(up.position), up.unit)
        delta = (there[up.hook] - here[up.hook])[at]
        if not bool(delta.any()):
            effects.update({(up, down): torch.zeros_like(base_value) for down in downs})
            continue
        found: dict[str, Tensor] = {}
        holds = [
            (
                name,
                partial(
                    _hold, name=name, hooks=hooks, here=here, up=up, at=at, there=there, to=found
                ),
            )
            for name in hooks
        ]
        with replayed(model, outputs, layer_of(up.hook) or 0), model.hooks(fwd_hooks=holds):
            direct = forward(model, base, pairs)
        passes.forward += len(pairs)
        for down in downs:
            if down == TARGET:
                effects[up, down] = direct - base_value
                continue
            # Hook points of blocks that were replayed lie before the upstream node.
            became = found.get(down.hook, here[down.hook])
            place = (*pairs.batch.place(down.position), down.unit)
            if torch.equal(became[place], here[down.hook][place]):
                effects[up, down] = torch.zeros_like(base_value)
                continue
            kind = COMPONENTS[hooks[down.hook]].kind
            set_it = partial(put, units=became, kind=kind, node=down, pairs=pairs)
            layer = layer_of(down.hook) or 0
            with replayed(model, outputs, layer), model.hooks(fwd_hooks=[(down.hook, set_it)]):
                effects[up, down] = forward(model, base, pairs) - base_value
            passes.forward += len(pairs)
    return base_value, other_value, effects


def _hold(
    x: Tensor,
    hook: Any,
    *,
    name: str,
    hooks: Mapping[str, str],
    here: Mapping[str, Tensor],
    up: Node,
    at: tuple[Any, ...],
    there: Mapping[str, Tensor],
    to: dict[str, Tensor],
) -> Tensor:
    """Take down what a hook point would become, and go on with its base values."""
    kind = COMPONENTS[hooks[name]].kind
    to[name] = as_units(kind, x, name).clone()
    held = x.clone()
    units = as_units(kind, held, name)
    units.copy_(here[name])
    if name == up.hook:
        units[at] = there[name][at]
    return held
