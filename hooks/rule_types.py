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
from lenslrp.hooks.rules import identity_factor, stabilise

ANGLE_TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-5,  # many norms compute in float32 whatever the model's type
    torch.float32: 1e-4,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}
"""How large the sine of the angle between two vectors may be that should be parallel."""


@runtime_checkable
class Rule(Protocol):
    """What a composite's table holds for a role: data with a ``name``, which reports show."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Plain:
    """No rule: the gradient of calculus, for an operation or a whole module.

    What leaves such an operation need not be what enters it. The difference, in units of the
    target, is the ledger's ``plain`` term.

    Examples:
        >>> from lenslrp.hooks import AttnLRP, Composite
        >>> Composite("mine", {"activation": Plain()})["activation"].name
        'plain'
    """

    name: str = "plain"


@dataclass(frozen=True)
class Identity:
    """The identity rule for element-wise functions ``y = f(x)`` with f(0) = 0 ([A] Eq. 9).

    Each output has one input, which gets all of its relevance: the gradient is multiplied by y / x.

    Attributes:
        eps: stabiliser of the division, ``y / (x + eps sign(x))``; what it takes is the ledger's
            ``stabiliser`` term. ``None`` divides by x itself.

    Examples:
        >>> import torch
        >>> x = torch.tensor([-1.0, 0.0, 2.0])
        >>> Identity().factor(x, x.relu())
        tensor([-0., 0., 1.])
    """

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

    For ``y = gain * (x - mean) / scale + bias`` the gradient passes through ``gain / scale`` as a
    linear layer's would; the bias keeps ``bias * g``, the ledger's ``biases`` term.

    ``centred`` and ``bias`` describe a norm class of a user's own, given to
    ``composite.extended``; for the norms that LensLRP knows they are not looked at. What the module
    returns is compared with this form at every forward pass.

    Attributes:
        centred: the norm takes the mean over the last dimension away, as LayerNorm does.
        bias: the attribute of the module that holds its bias, if it has one.

    Raises:
        InputError: in the forward pass, a module of the user's class that has not this form.

    Examples:
        >>> from lenslrp.hooks import AttnLRP
        >>> class MyNorm(torch.nn.Module): ...
        >>> AttnLRP().extended({MyNorm: Normalisation(centred=True)}).modules[MyNorm].centred
        True
    """

    centred: bool = False
    bias: str = "bias"
    name: str = "normalisation"

    def factor(self, x: Tensor, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the gradient is multiplied by, and the input it belongs to (centred or not).

        It is the gain over the denominator, read off the values that the norm really returned.

        Args:
            x, y: the norm's input and output, [..., features].
            bias: [features].
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
        leaks: which of softmax, sigmoid, softplus, sqrt and division (``"div"``) have the plain
            gradient, with what it leaks reported as ``softmax``.
        attention: matrix products of two factors are attention's.
        streams: the axis of several residual streams that the module mixes, by weights that are
            one number for each position and stream; the role of such a product is ``"recurrence"``.

    Examples:
        >>> from lenslrp.hooks import AttnLRP
        >>> class MyGatedMLP(torch.nn.Module): ...
        >>> mine = AttnLRP().extended({MyGatedMLP: Operations(gated=True)})
    """

    product: str = "gate"
    gated: bool = False
    leaks: tuple[str, ...] = ("softmax", "sigmoid", "softplus", "div")
    attention: bool = True
    name: str = "operations"
    streams: int | None = None

    @property
    def weights(self) -> str:
        """The role of a product with one number for each position."""
        return "router" if self.streams is None else "recurrence"


@dataclass(frozen=True)
class Product:
    """A product of two factors ``y = a b``: what share of the gradient each gets.

    A share of the gradient is that share of the relevance, since ``a * (b g)`` and ``b * (a g)``
    are each all of ``y * g``. What the two shares leave of 1 is the ledger's ``plain`` term.
    :data:`UNIFORM` and :data:`CONSTANT` are those of the papers.

    Attributes:
        first: share of the pattern (``attention_av``), queries (``attention_qk``), the gate
            (``gate``, ``attention_gate``) or the router's weight (``router``).
        second: share of the values, keys, ``up``, or the expert's output. Not 0 for
            ``attention_av`` and ``gate``; the same as ``first`` for ``attention_qk``.
        name: what reports call it.

    Raises:
        InputError: when rules are attached, shares that a role cannot have.

    Examples:
        >>> from lenslrp.hooks import Composite
        >>> mine = Composite("mine", {"gate": Product(0.25, 0.75, "quarter")})
    """

    first: float
    second: float
    name: str


UNIFORM = Product(0.5, 0.5, "uniform")
"""The uniform rule, half to each factor ([A] Prop. 3.2-3.3, Eq. 14-15)."""
CONSTANT = Product(0.0, 1.0, "constant")
"""The first factor (the pattern, the gate) is constant and gets nothing; the second gets all
(CP-LRP, [F])."""


def product_shares(rule: Any) -> tuple[float, float]:
    """(first, second) of a product rule; a plain product passes all of the gradient to both."""
    return (rule.first, rule.second) if isinstance(rule, Product) else (1.0, 1.0)


@dataclass(frozen=True)
class Softmax:
    """The softmax rule of a first-order Taylor expansion ([A] Prop. 3.1, Eq. 13).

    In gradient form it is the plain Jacobian, ``s * (g - <g, s>)`` over the keys. It does not
    conserve relevance: R(pattern) - R(scores) is the ledger's ``softmax`` term.
    """

    name: str = "softmax"


@dataclass(frozen=True)
class SoftmaxTemperature:
    """GIM's softmax: the Jacobian at a temperature, in the backward pass only ([D]).

    ``s_T * (g - <g, s_T>)`` with ``s_T = softmax(scores / T)``. The difference between R(pattern)
    and R(scores) is the ledger's ``softmax`` term.

    Attributes:
        temperature: T, above 0. At 1 it is :class:`Softmax`.

    Raises:
        InputError: a temperature that is not above 0.

    Examples:
        >>> from lenslrp.hooks import Composite
        >>> mine = Composite("mine", {"softmax": SoftmaxTemperature(4.0)})
    """

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
    """The identity rule for a soft-cap, ``y = cap tanh(x / cap)`` ([A] Eq. 9).

    Scores at which tanh has saturated pass nothing; theirs is the ledger's ``stabiliser`` term.
    """

    name: str = "softcap"
