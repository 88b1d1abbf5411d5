"""A site: one place in one model where one rule governs one operation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lenslrp.hooks.rules import Rule

TERMS = ("biases", "softmax", "positional", "stabiliser", "plain")
"""What an operation can take out of the relevance that passes through it."""


def row_sums(x: Tensor, g: Tensor) -> Tensor:
    """Sum of ``x * g`` over everything but the batch: [batch], float64 (float32 on MPS).

    Dot products, without a tensor for ``x * g``. They are taken over the last axis and added up in
    float64: over a pattern of 4,096 tokens, float32 alone would be off in the fourth digit. A
    masked score is -inf (or the type's minimum), the pattern of a query that sees no key is NaN,
    and their gradient is exactly 0: so is their relevance (:func:`masked_to_zero`).
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        x, g = x.float(), g.float()
    sums = _dots(x, g)
    if has_values(sums) and bool(sums.isnan().any()):
        sums = _dots(masked_to_zero(x, g), g)
    return sums


def masked_to_zero(x: Tensor, g: Tensor) -> Tensor:
    """``x`` with 0 for what is not finite and has a gradient of exactly 0: nothing reads it."""
    return x.masked_fill(~x.isfinite() & (g == 0), 0.0)


def _dots(x: Tensor, g: Tensor) -> Tensor:
    dots: Tensor = torch.einsum("...d,...d->...", x, g)
    return dots.reshape(len(x), -1).sum(dim=1, dtype=widest(x))


def has_values(x: Tensor) -> bool:
    """Whether a tensor holds numbers, and not only a shape (meta and fake tensors)."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def widest(x: Tensor) -> torch.dtype:
    """The type in which sums are kept on the tensor's device."""
    return torch.float32 if x.device.type == "mps" else torch.float64


class Books:
    """Where sites report what they absorbed, summed over the batch: (term, layer, role) -> units
    of the target.

    ``flows`` holds the total relevance of the residual stream entering and leaving each block.
    With ``rows``, the size of the batch, amounts are kept for each row: [rows].
    """

    def __init__(self, rows: int | None = None) -> None:
        self.rows = rows
        self.terms: dict[tuple[str, int | None, str], Tensor] = {}
        self.flows: dict[tuple[int, str], Tensor] = {}

    def add(self, term: str, site: Site, amount: Tensor) -> None:
        if term not in TERMS:
            raise KeyError(term)
        key = (term, site.layer, site.role)
        # Some modules see batch and positions, or samples of a row, as one axis: rows come first.
        amount = amount.sum() if self.rows is None else amount.reshape(self.rows, -1).sum(dim=1)
        if key in self.terms:  # parts of one layer may be on different devices
            amount = self.terms[key] + amount.to(self.terms[key].device)
        self.terms[key] = amount

    def clear(self) -> None:
        self.terms.clear()
        self.flows.clear()


@dataclass(eq=False)
class Site:
    """One attached rule.

    Attributes:
        hook: the hook point or component path at which it sits.
        component: class name of the component it belongs to.
        role: the operation's role, a key of :data:`lenslrp.hooks.composites.ROLES`.
        rule: the rule in force.
        layer: index of the block, ``None`` outside the blocks.
        forward, backward: how often it has fired since the rules were attached.
        cut: the composite leaves it off the path (CP's gate and query norms): it never fires.
        order: when it last ran: autograd's number for its node.
        optional: it stands for operations that a module may or may not have.
        passed_over: hooks of the user's on its module may put something else in its place.
        copies: what its operation returns is a copy of what is kept for the backward pass, because
            something writes to it in place.
        books: where to report, or ``None`` when nobody keeps a ledger.
    """

    hook: str
    component: str
    role: str
    rule: Rule
    layer: int | None
    forward: int = 0
    backward: int = 0
    cut: bool = False
    optional: bool = False
    passed_over: bool = False
    copies: bool = False
    order: int = -1
    books: Books | None = field(default=None, repr=False)

    def report(self, term: str, amount: Tensor) -> None:
        if self.books is not None:
            self.books.add(term, self, amount)
