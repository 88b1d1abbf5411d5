"""Hook points inside recurrent mixers: values, output, state, and which position fed which.

TransformerLens has no hook points around most scans. Four are made here for each mixer:

* ``hook_scan_in``: the values that are scanned, [batch, pos, ...];
* ``hook_scan_out``: what the scan makes of them, before gate and norm, [batch, pos, ...];
* ``hook_scan_map``: [batch, head, query, key], relevance that went from the output at one position
  to the value at another. Rows sum to the relevance of ``hook_scan_out``, columns to that of
  ``hook_scan_in``, as those of an attention pattern do under CP-LRP. Mixers without heads have one;
* ``hook_scan_state``: [batch, pos, head], relevance that the state carries from a position to the
  next: the sum of the map's entries from later queries to this and earlier keys.

The first two are called in every pass in which somebody reads or edits them, with rules attached or
without (:mod:`lenslrp.hooks.shown_scans`). The others are read in a backward pass, only where they
are asked for by name, and the forward pass stays as it is. They are exact whatever the scan is,
because a scan is linear in its values:

* what the value at position s adds to every output is the scan of that value alone, so the map
  takes a scan for each position;
* relevance that enters the state at a position (of its value) and does not leave it there (by its
  output) is carried on. What a value gives to the output of its own position is in both and cancels
  out. So the state's relevance is a running sum of the one less the other, at the price of a single
  scan and its backward pass. It is what state times gradient, summed over the state's dimensions,
  would be, for the gradient that comes from later outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lenslrp.hooks import functions as F
from lenslrp.hooks.recurrence_functions import Ones, ScanReading
from lenslrp.hooks.sites import Site, widened
from lenslrp.hooks.structure import NamedModules


@dataclass(eq=False)
class ScanPoints:
    """The hook points of one mixer.

    Attributes:
        shown: its scan is handed on to this file's points in every pass.
        ruled: what computes the scan while relevance rules are attached.
    """

    values: HookPoint = field(default_factory=HookPoint)
    out: HookPoint = field(default_factory=HookPoint)
    map: HookPoint = field(default_factory=HookPoint)
    state: HookPoint = field(default_factory=HookPoint)
    shown: bool = False
    ruled: Callable[..., Any] | None = None


_points: WeakKeyDictionary[nn.Module, ScanPoints] = WeakKeyDictionary()


def points_of(mixer: nn.Module) -> ScanPoints:
    """The hook points of a mixer, the same ones at every call."""
    return _points.setdefault(mixer, ScanPoints())


def scan_points(mixers: NamedModules) -> dict[str, nn.Module]:
    """Hook points inside mixers: name -> hook point."""
    points: dict[str, nn.Module] = {}
    for path, mixer in mixers:
        own = points_of(mixer)
        points[f"{path}.hook_scan_in"] = own.values
        points[f"{path}.hook_scan_out"] = own.out
        points[f"{path}.hook_scan_map"] = own.map
        points[f"{path}.hook_scan_state"] = own.state
    return points


def shown(point: HookPoint, x: Tensor, axis: int = 1) -> Tensor:
    """``x`` as it leaves a hook point, which sees the positions (``axis``) as the second axis."""
    if not point._forward_hooks:
        return x
    seen: Tensor = point(x.movedim(axis, 1))
    return seen.movedim(1, axis)


def measured(
    points: ScanPoints,
    y: Tensor,
    x: Tensor,
    values: Tensor,
    scan: Callable[[Tensor], Tensor],
    site: Site,
    axis: int = 1,
) -> Tensor:
    """The output of a scan, whose backward pass also gives map and state, where somebody reads it.

    Args:
        x: what is scanned, outside any region.
        values: the same as the scan is given it.
        scan: the scan of other values by the same operator.
    """
    if not y.requires_grad:
        return y
    batch, heads, length = by_head(y.detach(), axis).shape
    readings: tuple[tuple[HookPoint, tuple[int, ...], Callable[..., Tensor]], ...] = (
        (points.map, (batch, heads, length, length), contributions),
        (points.state, (batch, length, heads), carried),
    )
    for point, shape, relevance in readings:
        if point._forward_hooks:
            ones = point(F.apply(Ones, x, shape, site))
            given = partial(relevance, scan, values.detach(), axis)
            y = F.apply(ScanReading, y, ones, given, site)
    return y


def contributions(scan: Callable[[Tensor], Tensor], values: Tensor, axis: int, g: Tensor) -> Tensor:
    """Relevance [batch, head, query, key], of the gradient ``g`` at the output."""
    columns = []
    for s in range(values.shape[axis]):
        alone = torch.zeros_like(values)
        alone.narrow(axis, s, 1).copy_(values.narrow(axis, s, 1))
        columns.append(by_head(scan(alone) * g, axis))
    return torch.stack(columns, dim=-1)


def carried(scan: Callable[[Tensor], Tensor], values: Tensor, axis: int, g: Tensor) -> Tensor:
    """Relevance [batch, pos, head] that goes from each position to the next in the state."""
    with torch.enable_grad():
        leaf = values.detach().requires_grad_()
        y = scan(leaf)
        (back,) = torch.autograd.grad(y, leaf, g.to(y))
    taken_up, read_out = (by_head(widened(a) * b, axis) for a, b in ((values, back), (y, g)))
    return (taken_up - read_out).cumsum(dim=-1).transpose(1, 2)


def by_head(x: Tensor, axis: int) -> Tensor:
    """[batch, pos, (head,) channel], positions at ``axis``, to its sums [batch, head, pos]."""
    x = x.movedim(axis, 1)
    return x.sum(-1)[:, None] if x.ndim == 3 else x.sum(-1).transpose(1, 2)
