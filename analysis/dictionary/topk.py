"""A running top-k for every unit at once, whose result does not depend on the order of arrival.

An entry is (value float32, document int64, position int16). Entries are ordered by
(-value, document); a document has one entry a unit, at the first position of its largest value, so
this order is total and equals (-value, document, position). Value and document are packed into one
int64 key with that order: selecting the k largest keys is then deterministic however a corpus is
cut into batches and shards, and taking in a batch is merging, which is selecting again.

Everything stays where the activations are: nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Float32, Int16, Int64
from torch import Tensor

from lenslrp.errors import InputError

DOCUMENTS = 2**32
"""How many documents a key has room for."""

PART = 1 << 23
"""Values of [row, pos, unit] that are in memory at a time, or one row's: many features of a whole
block are gigabytes."""

EMPTY = torch.iinfo(torch.int64).min
"""The key of an entry that nothing has filled yet: below that of every number."""

Found = tuple[Float[Tensor, "row unit"], Int16[Tensor, "row unit"]]
"""The extreme of each row and unit, and the first position that has it."""


def pack(values: Float32[Tensor, "*s"], docs: Int64[Tensor, "*#s"]) -> Int64[Tensor, "*s"]:
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
class RunningTopK:
    """The best k entries of each unit so far.

    Attributes:
        keys: [unit, k], descending.
        positions: [unit, k], in the document.
    """

    keys: Int64[Tensor, "unit k"]
    positions: Int16[Tensor, "unit k"]

    @classmethod
    def empty(cls, units: int, k: int) -> RunningTopK:
        return cls(
            torch.full((units, k), EMPTY, dtype=torch.int64),
            torch.zeros((units, k), dtype=torch.int16),
        )

    @classmethod
    def of(
        cls,
        values: Float[Tensor, "row unit"],
        positions: Int16[Tensor, "row unit"],
        docs: Int64[Tensor, " row"],
    ) -> RunningTopK:
        """The entries of one batch, in the order of its rows."""
        return cls(pack(values.float(), docs[:, None]).T, positions.T)

    def merge(self, others: Sequence[RunningTopK], *, ordered: bool = True) -> RunningTopK:
        """The best k of several tallies over disjoint documents.

        Args:
            ordered: sort them; until the next merge there is no need to.
        """
        keys = torch.cat([self.keys, *(other.keys for other in others)], dim=1)
        positions = torch.cat([self.positions, *(other.positions for other in others)], dim=1)
        best, index = keys.topk(self.keys.shape[1], dim=1, sorted=ordered)
        return RunningTopK(best, positions.gather(1, index))


@dataclass(frozen=True, eq=False)
class Spans:
    """Which positions of a batch's rows are searched: from `first` to before `ends[row]`.

    The first of these rows is row `start` of the batch. Positions in `skipped` [row, pos] are not
    searched either; a row of which nothing would be left is searched as if there were none.
    """

    first: int
    ends: list[int]
    start: int = 0
    skipped: Bool[Tensor, "row pos"] | None = None
    _on: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _parts: dict[int, list[Spans]] = field(default_factory=dict, repr=False)

    @property
    def rows(self) -> slice:
        """Which rows of the batch."""
        return slice(self.start, self.start + len(self.ends))

    def parts(self, values: int) -> list[Spans]:
        """Some rows after the other, where a row has this many values: see `PART`."""
        step = max(1, PART // values)
        if step >= len(self.ends):
            return [self]
        if step not in self._parts:
            starts = range(0, len(self.ends), step)
            self._parts[step] = [
                Spans(
                    self.first,
                    self.ends[i : i + step],
                    i,
                    None if self.skipped is None else self.skipped[i : i + step],
                )
                for i in starts
            ]
        return self._parts[step]

    def searched(self, row: int) -> list[int]:
        """The positions of a row that are searched, counted within these rows."""
        span = range(self.first, self.ends[row])
        if self.skipped is None:
            return list(span)
        return [at for at in span if not self.skipped[row, at]] or list(span)

    def filled(self, x: Float[Tensor, "row pos unit"]) -> Float[Tensor, "row pos unit"]:
        """`x` with what is skipped as at the row's first position that is searched."""
        if self.skipped is None:
            return x
        source = torch.arange(x.shape[1]).repeat(len(self.ends), 1)
        for row in self.skipped[:, self.first :].any(dim=1).nonzero()[:, 0].tolist():
            kept = self.searched(row)
            source[row, list(set(range(self.first, self.ends[row])) - set(kept))] = kept[0]
        return x.gather(1, source.to(x.device)[:, :, None].expand(x.shape))

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """On a device, made once: what is inside, of the positions that not all rows have, and how
        many positions are left at each, 0 outside: [row, pos, 1], from `min(ends)` and `first`.
        """
        if device not in self._on:
            place = torch.arange(self.first, max(self.ends))
            inside = place < torch.tensor(self.ends)[:, None]
            left = (max(self.ends) - place).float() * inside
            if self.skipped is not None:
                for row in range(len(self.ends)):
                    kept = torch.zeros(len(place), dtype=torch.bool)
                    kept[torch.tensor(self.searched(row)) - self.first] = True
                    left[row] *= kept
            tail = inside[:, min(self.ends) - self.first :, None]
            self._on[device] = tail.to(device), left[:, :, None].to(device)
        return self._on[device]


def extremes(x: Float[Tensor, "row pos unit"], spans: Spans, signs: Sequence[int]) -> list[Found]:
    """The largest (1) or smallest (-1) value of each row over its span, for each of `signs`.

    Reductions with indices take several times as long as those without, and comparisons into
    booleans as those into numbers; so the first position is found as the largest of what is left.
    """
    x = spans.filled(x)
    shortest, longest = min(spans.ends), max(spans.ends)
    inside, left = spans.on(x.device)
    whole = x[:, spans.first : longest]
    parts = [x[:, spans.first : shortest]]
    if shortest < longest:  # outside its span a row is what it is at its first position
        parts.append(torch.where(inside, x[:, shortest:longest], whole[:, :1]))
    found, same = [], torch.empty_like(whole)
    for sign in signs:
        best = parts[0].amax(dim=1) if sign > 0 else parts[0].amin(dim=1)
        for part in parts[1:]:
            other = part.amax(dim=1) if sign > 0 else part.amin(dim=1)
            best = torch.maximum(best, other) if sign > 0 else torch.minimum(best, other)
        torch.eq(whole, best[:, None], out=same)
        found.append((best, (longest - same.mul_(left).amax(dim=1)).to(torch.int16)))
    return found


def require_finite(values: Float[Tensor, "row unit"], hook: str, docs: Tensor) -> None:
    """Refuse NaN and infinities, which have no place in an order.

    Raises:
        InputError: naming the hook and a document.
    """
    if not bool(values.isfinite().all()):
        row = int((~values.isfinite()).any(dim=1).nonzero()[0])
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
