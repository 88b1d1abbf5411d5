"""A site: one place in one model where one rule governs one operation."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from lenslrp.hooks.rule_types import Rule

PRODUCTS_AT_ONCE = 1 << 18
"""How many products are formed at once; with float32, 1 MiB: they stay in the processor's cache."""

LEDGER_TERMS = ("biases", "softmax", "recurrence", "positional", "stabiliser", "plain")
"""What an operation can take out of the relevance that passes through it."""


def row_sums(x: Tensor, g: Tensor, *, masked: bool = True) -> Tensor:
    """Sum of ``x * g`` over everything but the batch: [batch], float64 (float32 on MPS).

    Sums over the last axis are added up in float64: over a pattern of 4,096 tokens, float32 alone
    would be off in the fourth digit.

    Args:
        masked: ``x`` may be not finite where nothing reads it; see :func:`dots`.
    """
    return dots(x, g, masked=masked).reshape(len(x), -1).sum(dim=1, dtype=widest(x))


def dots(x: Tensor, g: Tensor, *, masked: bool = False) -> Tensor:
    """Sum of ``x * g`` over the last axis: [...], float32 for the half types.

    In pieces, so that neither the product nor what is widened is ever as large as ``x``. Asked for
    twice in a row (a site and a reader at one place), it is computed once.

    Args:
        masked: count what is not finite in ``x`` as 0. A masked score is -inf, the pattern of a
            query that sees no key is NaN; their gradient is exactly 0, and so is their relevance.
    """
    if type(x) is not Tensor or type(g) is not Tensor or x.is_meta:
        return _dots(x, g, masked)
    key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version, g._version, masked)
    for product in tuple(_recent):
        if product.gradient() is g and product.key == key and not product.activation.expired():
            return product.dots
    sums = _dots(x, g, masked)
    _recent.append(_RememberedSums(key, StorageWeakRef(x.untyped_storage()), ref(g), sums))
    return sums


def _dots(x: Tensor, g: Tensor, masked: bool) -> Tensor:
    if x.numel() > PRODUCTS_AT_ONCE and x.shape[:-1].numel() > 1:
        dim = max(range(x.ndim - 1), key=lambda axis: x.shape[axis])
        size = max(1, x.shape[dim] * PRODUCTS_AT_ONCE // x.numel())
        pairs = zip(x.split(size, dim), g.split(size, dim), strict=True)
        return torch.cat([_dots(a, b, masked) for a, b in pairs], dim)
    return (widened(x.nan_to_num(0.0, 0.0, 0.0) if masked else x) * widened(g)).sum(dim=-1)


def widened(x: Tensor) -> Tensor:
    """The half types as float32, others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def forget_products() -> None:
    """Drop what :func:`dots` remembers, at the end of a backward pass."""
    _recent.clear()


@dataclass(frozen=True)
class _RememberedSums:
    """Sums of products of two tensors, valid while both are alive and unchanged."""

    key: tuple[Any, ...]
    activation: StorageWeakRef
    gradient: ref[Tensor]
    dots: Tensor


_recent: deque[_RememberedSums] = deque(maxlen=8)


def has_values(x: Tensor) -> bool:
    """Whether a tensor holds numbers, and not only a shape (meta and fake tensors)."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def state_of(x: Tensor) -> tuple[int, int]:
    """Where a tensor's numbers are, and how often they have been written to."""
    return x.data_ptr(), 0 if x.is_inference() else x._version


def widest(x: Tensor) -> torch.dtype:
    """The type in which sums are kept on the tensor's device."""
    return torch.float32 if x.device.type == "mps" else torch.float64


class Accounts:
    """Where sites report what they absorbed, summed over the batch: (term, layer, role) -> units
    of the target.

    ``flows`` holds the total relevance of the residual stream entering and leaving each block.
    With ``rows``, the size of the batch, amounts are kept for each row: [rows].
    """

    def __init__(self, rows: int | None = None) -> None:
        self.rows = rows
        self.reported: dict[tuple[str, int | None, str], list[Tensor]] = {}
        self.flows: dict[tuple[int, str], Tensor] = {}

    @property
    def terms(self) -> dict[tuple[str, int | None, str], Tensor]:
        """(term, layer, role) -> the sum of what was reported, on the first one's device."""
        return {key: self._total(amounts) for key, amounts in self.reported.items()}

    def _total(self, amounts: list[Tensor]) -> Tensor:
        # Some modules see batch and positions, or samples of a row, as one axis: rows come first.
        rows = self.rows
        sums = [a.sum() if rows is None else a.reshape(rows, -1).sum(dim=1) for a in amounts]
        # Parts of one layer may be on different devices.
        return torch.stack([part.to(sums[0].device) for part in sums]).sum(dim=0)

    def add(self, term: str, site: Site, amount: Tensor) -> None:
        if term not in LEDGER_TERMS:
            raise KeyError(term)
        self.reported.setdefault((term, site.layer, site.role), []).append(amount)

    def clear(self) -> None:
        self.reported.clear()
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
        accounts: where to report, or ``None`` when nobody keeps a ledger.
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
    accounts: Accounts | None = field(default=None, repr=False)

    def report(self, term: str, amount: Tensor) -> None:
        if self.accounts is not None:
            self.accounts.add(term, self, amount)
