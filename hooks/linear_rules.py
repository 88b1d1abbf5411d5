"""Rules for linear layers and convolutions, as data: what a composite's table holds for them.

Sources: [A] Achtibat et al., AttnLRP, ICML 2024 (2402.05602).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from lenslrp.errors import InputError
from lenslrp.hooks.rules import alpha_beta_linear, gamma_linear


@dataclass(frozen=True)
class Epsilon:
    """The epsilon rule for linear layers and convolutions, with eps -> 0 ([A] Eq. 8).

    For ``y = x W^T + b`` each input gets its share of the sum, ``R_i = sum_j x_i w_ji / y_j R_j``.
    With ``R = y * g`` the ``y_j`` cancel: in gradient form it is the plain gradient, so nothing is
    put in the layer's place. The bias keeps ``b_j g_j``, the ledger's ``biases`` term.

    Examples:
        The relevance -1 of ``y = 2 * 1 + -1 * 3`` is shared out as 2 and -3:

        >>> import torch
        >>> x, weight, g = torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 3.0]]), torch.ones(1)
        >>> x * (g @ weight)
        tensor([ 2., -3.])
    """

    name: str = "epsilon"


@runtime_checkable
class LinearRule(Protocol):
    """A rule for ``y = x W^T + b`` that differs from the plain gradient; a user's own as well."""

    @property
    def name(self) -> str: ...

    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The gradient at the input, and the relevance that the bias took at each output.

        Args:
            g: gradient at the output, [..., out], in units of the target per unit of activation.
            x: input, [..., in].
            weight: [out, in].
            bias: [out].

        Returns:
            [..., in], and [..., out] in units of the target.
        """
        ...


@dataclass(frozen=True)
class Gamma:
    """The gamma rule for linear layers and convolutions ([A] Eq. 24, for inputs of either sign).

    Contributions ``x_i w_ji`` of the output's own sign count ``1 + gamma`` times. A convolution is
    treated window by window. The bias is one more contribution: its share is the ledger's
    ``biases`` term.

    Attributes:
        gamma: at least 0; at 0 it is :class:`Epsilon`. [A] App. B.4 has 0.25 for the convolution
            and 0.05 for the linear layers of a vision transformer.

    Raises:
        InputError: a negative gamma. When rules are attached: a layer whose weight cannot be read
            (quantised, an adapter's, sharded), or experts that run batched.

    Examples:
        The relevance -1 of ``y = 2 * 1 + -1 * 3``; the negative contribution is favoured:

        >>> import torch
        >>> x, weight, g = torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 3.0]]), torch.ones(1)
        >>> x * Gamma(0.25).backward(g, x, weight, None)[0]
        tensor([ 1.1429, -2.1429])
    """

    gamma: float = 0.25
    name: str = "gamma"

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise InputError(f"gamma must be at least 0, got {self.gamma}")

    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`LinearRule.backward`; see :func:`lenslrp.hooks.rules.gamma_linear`."""
        return gamma_linear(g, x, weight, bias, self.gamma)


@dataclass(frozen=True)
class AlphaBeta:
    """The alpha-beta rule for linear layers and convolutions; z+ is (1, 0) ([A] Eq. 25).

    ``alpha`` of the relevance goes to positive contributions and ``-beta`` to negative ones, each
    in proportion. The bias is one more contribution: its share is the ledger's ``biases`` term.
    Where an output has no contribution of a sign, that part is the ``stabiliser`` term.

    Attributes:
        alpha: ``1 + beta``.
        beta: at least 0.

    Raises:
        InputError: ``alpha - beta`` is not 1, or beta is negative. When rules are attached: as
            :class:`Gamma`.

    Examples:
        The relevance -1 of ``y = 2 * 1 + -1 * 3``, twice to the 2, and less once to the -3:

        >>> import torch
        >>> x, weight, g = torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 3.0]]), torch.ones(1)
        >>> x * AlphaBeta(2.0, 1.0).backward(g, x, weight, None)[0]
        tensor([-2.,  1.])
    """

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
        """As :meth:`LinearRule.backward`; see :func:`lenslrp.hooks.rules.alpha_beta_linear`."""
        return alpha_beta_linear(g, x, weight, bias, self.alpha, self.beta)


ZPLUS = AlphaBeta(1.0, 0.0, "z+")
"""The z+ rule: only positive contributions count ([A] Eq. 25)."""
