"""The prompts of a batch, each as a cache of its own without the padding of its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from lenslrp.batch import PAIRED, Batch, in_windows, reads_an_image, reads_the_encoder
from lenslrp.errors import InputError
from lenslrp.hooks.leaf_modules import WAVE_COMPONENT
from lenslrp.targets import Explained
from lenslrp.text.words import Word

if TYPE_CHECKING:
    from lenslrp.cache import RelevanceCache

TEXT = ("tokens", "embeddings", "positions", "token_ids", "attention_mask")
DECODER = ("decoder_tokens", "decoder_positions", "decoder_token_ids", "decoder_attention_mask")
IMAGE = ("patches", "patch_positions", "special")


class Rows(Sequence["RelevanceCache"]):
    """A batch as single-row caches, made when they are asked for.

    A row has copies of what belongs to its own tokens. Its ledger is that of the batch where the
    batch is this row alone; the account of a larger batch is of all of its rows together.
    """

    def __init__(self, batch: RelevanceCache) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return len(self._batch.tokens)

    @overload
    def __getitem__(self, index: int) -> RelevanceCache: ...

    @overload
    def __getitem__(self, index: slice) -> list[RelevanceCache]: ...

    def __getitem__(self, index: int | slice) -> RelevanceCache | list[RelevanceCache]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise NoSuchRow(
                f"row {index} is out of range: the batch has {len(self)}, so rows go from "
                f"{-len(self)} to {len(self) - 1}"
            )
        return _row(self._batch, index % len(self))


class NoSuchRow(InputError, IndexError):
    """A row that the batch does not have; an ``IndexError`` too, at which iteration ends."""


class _Columns:
    """The columns of one row's real tokens."""

    def __init__(self, text: Batch, row: int) -> None:
        self.real = text.mask[row].nonzero()[:, 0]
        self.width = text.mask.shape[1]
        self.positions = text.positions[row].tolist()

    def cut(self, x: Tensor, axis: int) -> Tensor:
        """``x`` at these columns; as it is where ``axis`` is not that of the stack's columns."""
        if axis >= x.ndim or x.shape[axis] != self.width:
            return x
        return x.index_select(axis, self.real.to(x.device))

    def of_list(self, items: list[str]) -> list[str]:
        return [items[column] for column in self.real.tolist()]

    def words(self, words: list[Word]) -> list[Word]:
        return [Word(word.text, [self.positions[p] for p in word.positions]) for word in words]


def _one(x: Tensor, row: int, each: int = 1) -> Tensor:
    """A copy of a row, so that one that is kept does not keep its batch; sparse stays sparse.

    ``each``: how many rows of ``x`` are of one of the batch.
    """
    return x.index_select(0, torch.arange(row * each, (row + 1) * each, device=x.device))


def _row(batch: RelevanceCache, row: int) -> RelevanceCache:
    alone = len(batch.tokens) == 1
    columns, written = _Columns(batch.batch, row), _Columns(batch.batch.written, row)
    if alone and all(len(side.real) == side.width for side in (columns, written)):
        return batch
    changes: dict[str, Any] = {}
    for names, span in ((TEXT, columns), (DECODER, written)):
        for name in names:
            value = getattr(batch, name)
            changes[name] = None if value is None else span.cut(_one(value, row), 1)
    images = {name: getattr(batch, name) for name in IMAGE} | batch.inputs
    rows = len(batch.tokens)
    windows = {k: len(v) // rows for k, v in batch.values.items() if in_windows(k)}
    shared = {k for k, v in batch.values.items() if len(v) != windows.get(k, 1) * rows}
    lost = sorted({k for k, v in images.items() if v is not None and len(v) != len(batch.tokens)})
    kept: dict[str, Any] = {
        k: None if v is None or k in lost else _one(v, row) for k, v in images.items()
    }
    notes = [*batch.coverage.notes]
    if shared or lost:
        notes.append(f"of the whole batch and not of a row: {', '.join([*sorted(shared), *lost])}")

    def cut(name: str, value: Tensor) -> Tensor:
        value = _one(value, row, windows.get(name, 1))
        if reads_an_image(name) or name in windows:
            return value
        own, reduced = batch.position_axes.get(name, 1), batch.reduced.get(name, "")
        for axis in position_axes(name, value.ndim, reduced, own):
            of_encoder = reads_the_encoder(name, keys=axis == 3)
            value = (columns if of_encoder else written).cut(value, axis)
        return value

    return replace(
        batch,
        **changes,
        **{name: kept[name] for name in IMAGE},
        inputs={name: kept[name] for name in batch.inputs if name not in lost},
        values={name: cut(name, v) for name, v in batch.values.items() if name not in shared},
        activations={k: cut(k, v) for k, v in batch.activations.items() if k not in shared},
        routing={
            name: (written if name.startswith("decoder") else columns).cut(_one(v, row), 1)
            for name, v in batch.routing.items()
        },
        str_tokens=[columns.of_list(batch.str_tokens[row])],
        decoder_str_tokens=batch.decoder_str_tokens
        and [written.of_list(batch.decoder_str_tokens[row])],
        prompts=batch.prompts[row : row + 1],
        words_=[columns.words(words) for words in batch.words_[row : row + 1]],
        decoder_words_=[written.words(words) for words in batch.decoder_words_[row : row + 1]],
        target=Explained(
            batch.target.of(row),
            batch.target.value[row : row + 1].clone(),
            asked=batch.target.asked[row : row + 1],
        ),
        coverage=replace(batch.coverage, notes=notes),
        ledger_=batch.ledger_ if alone else None,
    )


def position_axes(name: str, ndim: int, reduced: str, own: int = 1) -> tuple[int, ...]:
    """Which axes of the value at a hook point are positions.

    Args:
        name: of the hook point; patterns, scores and maps of scans are [batch, head, query, key],
            what is pooled is [batch, feature], everything else [batch, pos, ...].
        ndim: how many axes the value has.
        reduced: how it was reduced, by `lenslrp.reductions.reduction_names`.
        own: the axis where it is not reduced.
    """
    if reduced == "sum_positions":  # the sum over axis 1: of a pattern, over its heads
        return (1, 2) if name.endswith(PAIRED) and ndim == 3 else ()
    if reduced == "custom":
        return ()
    full = ndim + (reduced == "sum")
    if name.startswith(WAVE_COMPONENT):  # of samples, or [batch, channel, frame]
        return (2,) if ndim == 3 else ()
    if name.endswith(PAIRED) and full == 4:
        return (2, 3)[: ndim - 2]
    return (own,) if full > 2 else ()
