r"""The rules of AttnLRP in gradient form, as pure functions and small tables of data.

Relevance is activation times modified gradient, ``R = x * g`` (Arras et al. 2025, 2502.15886), so
a rule is what it does to the gradient on its way back through one operation. Every function takes
the gradient ``g`` at the operation's output, in units of the target per unit of activation, and
returns the gradient at its input, of the input's shape. Nothing here knows about models.

Sources: [A] Achtibat et al., AttnLRP, ICML 2024 (2402.05602); [D] GIM (2505.17630); [F] Ali et al.,
2022 (CP-LRP).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

EPS: dict[torch.dtype, float] = {
    torch.float64: 1e-20,
    torch.float32: 1e-15,
    torch.bfloat16: 1e-15,
    torch.float16: 1e-6,
}
"""The stabiliser for each type: it only has to keep an exact zero out of a denominator."""


SATURATED: dict[torch.dtype, float] = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.bfloat16: 1e-1,
    torch.float16: 1e-2,
}
"""Below this ``1 - tanh^2`` a soft-cap counts as saturated: x can no longer be told from y."""


def stabilise(x: Float[Tensor, "*shape"], eps: float | None = None) -> Float[Tensor, "*shape"]:
    """``x + eps * sign(x)`` with ``sign(0) = +1``, so that the result is never zero."""
    eps = EPS[x.dtype] if eps is None else eps
    return x + ((x >= 0).to(x.dtype) * (2 * eps) - eps)


def identity_factor(
    x: Float[Tensor, "*shape"], y: Float[Tensor, "*shape"], eps: float | None = None
) -> Float[Tensor, "*shape"]:
    """``y / stab(x)``: the identity rule for y = f(x), f(0) = 0 ([A] Eq. 9)."""
    return y / stabilise(x, eps)


def identity(
    g: Float[Tensor, "*shape"],
    x: Float[Tensor, "*shape"],
    y: Float[Tensor, "*shape"],
    eps: float | None = None,
) -> Float[Tensor, "*shape"]:
    """The identity rule, relevance passes element-wise: ``g * y / stab(x)`` ([A] Eq. 9).

    For a bias-free RMS norm it is the normalisation rule as well: y / x is the gain over the
    denominator, which the rule holds constant ([A] Prop. 3.4, Eq. 19).
    """
    return g * identity_factor(x, y, eps)


def layer_norm_identity(
    g: Float[Tensor, "... features"],
    weight: Float[Tensor, " features"] | None,
    inverse_scale: Float[Tensor, "... 1"],
) -> Float[Tensor, "... features"]:
    """LayerNorm with its denominator held constant; centring stays linear ([A] Prop. 3.4)."""
    h = g * inverse_scale if weight is None else g * weight * inverse_scale
    return h - h.mean(dim=-1, keepdim=True)


def inverse_rms(x: Float[Tensor, "... features"], eps: float) -> Float[Tensor, "... 1"]:
    """One over the root mean square of the last axis."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.rsqrt(length.square_().div_(x.shape[-1]).add_(eps))


def softmax_taylor(
    g: Float[Tensor, "... keys"], s: Float[Tensor, "... keys"]
) -> Float[Tensor, "... keys"]:
    """The softmax rule is the plain Jacobian, ``s * (g - <g, s>)`` ([A] Prop. 3.1, Eq. 13)."""
    return s * (g - (g * s).sum(dim=-1, keepdim=True))


def softmax_gim(
    g: Float[Tensor, "... keys"], x: Float[Tensor, "... keys"], temperature: float = 2.0
) -> Float[Tensor, "... keys"]:
    """GIM's softmax: the Jacobian's shape at a higher temperature, ``s_T (g - <g, s_T>)`` ([D])."""
    return softmax_taylor(g, torch.softmax(x / temperature, dim=-1))


def softmax_gim_compensation(
    g: Float[Tensor, "... keys"], x: Float[Tensor, "... keys"], temperature: float
) -> Float[Tensor, "... keys"]:
    """The gradient which the plain Jacobian of softmax(x) turns into :func:`softmax_gim`.

    ``h / s`` does, for any h that sums to zero over the keys. Where s has underflowed (masked
    entries) nothing passes. Works in float32 for the half types and returns g's type.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    s = torch.softmax(wide, dim=-1)
    h = softmax_gim(g.to(wide.dtype), wide, temperature)
    return torch.where(s > 0, h / s.clamp(min=torch.finfo(s.dtype).tiny), 0.0).to(g.dtype)


def uncapped(y: Float[Tensor, "*shape"], cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Undo ``y = cap tanh(x / cap)`` in float32 or wider.

    Returns x, tanh's derivative there, and which entries are neither masked nor saturated.
    """
    wide = y if y.dtype == torch.float64 else y.float()
    edge = 1 - torch.finfo(wide.dtype).eps
    t = (wide / cap).clamp(-edge, edge)  # a masked entry is -inf or the type's minimum
    slope = 1 - t * t
    return cap * torch.atanh(t), slope, slope > SATURATED[y.dtype]


