"""One batch: what the model reads, and which token of which row a position names.

A position counts the real tokens of a row's own text: 0 is its first token that is not padding, -1
its last. A column counts along the axis of a padded tensor. They differ where a row is padded on
the left. Nothing else computes one from the other, knows where padding is, or which text of an
encoder-decoder a hook point belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lenslrp.errors import InputError
from lenslrp.text.spelling import Speller
from lenslrp.text.words import Row, read_row, row_of_names

PAIRED = ("hook_pattern", "hook_attn_scores", "hook_cross_pattern", "hook_scan_map")
"""Hook points of [batch, head, query, key]."""

_OF_THE_ENCODER = re.compile(
    r"^(encoder_|(embed|pos_embed|token_type_embed|rotary_emb|audio_feature_extractor|feat_proj)\.)"
)
_READ_FROM_IT = re.compile(r"\.cross_attn\.(k|v|hook_k|hook_v|hook_rot_k)(\.|$)")


def reads_an_image(hook: str) -> bool:
    """Whether a hook point is in the vision tower of a model that reads text as well."""
    return hook.startswith("vision_")


def in_windows(hook: str) -> bool:
    """Whether a hook point may hold a row for each window of an image, one image after another."""
    return hook.startswith("stage")


def reads_the_encoder(hook: str, *, keys: bool = False) -> bool:
    """Whether a hook point of an encoder-decoder holds a row for each token that was read.

    ``keys``: by the last axis of a pattern, which in cross-attention are the encoder's.
    """
    crosses = ".cross_attn." in hook or hook.endswith("hook_cross_pattern")
    return bool(_OF_THE_ENCODER.match(hook) or _READ_FROM_IT.search(hook) or (keys and crosses))


@dataclass(frozen=True)
class Batch:
    """One batch, ready for the forward pass.

    Attributes:
        tokens: [batch, pos] token ids (zeros where only embeddings were given).
        mask: [batch, pos], True where a token is real.
        prompt_lengths: real tokens of the prompt in each row.
        kwargs: what the forward pass takes besides.
        texts: what the rows were made from, where that was text.
    """

    tokens: Tensor
    mask: Tensor
    prompt_lengths: list[int]
    kwargs: dict[str, Any] = field(default_factory=dict)
    decoder: Batch | None = None  #: what the decoder of an encoder-decoder is given
    media: dict[str, Tensor] = field(default_factory=dict)  #: pixels, samples: floats, checked
    names: list[str] | None = None  #: what the tokens of an image or a sound are called
    texts: list[str] | None = None

    @classmethod
    def of_mask(
        cls,
        mask: Bool[Tensor, "batch pos"],
        prompt_lengths: list[int] | None = None,
        decoder: Batch | None = None,
    ) -> Batch:
        """The rows of which only the mask is known; all of a row is its prompt if not said."""
        lengths = mask.sum(dim=1).tolist() if prompt_lengths is None else prompt_lengths
        return cls(torch.zeros_like(mask, dtype=torch.long), mask, lengths, decoder=decoder)

    def texts_of(self, row: int) -> Batch:
        """One row, as far as its texts go: their masks, and how long the prompt is."""
        decoder = None if self.decoder is None else self.decoder.texts_of(row)
        one = slice(row, row + 1)
        return Batch.of_mask(self.mask[one], self.prompt_lengths[one], decoder)

    @classmethod
    def of_rows(cls, rows: Sequence[Any], side: str = "right", pad: int = 0) -> Batch:
        """Rows of token ids (lists, tensors) in one tensor, padded with ``pad`` on one side."""
        width = max(len(row) for row in rows)
        tokens = torch.full((len(rows), width), pad, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.bool)
        for index, row in enumerate(rows):
            span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            tokens[index, span] = torch.as_tensor(row)
            mask[index, span] = True
        return cls(tokens, mask, [len(row) for row in rows])

    def rows(self, tokenizer: Any) -> list[Row]:
        """Every row as text."""
        if self.names is not None:
            return [row_of_names(self.names) for _ in self.tokens]
        if "inputs_embeds" in self.kwargs or tokenizer is None:
            pairs = zip(self.tokens.tolist(), self.mask.tolist(), strict=True)
            return [row_of_names([str(i) for i in row], mask) for row, mask in pairs]
        speller = Speller(tokenizer)
        texts: Sequence[str | None] = self.texts or [None] * len(self.tokens)
        columns = (self.tokens.tolist(), self.mask.tolist(), self.prompt_lengths, texts)
        return [read_row(speller, *row) for row in zip(*columns, strict=True)]

    def str_tokens(self, tokenizer: Any) -> list[list[str]]:
        return [row.pieces for row in self.rows(tokenizer)]

    def repeated(self, copies: int) -> Batch:
        """The batch ``copies`` times, one after the other, without an image or a sound."""

        def repeat(value: Any) -> Any:
            alike = isinstance(value, Tensor) and len(value) == len(self.tokens)
            return value.repeat(copies, *[1] * (value.ndim - 1)) if alike else value

        return replace(
            self,
            tokens=repeat(self.tokens),
            mask=repeat(self.mask),
            prompt_lengths=self.prompt_lengths * copies,
            kwargs={name: repeat(value) for name, value in self.kwargs.items()},
        )

    @property
    def written(self) -> Batch:
        """The text that the logits belong to: the decoder's, of an encoder-decoder."""
        return self.decoder or self

    @cached_property
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        counts: list[int] = self.mask.sum(dim=1).tolist()
        return counts

    @cached_property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """The position of every column, -1 at padding."""
        return (self.mask.long().cumsum(dim=1) - 1).masked_fill(~self.mask, -1)

    def require(
        self, position: int, what: str = "position", rows: Sequence[int] | None = None
    ) -> None:
        """Refuse what is no position of every row (of ``rows``).

        Raises:
            InputError: naming ``what``, and the positions that there are.
        """
        if isinstance(position, bool) or not isinstance(position, int):
            raise InputError(f"{what} must be an integer, not {position!r}")
        lengths = self.lengths if rows is None else [self.lengths[row] for row in rows]
        shortest = min(lengths, default=0)
        if lengths and not -shortest <= position < shortest:
            raise InputError(
                f"{what} {position} is out of range: the shortest row has {shortest} tokens, so "
                f"positions go from {-shortest} to {shortest - 1}"
            )

    def columns(self, position: int) -> Int[Tensor, " batch"]:
        """The column of a position in each row.

        Raises:
            InputError: a position that a row lacks, or no integer.
        """
        self.require(position)
        rows = torch.arange(len(self.mask), device=self.mask.device)
        return self.columns_at(rows, rows.new_full(rows.shape, position))

    def column(self, position: int, row: int = 0, what: str = "position") -> int:
        """The column of a position in one row.

        Raises:
            InputError: a position that the row lacks, or no integer.
        """
        self.require(position, what, [row])
        return int(self.columns_at(torch.tensor(row), torch.tensor(position)))

    def columns_at(self, rows: Int[Tensor, " n"], positions: Int[Tensor, " n"]) -> Tensor:
        """[n], the column of each of some positions, which the rows must have."""
        order = self.mask.int().argsort(dim=1, descending=True, stable=True)  # real tokens first
        rows, positions = rows.to(order.device), positions.to(order.device)
        length = self.mask.sum(dim=1)[rows]
        return order[rows, torch.where(positions < 0, positions + length, positions)]

    def where(self, positions: Sequence[int]) -> Bool[Tensor, "batch pos"]:
        """True at some positions, in the rows that have them."""
        indices = torch.tensor(list(positions), dtype=torch.long).to(self.mask.device)
        counted = indices + torch.where(indices < 0, self.mask.sum(dim=1, keepdim=True), 0)
        return (self.positions[:, :, None] == counted[:, None]).any(dim=-1) & self.mask

    def place(self, position: int | None) -> tuple[Any, Any]:
        """Rows and columns, to index a tensor with, of a position in the rows that have it."""
        if position is None:
            return slice(None), slice(None)
        rows, columns = self.where([position]).nonzero(as_tuple=True)
        return rows, columns

    def picked(self, x: Tensor, position: int) -> Tensor:
        """``x`` [batch, pos, ...] at a position: [batch, ...].

        Raises:
            InputError: see `columns`.
        """
        columns = self.columns(position).to(x.device)
        return x[torch.arange(len(x), device=x.device), columns]

    def span(self, length: int) -> Int[Tensor, "batch length"]:
        """The columns whose logits predict ``length`` tokens after each row's prompt."""
        first = self.mask.int().argmax(dim=1)
        last = first + (torch.tensor(self.prompt_lengths) - 1).to(first.device)
        return last[:, None] + torch.arange(length).to(first.device)

    def of(self, hook: str, x: Tensor, axis: int = 1) -> Batch:
        """The text whose tokens lie along ``axis`` of the tensor at a hook point.

        A sequence that is none of the texts (the patches of an image) has no padding.

        Raises:
            InputError: a tensor with rows of its own (the pictures of a vision tower, say).
        """
        if len(x) != len(self.mask):
            raise InputError(
                f"{hook} is {list(x.shape)}: its {len(x)} rows are not those of the batch, of "
                f"{len(self.mask)}, so it has no positions of the batch's"
            )
        texts = [self] if self.decoder is None else [self, self.decoder]
        if self.decoder is not None and not reads_the_encoder(hook, keys=axis == 3):
            texts.reverse()
        fits = [text for text in texts if text.mask.shape[1] == x.shape[axis]]
        fits = [] if reads_an_image(hook) else fits
        return fits[0] if fits else Batch.of_mask(torch.ones(len(x), x.shape[axis]).bool())
