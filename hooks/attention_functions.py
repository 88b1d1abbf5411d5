"""The rules of attention as autograd Functions: at scores, pattern and fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lenslrp.hooks.functions import kept_input, same, set_site
from lenslrp.hooks.rule_types import SoftmaxTemperature
from lenslrp.hooks.rules import softcap_compensation, softmax_gim_compensation, uncapped
from lenslrp.hooks.sites import Site, row_sums


class Scores(torch.autograd.Function):
    """At the attention scores, after mask and soft-cap, before the softmax.

    Reports the relevance of the scores (the softmax site's output side is :class:`Pattern`), undoes
    the soft-cap's tanh' and gives queries and keys their share; ``None`` where the queries are a
    weight, so that the scores are linear in the keys, which get all of it. Without a softmax site,
    what the softmax is given is measured elsewhere, behind hooks of the user's.
    """

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, share: float | None, cap: float | None, sites: dict[str, Site]
    ) -> Tensor:
        opens = ("tanh",) if cap is not None and "softcap" in sites else ()
        set_site(ctx, sites["attention_qk"], opens=opens if share is None else ("product", *opens))
        ctx.sites, ctx.cap = sites, cap
        ctx.share, ctx.left = (1, 0) if share is None else (share, 1 - 2 * share)
        if "softcap" in sites:
            sites["softcap"].forward += 1
        capped = cap is not None and sites["softcap"].rule.name != "plain"
        ctx.capped = capped
        if capped or sites["attention_qk"].accounts is not None:
            ctx.save_for_backward(scores)
        return same(scores, sites["attention_qk"].copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        qk, softmax = ctx.sites["attention_qk"], ctx.sites.get("softmax")
        softcap = ctx.sites.get("softcap")
        qk.backward += 1
        saved = ctx.saved_tensors
        down = softcap_compensation(g, saved[0], ctx.cap) if ctx.capped else g
        if softcap is not None:
            softcap.backward += 1
        if qk.accounts is not None:
            s = saved[0]
            relevance = row_sums(s, g)
            if softmax is not None and softmax.backward:  # not where relevance starts at a score
                softmax.report("softmax", -relevance)
            passed = relevance
            if softcap is not None:
                x, slope, _ = uncapped(s, ctx.cap)
                passed = row_sums(x, down.to(x.dtype) * slope)
                name = "stabiliser" if ctx.capped else "plain"
                softcap.report(name, relevance - passed)
            qk.report("plain", ctx.left * passed)
        return (down if ctx.share == 1 else down * ctx.share), None, None, None


class Pattern(torch.autograd.Function):
    """At the attention pattern: marks the softmax, reports its relevance, applies GIM's rule."""

    @staticmethod
    def forward(
        ctx: Any, pattern: Tensor, scores: Tensor | None, share: float, site: Site
    ) -> Tensor:
        set_site(ctx, site, opens=("softmax",))
        ctx.share = share
        ctx.save_for_backward(pattern if site.accounts is not None else None, scores)
        return same(pattern, site.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        site = ctx.site
        site.backward += 1
        pattern, scores = ctx.saved_tensors
        g = g if ctx.share == 1 else g * ctx.share
        if site.accounts is not None:
            site.report("softmax", row_sums(pattern, g))
        rule = site.rule
        if isinstance(rule, SoftmaxTemperature):
            g = softmax_gim_compensation(g, scores, rule.temperature)
        return g, None, None, None


class SoftmaxReplaced(torch.autograd.Function):
    """From the attention pattern straight to the scores, by a rule that is no Jacobian."""

    @staticmethod
    def forward(ctx: Any, pattern: Tensor, scores: Tensor, share: float, site: Site) -> Tensor:
        set_site(ctx, site)
        ctx.share = share
        ctx.save_for_backward(pattern, scores)
        return same(pattern, site.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None, None]:
        site = ctx.site
        site.backward += 1
        pattern, scores = ctx.saved_tensors
        g = g if ctx.share == 1 else g * ctx.share
        if site.accounts is not None:
            site.report("softmax", row_sums(pattern, g))
        return None, site.rule.at_scores(g, scores, pattern), None, None


class FusedOutput(torch.autograd.Function):
    """At the output of the fused attention kernel: begins its region, reports what it leaked.

    What leaves is the relevance of z; what enters is that of queries, keys and values.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, site: Site) -> Tensor:
        set_site(ctx, site, region=1)
        if site.accounts is not None:
            ctx.save_for_backward(z)
        return same(z, site.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.site.backward += 1
        if ctx.site.accounts is not None:
            ctx.site.report("softmax", row_sums(ctx.saved_tensors[0], g))
        return g, None


class FusedInput(torch.autograd.Function):
    """At the fused kernel's queries, keys and values: their share, and the end of its region."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float, site: Site) -> Tensor:
        set_site(ctx, site, region=-1)
        ctx.share = share
        if site.accounts is not None:
            ctx.save_for_backward(kept_input(x, site))
        return same(x, site.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        g = g * ctx.share
        if ctx.site.accounts is not None:
            ctx.site.report("softmax", -row_sums(ctx.saved_tensors[0], g))
        return g, None, None