def softcap_compensation(
    g: Float[Tensor, "*shape"], y: Float[Tensor, "*shape"], cap: float
) -> Float[Tensor, "*shape"]:
    """The gradient which autograd's tanh' turns into the identity rule for y = cap tanh(x / cap).

    Autograd multiplies by ``1 - (y / cap)^2`` afterwards. Masked entries and entries where tanh has
    saturated get exactly 0.
    """
    x, slope, open_ = uncapped(y, cap)
    ratio = torch.where(x == 0, torch.ones_like(x), y.to(x.dtype) / stabilise(x))
    factor = torch.where(open_, ratio / slope, torch.zeros_like(x))
    return torch.where(open_, g, torch.zeros_like(g)) * factor.to(g.dtype)


def uniform(g: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The uniform rule for a product of two factors, half to each ([A] Prop. 3.2, Eq. 14-15)."""
    return g * 0.5


def gamma_linear(
    g: Float[Tensor, "... out"],
    x: Float[Tensor, "... in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    gamma: float,
    eps: float | None = None,
) -> tuple[Float[Tensor, "... in"], Float[Tensor, "... out"]]:
    r"""The gamma rule in its four sign cases ([A] Eq. 24, generalised for inputs of either sign).

    Outputs z > 0 favour positive contributions, ``x w + gamma (x w)^+``; outputs z < 0 favour
    negative ones, ``x w + gamma (x w)^-``. The bias is one more contribution and gets its share.

    Positive contributions add up to (|x| |w| + x w) / 2, negative ones to (x w - |x| |w|) / 2, so
    two products forward and two backward are enough. Both are well conditioned where they are used:
    the favoured side is the larger one, or the bias decided the sign.

    Returns:
        The gradient at the input, and the relevance that the bias took at each output.
    """
    z, size = x @ weight.T, x.abs() @ weight.abs().T
    pos, neg = (size + z) / 2, (z - size) / 2
    b = torch.zeros_like(z[..., :1]) if bias is None else bias
    up, down = z + b > 0, z + b < 0
    r = g * (z + b)
    share_up = torch.where(up, r / stabilise(z + b + gamma * (pos + b.clamp(min=0)), eps), 0.0)
    share_down = torch.where(down, r / stabilise(z + b + gamma * (neg + b.clamp(max=0)), eps), 0.0)
    sign = (x > 0).to(x.dtype) * gamma - gamma / 2
    gx = (share_up + share_down) @ weight * (1 + gamma / 2)
    gx = gx + sign * ((share_up - share_down) @ weight.abs())
    bias_share = share_up * (b + gamma * b.clamp(min=0)) + share_down * (b + gamma * b.clamp(max=0))
    return gx, bias_share


def alpha_beta_linear(
    g: Float[Tensor, "... out"],
    x: Float[Tensor, "... in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    alpha: float,
    beta: float,
    eps: float | None = None,
) -> tuple[Float[Tensor, "... in"], Float[Tensor, "... out"]]:
    """``alpha`` of the positive and ``-beta`` of the negative contributions (alpha - beta = 1).

    z+ is alpha = 1, beta = 0 ([A] Eq. 25). Returns as :func:`gamma_linear`.
    """
    xp, xn = x.clamp(min=0), x.clamp(max=0)
    wp, wn = weight.clamp(min=0), weight.clamp(max=0)
    pos = xp @ wp.T + xn @ wn.T
    neg = xp @ wn.T + xn @ wp.T
    b = torch.zeros_like(pos[..., :1]) if bias is None else bias
    r = g * (pos + neg + b)
    up, down = pos + b.clamp(min=0), neg + b.clamp(max=0)
    # An output without contributions of a sign has nothing to hand on to that side.
    plus = torch.where(up > 0, alpha * r / stabilise(up, eps), 0.0)
    minus = torch.where(down < 0, beta * r / stabilise(down, eps), 0.0)
    gx = torch.where(x > 0, plus @ wp, plus @ wn) - torch.where(x > 0, minus @ wn, minus @ wp)
    return gx, plus * b.clamp(min=0) - minus * b.clamp(max=0)


def zplus_linear(
    g: Float[Tensor, "... out"],
    x: Float[Tensor, "... in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    eps: float | None = None,
) -> tuple[Float[Tensor, "... in"], Float[Tensor, "... out"]]:
    """The z+ rule: only positive contributions count ([A] Eq. 25)."""
    return alpha_beta_linear(g, x, weight, bias, 1.0, 0.0, eps)
