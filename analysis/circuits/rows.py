"""Rows of pairs: the tokens of two runs, which of them are real, and which correspond."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lenslrp.batch import Batch

_Rows = TypeVar("_Rows", bound="PairRows")


@dataclass(frozen=True, eq=False)
class PairRows:
    """Clean and corrupted tokens of some pairs, and their answers.

    Attributes:
        clean, corrupt: [pair, pos] token ids, padded on the right.
        mask: [pair, pos], True where a token is real: of both runs, or of the clean one where they
            have different lengths.
        answers: [pair] token ids, what the clean prompts call for; [pair, token] where some are of
            several tokens, with -1 behind the shorter ones.
        rivals: likewise, what the corrupted prompts call for: the incorrect answers.
        corrupt_mask: [pair, pos of corrupt], where lengths differ.
        counterpart: [pair, pos of clean], where lengths differ: the column of the corrupted prompt
            that a clean token corresponds to, -1 where there is none.
    """

    clean: Int[Tensor, "pair pos"]
    corrupt: Int[Tensor, "pair pos_corrupt"]
    mask: Bool[Tensor, "pair seen"]
    answers: Int[Tensor, " pair"] | Int[Tensor, "pair token"]
    rivals: Int[Tensor, " pair"] | Int[Tensor, "pair token"]
    corrupt_mask: Bool[Tensor, "pair pos_corrupt"] | None = None
    counterpart: Int[Tensor, "pair seen"] | None = None

    @cached_property
    def batch(self) -> Batch:
        """The lengths of the rows, and where in each a position is."""
        return Batch.of_mask(self.mask)

    def __len__(self) -> int:
        return len(self.answers)

    def _each(self: _Rows, function: Callable[[Tensor], Tensor]) -> _Rows:
        """Every tensor, changed row by row."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: function(x) for n, x in tensors.items() if torch.is_tensor(x)})

    def __getitem__(self: _Rows, rows: slice | Tensor) -> _Rows:
        """Some of the pairs, without the padding that they do not need."""
        some = self._each(lambda x: x[rows])
        wide, other = (
            slice(int(mask.sum(dim=1).amax()) if len(mask) else 0)
            for mask in (some.mask, some.mask if some.corrupt_mask is None else some.corrupt_mask)
        )
        changed = {"clean": wide, "mask": wide, "counterpart": wide}
        changed |= {"corrupt": other, "corrupt_mask": other}
        cut = {
            n: getattr(some, n)[:, s] for n, s in changed.items() if getattr(some, n) is not None
        }
        return replace(some, **cut)

    def chunks(self: _Rows, size: int) -> Iterator[_Rows]:
        """The pairs, `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def padded(
        self, scores: Float[Tensor, "... pos unit"], only: Iterable[Any] = ()
    ) -> Float[Tensor, "... longest unit"]:
        """Scores of some of the pairs, by position, with the padding of all of them.

        The padding is 0, or NaN where a node of `only` counts from the end.
        """
        missing = any((node.position or 0) < 0 for node in only)
        beyond = (0, 0, 0, self.mask.shape[1] - scores.shape[-2])
        return torch.nn.functional.pad(scores, beyond, value=torch.nan if missing else 0.0)

    def put(self, scores: Float[Tensor, "pair pos"], position: int, values: Tensor) -> None:
        """Write a value a pair at a position; a negative one counts from each prompt's end."""
        if position < 0:
            scores[self.batch.place(position)] = values
        elif position < scores.shape[1]:
            scores[:, position] = values

    def repeated(self: _Rows, copies: int) -> _Rows:
        """The batch `copies` times, one after the other."""
        return self._each(lambda x: x.repeat(copies, *[1] * (x.ndim - 1)))

    def seen_from(self: _Rows, side: str) -> _Rows:
        """The same rows with `mask` and `counterpart` those of the `"clean"` or `"corrupt"` run."""
        if side == "clean" or self.corrupt_mask is None or self.counterpart is None:
            return self
        back = torch.full_like(self.corrupt, -1)
        rows, columns = (self.counterpart >= 0).nonzero(as_tuple=True)
        back[rows, self.counterpart[rows, columns]] = columns
        return replace(self, mask=self.corrupt_mask, counterpart=back, corrupt_mask=None)
