"""Hook points inside recurrent mixers, and which position's value went into which output.

TransformerLens has no hook points around most scans. Three are made here for each mixer:

* ``hook_scan_in``: the values that are scanned, [batch, pos, ...];
* ``hook_scan_out``: what the scan makes of them, before gate and norm, [batch, pos, ...];
* ``hook_scan_map``: [batch, head, query, key], relevance that went from the output at one position
  to the value at another. Rows sum to the relevance of ``hook_scan_out``, columns to that of
  ``hook_scan_in``, as those of an attention pattern do under CP-LRP. Mixers without heads have one.

The map is exact whatever the scan is: a scan is linear in its values, so what the value at position
s adds to every output is the scan of that value alone. That is a scan for each position, so the map
is computed only where it is asked for by name, and after the forward pass, which stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lenslrp.hooks import functions as F
from lenslrp.hooks.recurrence_functions import MapOfOnes, ScanMap
from lenslrp.hooks.sites import Site
from lenslrp.hooks.structure import NamedModules


@dataclass(eq=False)
class ScanPoints:
    """The hook points of one mixer."""

    values: HookPoint = field(default_factory=HookPoint)
    out: HookPoint = field(default_factory=HookPoint)
    map: HookPoint = field(default_factory=HookPoint)


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
    return points


def shown(point: HookPoint, x: Tensor, axis: int = 1) -> Tensor:
    """``x`` as it leaves a hook point, which sees the positions (``axis``) as the second axis."""
    if not point._forward_hooks or not x.requires_grad:
        return x
    seen: Tensor = point(x.movedim(axis, 1))
    return seen.movedim(1, axis)


def mapped(
    point: HookPoint,
    y: Tensor,
    x: Tensor,
    values: Tensor,
    scan: Callable[[Tensor], Tensor],
    site: Site,
    axis: int = 1,
) -> Tensor:
    """The output of a scan, whose backward pass also gives the map, where somebody reads it.

    Args:
        x: what is scanned, outside any region.
        values: the same as the scan is given it.
        scan: the scan of other values by the same operator.
    """
    if not point._forward_hooks or not y.requires_grad:
        return y
    values, length = values.detach(), values.shape[axis]

    def contributions(g: Tensor) -> Tensor:
        columns = []
        for s in range(length):
            alone = torch.zeros_like(values)
            alone.narrow(axis, s, 1).copy_(values.narrow(axis, s, 1))
            columns.append(by_head(scan(alone) * g, axis))
        return torch.stack(columns, dim=-1)

    shape = (*by_head(y.detach(), axis).shape, length)
    ones = F.apply(MapOfOnes, x, shape, site)
    return F.apply(ScanMap, y, point(ones), contributions, site)


def by_head(x: Tensor, axis: int) -> Tensor:
    """[batch, pos, (head,) channel], positions at ``axis``, to its sums [batch, head, pos]."""
    x = x.movedim(axis, 1)
    return x.sum(-1)[:, None] if x.ndim == 3 else x.sum(-1).transpose(1, 2)
