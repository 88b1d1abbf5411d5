"""Autograd Functions for what is read of a scan: its map from position to position, its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lenslrp.hooks.functions import same, set_site
from lenslrp.hooks.sites import Site


class Ones(torch.autograd.Function):
    """Ones in the shape of what is read, so that activation times gradient is the gradient.

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


class ScanReading(torch.autograd.Function):
    """At a scan's output: the gradient of the ones is the relevance that is read."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, ones: Tensor, relevance: Callable[[Tensor], Tensor], site: Site
    ) -> Tensor:
        set_site(ctx, site)
        ctx.relevance = relevance
        return same(y, site.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        with torch.no_grad():
            return g, ctx.relevance(g), None, None
