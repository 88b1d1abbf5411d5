"""Modules whose own code divides by a norm, among their other operations.

The denominator of a norm is constant ([A] Achtibat et al., AttnLRP, ICML 2024, Prop. 3.4), or plain
where the rule says so. Which operations make it is up to the kind of module: gated norms
(:mod:`lenslrp.hooks.gated_norms`), residual streams of one magnitude
(:mod:`lenslrp.hooks.streams`), embeddings of length 1 (:mod:`lenslrp.hooks.similarity`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lenslrp.hooks import functions as F
from lenslrp.hooks.context import Context
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.operations import OperationIntercept, attach_operations, on_graph
from lenslrp.hooks.rule_types import Operations, Plain
from lenslrp.hooks.sites import Site


class NormingIntercept(OperationIntercept):
    """Intercepts a module whose own code divides by a norm beside its other operations.

    Args:
        norm: the site of the norm, whose denominator is constant ([A] Prop. 3.4) or plain.
    """

    def __init__(self, *args: Any, norm: Site) -> None:
        super().__init__(*args)
        self.norm, self.plain = norm, isinstance(norm.rule, Plain)

    def measured(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        """One operation with its plain gradient, under a plain rule."""
        inside = [F.apply(F.RegionInput, x, "plain", self.norm) if on_graph(x) else x for x in args]
        return F.apply(F.RegionOutput, func(*inside, **kwargs), None, "plain", self.norm)


def attach_norming(
    at: Attached,
    ctx: Context,
    path: str,
    module: nn.Module,
    spec: Operations,
    mode: type[NormingIntercept],
) -> None:
    """Attach the rules of a module's operations, and that of the norm among them."""
    site = ctx.site(path, module, "norm")
    at.sites.append(site)
    attach_operations(at, ctx, path, module, spec, mode=mode, norm=site)
