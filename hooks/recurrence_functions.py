"""Autograd Functions for the map of a recurrent scan: what went from which position to which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lenslrp.hooks.functions import same, set_site
from lenslrp.hooks.sites import Site


class MapOfOnes(torch.autograd.Function):
    """Ones [batch, head, query, key], so that activation times gradient is the gradient.

    They are on the graph above ``values``, which get nothing from them: a backward pass visits what
    leads to the leaves only.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, shape: tuple[int, ...], site: Site) -> Tensor:
        set_site(ctx, site)
        return values.new_ones(shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, None]:
        return None, None, None


class ScanMap(torch.autograd.Function):
    """At a scan's output: the gradient of the map of ones is the relevance that went each way."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, ones: Tensor, contributions: Callable[[Tensor], Tensor], site: Site
    ) -> Tensor:
        set_site(ctx, site)
        ctx.contributions = contributions
        return same(y, site.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        with torch.no_grad():
            return g, ctx.contributions(g), None, None
