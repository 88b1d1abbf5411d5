"""The rules as data: what a composite's table holds for each role.

A rule has a name and, where it is more than a choice, pure functions of :mod:`lenslrp.hooks.rules`,
so that it can be tested without a model.

Sources: [A] Achtibat et al., AttnLRP, ICML 2024 (2402.05602); [D] GIM (2505.17630); [F] Ali et al.,
2022 (CP-LRP).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from lenslrp.errors import InputError
from lenslrp.hooks.rules import alpha_beta_linear, gamma_linear, identity_factor, stabilise

ANGLE_TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-5,  # many norms compute in float32 whatever the model's type
    torch.float32: 1e-4,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}
"""How large the sine of the angle between two vectors may be that should be parallel."""


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
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        near = ANGLE_TOLERANCE[y.dtype]
        x, y = (t.detach().flatten(0, -2).to(dtype) for t in (x, y))
        if self.centred:
            x = x - x.mean(dim=-1, keepdim=True)
        y = y if bias is None else y - bias.detach().to(dtype)
        u, v = y * x.roll(1, 0), y.roll(1, 0) * x
        lengths = v.square().sum(dim=-1, keepdim=True)
        along = (u * v).sum(dim=-1, keepdim=True)
        beside = u - v * (along / stabilise(lengths, torch.finfo(dtype).tiny))
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
            with what it leaks reported as ``softmax``.
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


def product_shares(rule: Any) -> tuple[float, float]:
    """(first, second) of a product rule; a plain product passes all of the gradient to both."""
    return (rule.first, rule.second) if isinstance(rule, Product) else (1.0, 1.0)


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
