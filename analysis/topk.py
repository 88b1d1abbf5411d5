"""A running top-k for every unit at once, whose result does not depend on the order of arrival.

An entry is (value float32, document int64, position int16). Entries are ordered by
(-value, document); a document has one entry a unit, at the first position of its largest value, so
this order is total and equals (-value, document, position). Value and document are packed into one
int64 key with that order: selecting the k largest keys is then deterministic however a corpus is
cut into batches and shards, and merging is selecting again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int16, Int64
from torch import Tensor

from lenslrp.errors import InputError

DOCUMENTS = 2**32
"""How many documents a key has room for."""

EMPTY = torch.iinfo(torch.int64).min
"""The key of an entry that nothing has filled yet: below that of every number."""

Locate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(unit, row, value), each [entry] -> the first position [entry] at which a row has that value."""


def pack(
    values: Float32[Tensor, "unit row"], docs: Int64[Tensor, " row"]
) -> Int64[Tensor, "unit row"]:
    """Keys whose descending order is (-value, document). -0.0 counts as 0.0."""
    bits = (values + 0.0).contiguous().view(torch.int32)
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    return (ordered.long() << 32) | (DOCUMENTS - 1 - docs)


def unpack(keys: Int64[Tensor, "*s"]) -> tuple[Float32[Tensor, "*s"], Int64[Tensor, "*s"]]:
    """Values and documents of keys; NaN and -1 where an entry is empty."""
    ordered = (keys >> 32).int()
    bits = torch.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF)
    docs = DOCUMENTS - 1 - (keys & (DOCUMENTS - 1))
    empty = keys == EMPTY
    return bits.view(torch.float32).masked_fill(empty, float("nan")), docs.masked_fill(empty, -1)


@dataclass
class TopK:
    """The best k entries of each unit so far.

    Attributes:
        keys: [unit, k], descending.
        positions: [unit, k], in the document.
    """

    keys: Int64[Tensor, "unit k"]
    positions: Int16[Tensor, "unit k"]

    @classmethod
    def empty(cls, units: int, k: int) -> TopK:
        return cls(
            torch.full((units, k), EMPTY, dtype=torch.int64),
            torch.zeros((units, k), dtype=torch.int16),
        )

    def update(
        self,
        first: int,
        values: Float[Tensor, "unit row"],
        docs: Int64[Tensor, " row"],
        locate: Locate,
    ) -> None:
        """Take in one batch for the units ``first`` onward.

        Args:
            first: index of the first unit.
            values: the score of each document for each unit.
            docs: the documents.
            locate: asked for the positions of the entries that are new, and of no others.
        """
        units, k = len(values), self.keys.shape[1]
        keys = self.keys[first : first + units]
        positions = self.positions[first : first + units]
        fresh = pack(values.float(), docs.to(values.device)).to(keys.device)
        best, index = torch.cat([keys, fresh], dim=1).topk(k, dim=1)
        old = positions.gather(1, index.clamp(max=k - 1))
        unit, column = (index >= k).nonzero(as_tuple=True)
        if len(unit):
            row = index[unit, column] - k
            there = unit.to(values.device), row.to(values.device)
            old[unit, column] = locate(*there, values[there]).to(old)
        keys.copy_(best)
        positions.copy_(old)

    def merge(self, others: Sequence[TopK]) -> TopK:
        """The best k of several tallies over disjoint documents."""
        keys = torch.cat([self.keys, *(other.keys for other in others)], dim=1)
        positions = torch.cat([self.positions, *(other.positions for other in others)], dim=1)
        best, index = keys.topk(self.keys.shape[1], dim=1)
        return TopK(best, positions.gather(1, index))


def extremes(
    x: Float[Tensor, "row pos unit"], spans: list[tuple[int, int]], sign: int
) -> Float[Tensor, "unit row"]:
    """The largest (``sign=1``) or smallest value of each row over its span of positions."""
    rows = [
        x[row, a:b].amax(dim=0) if sign > 0 else x[row, a:b].amin(dim=0)
        for row, (a, b) in enumerate(spans)
    ]
    return torch.stack(rows, dim=1)


def locator(x: Float[Tensor, "row pos unit"], spans: list[tuple[int, int]], sign: int) -> Locate:
    """Finds first positions in one batch; ``sign`` is that of the scores against ``x``."""
    start = torch.tensor([a for a, _ in spans], device=x.device)
    stop = torch.tensor([b for _, b in spans], device=x.device)
    place = torch.arange(x.shape[1], device=x.device)

    def locate(unit: Tensor, row: Tensor, value: Tensor) -> Tensor:
        found = x[row, :, unit] == sign * value[:, None]
        found &= (place >= start[row, None]) & (place < stop[row, None])
        return found.byte().argmax(dim=1)

    return locate


def require_finite(values: Tensor, hook: str, docs: Tensor) -> None:
    """Refuse NaN and infinities, which have no place in an order.

    Raises:
        InputError: naming the hook and a document.
    """
    if not bool(values.isfinite().all()):
        row = int((~values.isfinite()).any(dim=0).nonzero()[0])
        raise InputError(
            f"{hook} is NaN or infinite in document {int(docs[row])}: activations overflowed "
            f"({values.dtype}); run the model in float32 or bfloat16"
        )


def priorities(docs: Int64[Tensor, " row"], seed: int) -> Int64[Tensor, " row"]:
    """A pseudo-random number for each document, the same in every shard (SplitMix64's finaliser).

    Returned as non-negative int64: 63 random bits.
    """
    z = docs.to(torch.int64) * -7046029254386353131 + (seed + 1) * 0x632BE59BD9B4E019 % 2**63
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    return z & torch.iinfo(torch.int64).max
