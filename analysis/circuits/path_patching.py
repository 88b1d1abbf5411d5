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

from lenslrp.analysis.circuits.measured_pairs import batch_of, metric_values
from lenslrp.analysis.circuits.nodes import (
    COMPONENTS,
    TARGET,
    Kind,
    Node,
    Runs,
    as_units,
    outputs_before,
    patched,
)
from lenslrp.edits import Edit
from lenslrp.hooks.structure import layer_of
from lenslrp.progress import progress_bar


def exact_edges(
    runs: Runs, edges: Mapping[Node, Sequence[Node]]
) -> tuple[Tensor, Tensor, dict[tuple[Node, Node], Tensor]]:
    """What is measured of the base and the other run, and the effect of every edge, [pair].

    Args:
        runs: the two runs; all nodes at their hook points are held.
        edges: upstream node -> downstream nodes.
    """
    model, pairs, hooks, passes = runs.model, runs.pairs, runs.hooks, runs.passes
    outputs: dict[int, Any] = {}
    base, base_units = runs.read(record=outputs)
    other, read = runs.read_other()
    other_units = {hook: runs.exchanged(x, base_units[hook]) for hook, x in read.items()}
    batch = batch_of(model, runs.base, pairs)
    effects = {}
    for up, downs in progress_bar("nodes that edges start from", edges.items()):
        at = up.place(pairs)
        if torch.equal(other_units[up.hook][at], base_units[up.hook][at]):
            effects.update({(up, down): torch.zeros_like(base) for down in downs})
            continue
        become: dict[str, Tensor] = {}
        replay = outputs_before(outputs, up.hook)
        holds = [
            Edit(name, function=partial(_hold, name=name, kind=COMPONENTS[component].kind, up=up,
                                        at=at, base=base_units, other=other_units, become=become))
            for name, component in hooks.items()
            if layer_of(name) not in replay
        ]  # fmt: skip
        direct = metric_values(model, batch, pairs, edits=holds, replay=replay)
        passes.forward += len(pairs)
        for down in downs:
            if down == TARGET:
                effects[up, down] = direct - base
                continue
            # Hook points of blocks that were replayed lie before the upstream node.
            units = become.get(down.hook, base_units[down.hook])
            place = down.place(pairs)
            if torch.equal(units[place], base_units[down.hook][place]):
                effects[up, down] = torch.zeros_like(base)
                continue
            edit = patched(down, hooks[down.hook], units, pairs)
            replay_down = outputs_before(outputs, down.hook)
            value = metric_values(model, batch, pairs, edits=[edit], replay=replay_down)
            effects[up, down] = value - base
            passes.forward += len(pairs)
    return base, other, effects


def _hold(
    x: Tensor,
    *,
    name: str,
    kind: Kind,
    up: Node,
    at: tuple[Any, ...],
    base: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    become: dict[str, Tensor],
) -> Tensor:
    """Record what a hook point would become, and go on with its base values."""
    become[name] = as_units(kind, x, name).clone()
    held = x.clone(memory_format=torch.contiguous_format)  # so that its units are a view
    units = as_units(kind, held, name)
    units.copy_(base[name])
    if name == up.hook:
        units[at] = other[name][at]
    return held
