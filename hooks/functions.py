"""The rules as autograd Functions: same values forward, the rule's own gradient backward.

Each Function's node in the autograd graph carries its :class:`~lenslrp.hooks.sites.Site` and says
what it covers, so that :mod:`lenslrp.hooks.graph_walk` can check the graph: ``opens`` names the
operation that must follow below it, ``region`` is +1 where a region begins whose inside the rule
answers for as a whole, and -1 where it ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import SiLUActivation

from lenslrp.hooks.linear_rules import LinearRule
from lenslrp.hooks.rule_types import Identity, Normalisation, Plain, SiLU
from lenslrp.hooks.rules import inverse_rms, layer_norm_identity
from lenslrp.hooks.sites import Site, row_sums, widened

EMPTY = torch.empty(0)

SILU_FORWARDS = (nn.SiLU.forward, SiLUActivation.forward, functional.silu)


def apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """``function.apply(*args)``, typed."""
    result: Tensor = function.apply(*args)
    return result


def same(x: Tensor, copies: bool) -> Tensor:
    """The values of ``x``, apart from the graph; in memory of their own where something writes to
    it in place."""
    return x.detach().clone() if copies else x.detach()


def kept_input(x: Tensor, site: Site) -> Tensor:
    """An input as the backward pass needs it: as it is now."""
    return same(x, True) if site.copies else x


def set_site(ctx: Any, site: Site, opens: tuple[str, ...] = (), region: int = 0) -> None:
    """Give a node its site and what it covers, and count that the rule has fired."""
    ctx.site = site
    ctx.opens = opens
    ctx.region = region
    site.forward += 1
    site.order = ctx._sequence_nr()


class Elementwise(torch.autograd.Function):
    """``y = f(x)`` element by element (an activation, or a bias-free norm): g * factor(x, y).

    ``y`` comes from the wrapped module, which was given a detached x, so that its inside is not on
    the graph. Where the rule has a stabiliser, what it takes is saved as well; SiLU's factor is
    computed from x, which others may have saved too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, rule: Identity, site: Site) -> Tensor:
        set_site(ctx, site)
        ctx.rule, ctx.reports_loss = rule, site.accounts is not None and not rule.exact
        saved = kept_input(x, site) if isinstance(rule, SiLU) else rule.factor(x, y)
        # Two tensors in any case: torch's checkpoint tells by their number that it has recomputed
        # the function without its rule.
        ctx.save_for_backward(saved, y - x * saved if ctx.reports_loss else EMPTY)
        return same(y, site.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.site.backward += 1
        factor, lost = ctx.saved_tensors
        if isinstance(ctx.rule, SiLU):
            factor = ctx.rule.factor(factor, factor)
        if ctx.reports_loss:
            ctx.site.report("stabiliser", row_sums(lost, g))
        return g * factor, None, None, None


class Norm(torch.autograd.Function):
    """A norm with its denominator constant; saves only the inverse of that, [..., 1].

    ``x`` less its mean if ``centred``, else as it is, over its root mean square.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, gain: Tensor | None, eps: float, centred: bool, site: Site
    ) -> Tensor:
        set_site(ctx, site)
        ctx.centred = centred
        wide = widened(x.detach())
        if centred:
            inverse = torch.rsqrt(wide.var(dim=-1, keepdim=True, unbiased=False) + eps).to(x.dtype)
        else:
            inverse = inverse_rms(wide, eps)
        ctx.save_for_backward(inverse, gain)
        return same(y, site.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        ctx.site.backward += 1
        inverse, gain = ctx.saved_tensors
        if ctx.centred:
            down = layer_norm_identity(g, gain, inverse)
        else:
            down = ((g if gain is None else g * gain) * inverse).to(g.dtype)
        return down, None, None, None, None, None


class GroupNorm(torch.autograd.Function):
    """GroupNorm [batch, channel, ...] with each group's denominator constant."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, weight: Tensor | None, groups: int, eps: float, site: Site
    ) -> Tensor:
        set_site(ctx, site)
        wide = (x if x.dtype == torch.float64 else x.float()).reshape(len(x), groups, -1)
        inverse = torch.rsqrt(wide.var(dim=-1, keepdim=True, unbiased=False) + eps)
        ctx.save_for_backward(inverse.to(x.dtype), weight)
        return same(y, site.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        ctx.site.backward += 1
        inverse, weight = ctx.saved_tensors
        h = g if weight is None else g * weight.view(-1, *[1] * (g.ndim - 2))
        grouped = h.reshape(*inverse.shape[:2], -1)
        down = layer_norm_identity(grouped, None, inverse).reshape(g.shape)
        return down, None, None, None, None, None


class Normalised(torch.autograd.Function):
    """A norm of a user's own class: its gain over its denominator, from the values it returned.

    The bias is metered apart; see :class:`~lenslrp.hooks.rules.Normalisation`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, bias: Tensor | None, rule: Normalisation, site: Site
    ) -> Tensor:
        set_site(ctx, site)
        ctx.centred = rule.centred
        factor, x = rule.factor(x, y, bias)
        lost = None
        if site.accounts is not None:
            lost = (y if bias is None else y - bias) - x * factor
        ctx.save_for_backward(factor, lost)
        return same(y, site.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        ctx.site.backward += 1
        factor, lost = ctx.saved_tensors
        if lost is not None:
            ctx.site.report("stabiliser", row_sums(lost, g))
        h = g * factor
        return (h - h.mean(dim=-1, keepdim=True) if ctx.centred else h), None, None, None, None


class Linear(torch.autograd.Function):
    """A linear layer under a rule other than epsilon."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rule: LinearRule,
        site: Site,
    ) -> Tensor:
        set_site(ctx, site)
        ctx.rule = rule
        ctx.save_for_backward(kept_input(x, site), y, weight, bias)
        return same(y, site.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        site = ctx.site
        site.backward += 1
        x, y, weight, bias = ctx.saved_tensors
        gx, bias_share = ctx.rule.backward(g, x, weight, bias)
        if site.accounts is not None:
            absorbed = row_sums(bias_share, torch.ones_like(bias_share))
            site.report("biases", absorbed)
            site.report("stabiliser", row_sums(y, g) - row_sums(x, gx) - absorbed)
        return gx, None, None, None, None, None


class Unpacked(torch.autograd.Function):
    """A linear layer whose weight is there in the backward pass only: see `lenslrp.hooks.packed`.

    ``weight(x)`` gives it, [out, in]. Where the values are needed (``keeps``), what the layer
    loses by rounding is the ``stabiliser`` term.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        weight: Callable[[Tensor], Tensor],
        bias: Tensor | None,
        rule: Any,
        keeps: bool,
        meters: bool,
        site: Site,
    ) -> Tensor:
        set_site(ctx, site)
        ctx.weight, ctx.bias, ctx.rule, ctx.keeps, ctx.meters = weight, bias, rule, keeps, meters
        ctx.size = x.shape[-1]
        kept = (kept_input(x, site), y) if keeps else (EMPTY, EMPTY)
        ctx.save_for_backward(*kept)
        return same(y, site.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, *tuple[None, ...]]:
        site, bias = ctx.site, ctx.bias
        site.backward += 1
        x, y = ctx.saved_tensors
        weight = ctx.weight(g.new_empty(0, ctx.size))
        if isinstance(ctx.rule, LinearRule):
            gx, share = ctx.rule.backward(g, x, weight, bias)
        else:
            gx, share = g @ weight, g * (0 if bias is None else bias)
        if ctx.keeps and site.accounts is not None:
            absorbed = row_sums(share, torch.ones_like(share))
            if ctx.meters:
                site.report("biases", absorbed)
            site.report("stabiliser", row_sums(y, g) - row_sums(x, gx) - absorbed)
        return gx, None, None, None, None, None, None, None


class Rejoined(torch.autograd.Function):
    """The sum of two parts, whose value the layer that made them has given already (``y``)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, y: Tensor | None, site: Site) -> Tensor:
        set_site(ctx, site)
        return a + b if y is None else same(y, site.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ctx.site.backward += 1
        return g, g, None, None


class ProductOutput(torch.autograd.Function):
    """At the output of a product of two factors: the gradient that the second gets.

    The first gets its share of that at its own place; with none, it is not on the graph at all.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, first: float, second: float, site: Site) -> Tensor:
        set_site(ctx, site, opens=("product",) if first else ())
        ctx.share = second
        ctx.absorbs = absorbs = 1 - first - second
        if site.accounts is not None and absorbs:
            ctx.save_for_backward(y)
        return same(y, site.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        site = ctx.site
        site.backward += 1
        if site.accounts is not None and ctx.absorbs:
            site.report("plain", ctx.absorbs * row_sums(ctx.saved_tensors[0], g, masked=False))
        return (g if ctx.share == 1 else g * ctx.share), None, None, None


class Share(torch.autograd.Function):
    """Multiplies the gradient by a constant, the share of one factor of a product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float, site: Site) -> Tensor:
        set_site(ctx, site)
        ctx.share = share
        return same(x, site.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g * ctx.share, None, None


class Mark(torch.autograd.Function):
    """Changes nothing: the node of a site whose rule is a cut, which leaves none in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, site: Site) -> Tensor:
        set_site(ctx, site)
        return same(x, site.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.site.backward += 1
        return g, None


class RegionOutput(torch.autograd.Function):
    """Begins, at an operation's output, a region for which one site answers as a whole."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor | None, term: str, site: Site) -> Tensor:
        set_site(ctx, site, region=1)
        ctx.term = term
        if site.accounts is not None:
            ctx.save_for_backward(y if bias is None else y - bias)
        return same(y, site.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.site.backward += 1
        if ctx.site.accounts is not None:
            ctx.site.report(ctx.term, row_sums(ctx.saved_tensors[0], g))
        return g, None, None, None


class RegionInput(torch.autograd.Function):
    """Ends, at an operation's input, the region that :class:`RegionOutput` began."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, term: str, site: Site) -> Tensor:
        set_site(ctx, site, region=-1)
        ctx.term = term
        if site.accounts is not None:
            ctx.save_for_backward(kept_input(x, site))
        return same(x, site.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        if ctx.site.accounts is not None and ctx.site.backward:  # not where relevance starts inside
            ctx.site.report(ctx.term, -row_sums(ctx.saved_tensors[0], g))
        return g, None, None


class Read(torch.autograd.Function):
    """Hands ``(x, g)`` to a reader as the backward pass passes; changes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, deliver: Any, copies: bool) -> Tensor:
        ctx.deliver = deliver
        ctx.save_for_backward(same(x, True) if copies else x)
        return same(x, copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        ctx.deliver(ctx.saved_tensors[0], g)
        return g, None, None


def shared(x: Tensor, share: float, site: Site) -> Tensor:
    """``x`` with its share of the gradient: all of it, a part, or none (cut from the graph)."""
    if share == 1:
        return x
    return x.detach() if share == 0 else apply(Share, x, share, site)


def activated(act: Callable[[Tensor], Tensor], x: Tensor, site: Site) -> Tensor:
    """``act(x)``, element by element, under the site's rule for activations."""
    if isinstance(site.rule, Plain):
        inside = act(apply(RegionInput, x, "plain", site))
        return apply(RegionOutput, inside, None, "plain", site)
    return apply(Elementwise, x, act(x.detach()), slimmest(site.rule, act), site)


def slimmest(rule: Any, code: Any) -> Any:
    """The form of the identity rule that needs least for a function, or a module's forward."""
    return SiLU() if rule == Identity() and code in SILU_FORWARDS else rule
