"""Several residual streams: how Gemma 3n makes one stream as large as another.

Hyper-connections (DeepSeek V4) and AltUp (Gemma 3n) carry several streams from layer to layer, and
mix them by weights that they compute from the streams. Given the weights the mix is linear in the
streams, as a recurrent scan is in its values, and the product has the same role, ``recurrence``;
:mod:`lenslrp.hooks.operations` intercepts it.

Gemma 3n makes its streams of one embedding, and one of them in the end, by linear layers; each
result is divided by its root mean square and multiplied by that of the active stream. Both are
magnitudes, and constants as the denominator of a norm is ([A] Achtibat et al., AttnLRP, ICML 2024,
Prop. 3.4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lenslrp.hooks import functions as F
from lenslrp.hooks.context import Context
from lenslrp.hooks.declared import STREAMS_SPEC
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.operations import DIVISIONS, OperationIntercept, attach_operations
from lenslrp.hooks.rule_types import Plain
from lenslrp.hooks.sites import Site
from lenslrp.hooks.structure import NamedModules

SCALED_STREAMS_CLASSES = frozenset({"Gemma3nTextModel"})
"""Classes whose own code makes streams as large as another."""

MIXING_CLASSES = frozenset({"Gemma3nTextAltUp"})
"""Classes whose linear layers compute the weights that mix streams, and nothing else."""

POWERS = frozenset({"pow", "__pow__", "sqrt"})


class MagnitudeIntercept(OperationIntercept):
    """Intercepts the magnitudes of streams: constants, or plain operations under a plain norm.

    Args:
        norm: the site of the magnitudes.
    """

    def __init__(self, *args: Any, norm: Site) -> None:
        super().__init__(*args)
        self.norm, self.plain = norm, isinstance(norm.rule, Plain)

    def intercept(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in POWERS and args[0].requires_grad:
            return self.measured(func, *args) if self.plain else func(args[0].detach(), *args[1:])
        if name in DIVISIONS and isinstance(args[1], torch.Tensor) and args[0].requires_grad:
            y = self.measured(func, *args) if self.plain else func(*args)
            return y if self.plain else F.apply(F.Mark, y, self.norm)
        if self.plain and name in ("mul", "__mul__") and _both_on_graph(*args):
            return self.measured(func, *args)
        return super().intercept(func, name, args, kwargs)

    def measured(self, func: Any, *args: Any) -> torch.Tensor:
        """One operation with its plain gradient."""
        inside = [
            F.apply(F.RegionInput, x, "plain", self.norm)
            if isinstance(x, torch.Tensor) and x.requires_grad
            else x
            for x in args
        ]
        return F.apply(F.RegionOutput, func(*inside), None, "plain", self.norm)


def _both_on_graph(*args: Any) -> bool:
    return all(isinstance(x, torch.Tensor) and x.requires_grad for x in args)


def attach_magnitudes(at: Attached, ctx: Context, path: str, module: nn.Module) -> None:
    """Give the magnitudes that a model's own code computes the rule of a norm's denominator."""
    site = ctx.site(path, module, "norm")
    at.sites.append(site)
    attach_operations(at, ctx, path, module, STREAMS_SPEC, mode=MagnitudeIntercept, norm=site)


def mixing_roles(parts: NamedModules) -> dict[int, str]:
    """The role of linear layers that compute the weights by which streams are mixed, by id."""
    mixing = [module for _, module in parts if type(module).__name__ in MIXING_CLASSES]
    return {id(part): "recurrence" for module in mixing for part in module.modules()}
