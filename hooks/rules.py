r"""The rules of AttnLRP in gradient form, as pure functions and small tables of data.

Relevance is activation times modified gradient, ``R = x * g`` (Arras et al. 2025, 2502.15886), so
a rule is what it does to the gradient on its way back through one operation. Every function takes
the gradient ``g`` at the operation's output, in units of the target per unit of activation, and
returns the gradient at its input, of the input's shape. Nothing here knows about models.

Sources: [A] Achtibat et al., AttnLRP, ICML 2024 (2402.05602); [D] GIM (2505.17630); [F] Ali et al.,
2022 (CP-LRP).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.errors import InputError

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


PARALLEL: dict[torch.dtype, float] = {
    torch.float64: 1e-5,  # many norms compute in float32 whatever the model's type
    torch.float32: 1e-4,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}
"""How large the sine of the angle between two vectors may be that should be parallel."""


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


def half(g: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
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
    two products each way are enough. Both are well conditioned where they are used: the favoured
    side is the larger one, or the bias decided the sign.

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
    took = share_up * (b + gamma * b.clamp(min=0)) + share_down * (b + gamma * b.clamp(max=0))
    return gx, took


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


@runtime_checkable
class Rule(Protocol):
    """What a composite's table holds for a role: data with a name, and pure functions."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Plain:
    """No rule: the gradient of calculus. The ledger reports what it gains or loses."""

    name: str = "plain"


@dataclass(frozen=True)
class Epsilon:
    """The epsilon rule (eps -> 0), which in gradient form is the plain gradient ([A] Eq. 8)."""

    name: str = "epsilon"


@dataclass(frozen=True)
class Identity:
    """The identity rule for element-wise functions with f(0) = 0 ([A] Eq. 9)."""

    eps: float | None = None
    name: str = "identity"

    @property
    def exact(self) -> bool:
        """Whether all relevance passes, with none left to a stabiliser; not by a user's factor."""
        return self.eps is None and type(self) in (Identity, SiLU)

    def factor(self, x: Tensor, y: Tensor) -> Tensor:
        """What the gradient is multiplied by; x, y and the result have one shape.

        Without ``eps`` it is y / x, and 0 where x is: its relevance is 0 whatever the factor.
        """
        if self.eps is None:
            return (y / x).nan_to_num_(0.0)
        return identity_factor(x, y, self.eps)


@dataclass(frozen=True)
class SiLU(Identity):
    """The identity rule for SiLU, whose y / x is sigmoid(x), at 0 as well."""

    def factor(self, x: Tensor, y: Tensor) -> Tensor:
        return x.sigmoid()


@dataclass(frozen=True)
class Limited(Identity):
    """The identity rule for a function that is not quite 0 at 0, where y / x has no bound.

    Within ``near`` of 0 the factor is that at ``-near`` or ``near``; what is left of y there goes
    to the ledger's ``stabiliser``.
    """

    below: Tensor | float = 0.0
    above: Tensor | float = 0.0
    near: ClassVar[float] = 2e-6
    exact: ClassVar[bool] = False

    def factor(self, x: Tensor, y: Tensor) -> Tensor:
        inside = torch.where(x < 0, self.below, self.above).to(x.dtype)
        return torch.where(x.abs() < self.near, inside, identity_factor(x, y, self.eps))


