"""Norms that multiply by a gate before or after they divide, as those behind a recurrent scan do.

A gated norm is a normalisation, whose denominator is constant ([A] Achtibat et al., AttnLRP, ICML
2024, Prop. 3.4), and a product of two factors, with the rule of ``recurrence_gate``. Its operations
are intercepted one by one (:mod:`lenslrp.hooks.operations`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lenslrp.hooks import functions as F
from lenslrp.hooks.context import Context
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.norming import NormingIntercept, attach_norming
from lenslrp.hooks.operations import PRODUCT_FUNCTIONS
from lenslrp.hooks.rule_types import Operations, product_shares
from lenslrp.hooks.sites import Site


class GatedNormIntercept(NormingIntercept):
    """Intercepts a norm that multiplies by a gate before or after it divides."""

    def __init__(self, *args: Any, norm: Site) -> None:
        super().__init__(*args, norm=norm)
        self.squaring = False
        self.scale: Tensor | None = None
        self.sites["activation"].cut = product_shares(self.sites["recurrence_gate"].rule)[0] == 0

    def intercept(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "pow" and args[0].requires_grad:
            self.squaring = True
            x = F.apply(F.RegionInput, args[0], "plain", self.norm) if self.plain else args[0]
            return func(x, *args[1:], **kwargs)
        if name == "rsqrt" and self.squaring:
            self.squaring = False
            scale = func(*args, **kwargs)
            if self.plain:
                self.scale = F.apply(F.RegionOutput, scale, None, "plain", self.norm)
            else:
                self.scale = scale.detach()  # constant ([A] Prop. 3.4)
            return self.scale
        if name in PRODUCT_FUNCTIONS and any(x is self.scale for x in args[:2]):
            y = func(*args, **kwargs)
            if self.plain:
                return F.apply(F.ProductOutput, y, 1.0, 1.0, self.norm)
            return F.apply(F.Mark, y, self.norm)
        return (
            func(*args, **kwargs) if self.squaring else super().intercept(func, name, args, kwargs)
        )


def is_gated_norm(module: nn.Module) -> bool:
    """Whether a module normalises and gates, as those behind a scan do."""
    cls = type(module)
    return cls.__module__.startswith("transformers.") and cls.__name__.endswith("RMSNormGated")


def attach_gated_norm(at: Attached, ctx: Context, path: str, module: nn.Module) -> None:
    """A norm with a gate: a normalisation and a product of two factors."""
    spec = Operations("recurrence_gate", leaks=(), attention=False)
    attach_norming(at, ctx, path, module, spec, GatedNormIntercept)
