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
from lenslrp.hooks.norming import NormingIntercept, attach_norming
from lenslrp.hooks.operations import DIVISIONS, count_on_graph
from lenslrp.hooks.structure import NamedModules

SCALED_STREAMS_CLASSES = frozenset({"Gemma3nTextModel"})
"""Classes whose own code makes streams as large as another."""

MIXING_CLASSES = frozenset({"Gemma3nTextAltUp"})
"""Classes whose linear layers compute the weights that mix streams, and nothing else."""

POWERS = frozenset({"pow", "__pow__", "sqrt"})


class MagnitudeIntercept(NormingIntercept):
    """Intercepts the magnitudes of streams: constants, or plain operations under a plain norm."""

    def intercept(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in POWERS and args[0].requires_grad:
            return self.measured(func, *args) if self.plain else func(args[0].detach(), *args[1:])
        if name in DIVISIONS and isinstance(args[1], torch.Tensor) and args[0].requires_grad:
            y = self.measured(func, *args) if self.plain else func(*args)
            return y if self.plain else F.apply(F.Mark, y, self.norm)
        if self.plain and name in ("mul", "__mul__") and count_on_graph(args) == 2:
            return self.measured(func, *args)
        return super().intercept(func, name, args, kwargs)


def attach_magnitudes(at: Attached, ctx: Context, path: str, module: nn.Module) -> None:
    """Give the magnitudes that a model's own code computes the rule of a norm's denominator."""
    attach_norming(at, ctx, path, module, STREAMS_SPEC, MagnitudeIntercept)


def mixing_roles(parts: NamedModules) -> dict[int, str]:
    """The role of linear layers that compute the weights by which streams are mixed, by id."""
    mixing = [module for _, module in parts if type(module).__name__ in MIXING_CLASSES]
    return {id(part): "recurrence" for module in mixing for part in module.modules()}