@dataclass(frozen=True)
class Normalisation:
    """The denominator of a norm is constant, its centring linear ([A] Prop. 3.4, Eq. 19).

    ``centred`` and ``bias`` describe a norm class of a user's own, given to
    ``composite.extended``; for the norms that LensLRP knows they are not looked at.

    Attributes:
        centred: the norm takes the mean over the last dimension away, as LayerNorm does.
        bias: the attribute of the module that holds its bias, if it has one.
    """

    centred: bool = False
    bias: str = "bias"
    name: str = "normalisation"

    def factor(self, x: Tensor, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the gradient is multiplied by, and the input it belongs to (centred or not).

        It is the gain over the denominator, read off the values that the norm really returned.
        """
        x = x - x.mean(dim=-1, keepdim=True) if self.centred else x
        return identity_factor(x, y if bias is None else y - bias), x

    def fits(self, x: Tensor, y: Tensor, bias: Tensor | None) -> bool:
        """Whether ``y - bias`` is ``x`` times a gain for each feature and a scale for each row.

        Each row against the next: with u = (y - bias) of one row times x of the other, u and its
        mirror image are parallel. One row alone tells nothing.
        """
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        near = PARALLEL[y.dtype]
        x, y = (t.detach().flatten(0, -2).to(wide) for t in (x, y))
        if self.centred:
            x = x - x.mean(dim=-1, keepdim=True)
        y = y if bias is None else y - bias.detach().to(wide)
        u, v = y * x.roll(1, 0), y.roll(1, 0) * x
        lengths = v.square().sum(dim=-1, keepdim=True)
        along = (u * v).sum(dim=-1, keepdim=True)
        beside = u - v * (along / stabilise(lengths, torch.finfo(wide).tiny))
        return bool((along >= 0).all()) and bool(
            (beside.norm(dim=-1) <= near * u.norm(dim=-1)).all()
        )


@dataclass(frozen=True)
class Operations:
    """Inside a module of one class, every raw operation gets the rule of its kind.

    Given to ``composite.extended({Class: Operations()})`` for a module that computes in plain
    Python; :mod:`lenslrp.hooks.operations` has the kinds. What its sub-modules compute is theirs.

    Attributes:
        product: the role of an element-wise product of two factors: ``"gate"``,
            ``"attention_gate"`` or ``"router"``. A factor of one number for each position makes it
            ``"router"``, unless it gates an attention (Laguna gates each head by one number).
        gated: functional activations feed such a product (and get a gate's share).
        leaks: which of softmax, sigmoid, softplus and division (``"div"``) have the plain gradient,
            with what it leaks booked as ``softmax``.
        attention: matrix products of two factors are attention's.
    """

    product: str = "gate"
    gated: bool = False
    leaks: tuple[str, ...] = ("softmax", "sigmoid", "softplus", "div")
    attention: bool = True
    name: str = "operations"


@dataclass(frozen=True)
class Product:
    """A product of two factors: what share of the gradient each gets.

    The factors are (pattern, values) for ``attention_av``, (queries, keys) for ``attention_qk``
    and (gate, up) for ``gate``.
    """

    first: float
    second: float
    name: str


UNIFORM = Product(0.5, 0.5, "uniform")
"""Half to each factor ([A] Prop. 3.2-3.3)."""
CONSTANT = Product(0.0, 1.0, "constant")
"""The first factor (the pattern, the gate) is constant; the second gets everything ([F])."""


@dataclass(frozen=True)
class Softmax:
    """The softmax rule: the plain Jacobian; what it leaks is in the ledger ([A] Prop. 3.1)."""

    name: str = "softmax"


@dataclass(frozen=True)
class SoftmaxTemperature:
    """GIM's softmax backward at a higher temperature ([D])."""

    temperature: float = 2.0
    name: str = "gim"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"temperature must be above 0, got {self.temperature}")


@runtime_checkable
class SoftmaxRule(Protocol):
    """A rule for the attention softmax in the place of its Jacobian."""

    @property
    def name(self) -> str: ...

    def at_scores(self, g: Tensor, scores: Tensor, pattern: Tensor) -> Tensor:
        """The gradient at the scores [..., keys] from that at the pattern, of one shape."""
        ...


@dataclass(frozen=True)
class SoftCap:
    """The identity rule for y = cap tanh(x / cap)."""

    name: str = "softcap"


@runtime_checkable
class LinearRule(Protocol):
    """A rule for ``y = x W^T + b`` that differs from the plain gradient."""

    @property
    def name(self) -> str: ...

    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The gradient at the input, and the relevance that the bias took at each output."""
        ...


@dataclass(frozen=True)
class Gamma:
    """The gamma rule ([A] Eq. 24)."""

    gamma: float = 0.25
    name: str = "gamma"

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise InputError(f"gamma must be at least 0, got {self.gamma}")

    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return gamma_linear(g, x, weight, bias, self.gamma)


@dataclass(frozen=True)
class AlphaBeta:
    """The alpha-beta rule; ``AlphaBeta(1, 0)`` is z+ ([A] Eq. 25)."""

    alpha: float = 2.0
    beta: float = 1.0
    name: str = "alpha-beta"

    def __post_init__(self) -> None:
        if abs(self.alpha - self.beta - 1) > 1e-12 or self.beta < 0:
            raise InputError(
                f"alpha - beta must be 1 and beta >= 0, got alpha={self.alpha}, beta={self.beta}"
            )

    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return alpha_beta_linear(g, x, weight, bias, self.alpha, self.beta)


ZPLUS = AlphaBeta(1.0, 0.0, "z+")
