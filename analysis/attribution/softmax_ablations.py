"""Two other rules for the softmax, for experiments: AttnLRP's paper weighs and rejects both.

They divide by a score, which is 0 for no reason of its own (only differences of scores count), so
they are unstable. Nothing here is exported or recommended; the figures are in
``docs/reference/baselines.md``.
Composites are AttnLRP's but for the softmax. Masked keys get exactly 0.

Source: [A] Achtibat et al., AttnLRP, ICML 2024 (2402.05602), section 3.3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.hooks.composites import Composite
from lenslrp.hooks.rules import identity_factor, softmax_taylor, stabilise


def _split_masked(x: Tensor) -> tuple[Tensor, Tensor]:
    """The scores with 0 for masked ones (-inf, or the type's minimum), and which are not."""
    unmasked = x > torch.finfo(x.dtype).min / 2
    return x.masked_fill(~unmasked, 0.0), unmasked


def softmax_identity(
    g: Float[Tensor, "*rows keys"], x: Float[Tensor, "*rows keys"], s: Float[Tensor, "*rows keys"]
) -> Float[Tensor, "*rows keys"]:
    """The identity rule, as if the softmax were element-wise: ``R_i = R_i`` ([A] Eq. 9)."""
    x, unmasked = _split_masked(x)
    return torch.where(unmasked, g * identity_factor(x, s), 0.0)


def softmax_distributed(
    g: Float[Tensor, "*rows keys"], x: Float[Tensor, "*rows keys"], s: Float[Tensor, "*rows keys"]
) -> Float[Tensor, "*rows keys"]:
    """AttnLRP's Taylor expansion with the bias's relevance handed out, alike to every unmasked key.

    The expansion is ``s(x) = J x + b``, and its bias ``b_j = s_j (1 - x_j + <s, x>)`` takes the
    relevance ``<g, b>`` that AttnLRP lets it keep ([A] Prop. 3.1, Eq. 13).
    """
    x, unmasked = _split_masked(x)
    bias = s * (1 - x + (s * x).sum(dim=-1, keepdim=True))
    each = (g * bias).sum(dim=-1, keepdim=True) / unmasked.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.where(unmasked, softmax_taylor(g, s) + each / stabilise(x), 0.0)


@dataclass(frozen=True)
class SoftmaxIdentity:
    """The identity rule at the softmax."""

    name: str = "identity at the softmax"

    def at_scores(self, g: Tensor, scores: Tensor, pattern: Tensor) -> Tensor:
        return softmax_identity(g, scores, pattern)


@dataclass(frozen=True)
class SoftmaxDistributed:
    """The Taylor expansion whose bias is distributed."""

    name: str = "distributed bias"

    def at_scores(self, g: Tensor, scores: Tensor, pattern: Tensor) -> Tensor:
        return softmax_distributed(g, scores, pattern)


def IdentityAtSoftmax() -> Composite:
    """AttnLRP with the identity rule at the softmax."""
    return Composite("AttnLRP, identity at the softmax", {"softmax": SoftmaxIdentity()})


def DistributedBiasAtSoftmax() -> Composite:
    """AttnLRP with the bias of the softmax's expansion distributed."""
    return Composite("AttnLRP, distributed bias at the softmax", {"softmax": SoftmaxDistributed()})
