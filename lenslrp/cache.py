"""``RelevanceCache``: what ``run_with_relevance`` returns, and how to look into it."""

from __future__ import annotations

import difflib
import html
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lenslrp import tables
from lenslrp.batch import Batch
from lenslrp.cache_file import load_parts, save_cache
from lenslrp.difference import subtracted
from lenslrp.errors import InputError
from lenslrp.hooks.composites import Composite
from lenslrp.hooks.coverage import Coverage
from lenslrp.ledger import Ledger
from lenslrp.rows import Rows
from lenslrp.targets import Explained
from lenslrp.text.words import Word

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SHOWN_ROWS = 8
"""Rows of a batch that a notebook shows."""


@dataclass(frozen=True, eq=False)
class RelevanceCache:
    """Relevance of one target at the leaves and at every hook point that was read.

    Returned by `run_with_relevance`. All relevance is in units of the target (logits for a logit)
    and signed: positive relevance is positive evidence for the target. Index with a hook name for
    its tensor, whose first axis is the batch; with a number for one row as a cache of its own.

    Examples:
        >>> logits, R = lenslrp.run_with_relevance(model, "The capital of France is", " Paris")
        >>> R.tokens.shape, R["blocks.5.mlp.hook_post"].shape, R[0].str_tokens[0][-1]
        (torch.Size([1, 5]), torch.Size([1, 5, 1536]), ' is')

    Attributes:
        values: what was read, by hook point: [batch, pos, ...] as the activations are, or reduced.
        activations: those of hook points whose reader keeps them, likewise.
        tokens: per token at the leaves; positional embeddings are in ``positions``.
        embeddings: per token and feature, at the token embeddings.
        positions: per token at learned positional (and token-type) embeddings, ``None`` without.
        decoder_tokens: for an encoder-decoder, the decoder's side; ``tokens`` is the encoder's.
        decoder_positions: likewise.
        decoder_str_tokens: likewise.
        decoder_token_ids: likewise.
        decoder_attention_mask: likewise.
        patches: of an image (or spectrogram): per patch embedding. Without text they are, after
            the learned tokens before them (CLS), the ``tokens`` too.
        special: per learned token (CLS, distillation) of an image.
        patch_positions: per learned position of an image that stands beside text.
        inputs: per value of each float input that was given; empty with ``leaves="patches"``.
        token_ids: the tokens that were read; zeros where only embeddings were given.
        attention_mask: True where a token is real, False at padding.
        str_tokens: the tokens as text, one list a batch row. A character that spans tokens is
            shown by the first of them, and ``⟨…⟩`` by the others; bytes that make none are
            ``⟨0xE6⟩``.
        prompts: each row as it was given; the text that its ids spell, where those were given.
        routing: the experts that each position was sent to, by the name of the mixture.
        n_experts: how many experts the mixtures have (0 without).
        target: what exactly was explained, and its value in each row.
        composite: the rules.
        model_name: the model's name, as TransformerLens has it.
        dtype: of the target's value: `"float32"`, `"bfloat16"`, ...
        coverage: which rule sat where, what it did not cover, and what is off the path.
        reduced: how the value at a hook point was reduced, where it was: ``"sum"``,
            ``"sum_positions"`` or ``"custom"``.
        position_axes: which axis of the value at a hook point is the positions', where it is not
            the second: [batch, head, pos, d_head] behind some norms of queries and keys.
        words_: what `words` reads, for each row.
        decoder_words_: likewise, of the decoder.
        ledger_: what `ledger` returns; ``None`` where there is none.
    """

    values: dict[str, Tensor] = field(repr=False)
    activations: dict[str, Tensor] = field(repr=False)
    tokens: Float[Tensor, "batch pos"]
    embeddings: Float[Tensor, "batch pos d_model"] | None = field(repr=False)
    positions: Float[Tensor, "batch pos"] | None
    token_ids: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"]
    str_tokens: list[list[str]]
    target: Explained
    composite: Composite
    coverage: Coverage = field(repr=False)
    ledger_: Ledger | None = field(repr=False)
    model_name: str
    dtype: str
    decoder_tokens: Float[Tensor, "batch written"] | None = None
    decoder_positions: Float[Tensor, "batch written"] | None = None
    decoder_str_tokens: list[list[str]] | None = None
    prompts: list[str] = field(default_factory=list, repr=False)
    words_: list[list[Word]] = field(default_factory=list, repr=False)
    decoder_words_: list[list[Word]] = field(default_factory=list, repr=False)
    routing: dict[str, Int[Tensor, "batch pos slot"]] = field(default_factory=dict, repr=False)
    n_experts: int = 0
    patches: Float[Tensor, "images rows columns"] | None = None
    patch_positions: Float[Tensor, "images places"] | None = None
    special: Float[Tensor, "images learned"] | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict, repr=False)
    decoder_token_ids: Int[Tensor, "batch written"] | None = None
    decoder_attention_mask: Bool[Tensor, "batch written"] | None = None
    reduced: dict[str, str] = field(default_factory=dict, repr=False)
    position_axes: dict[str, int] = field(default_factory=dict, repr=False)

    @property
    def pixels(self) -> Tensor | None:
        """Relevance of an image's values, [batch, channel, height, width]; ``None`` without."""
        return self.inputs.get("pixel_values")

    @overload
    def __getitem__(self, name: str) -> Tensor: ...

    @overload
    def __getitem__(self, name: int) -> RelevanceCache: ...

    def __getitem__(self, name: str | int) -> Tensor | RelevanceCache:
        if isinstance(name, int):
            return self.rows[name]
        if name in self.values:
            return self.values[name]
        if name in self.coverage.off_path:
            raise InputError(
                f"{name} is not on the path in this pass: no relevance was formed there"
            )
        near = difflib.get_close_matches(name, self.values, n=3) or list(self.values)[:3]
        raise InputError(f"no relevance was read at {name!r}; nearest: {', '.join(near)}")

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def keys(self) -> list[str]:
        """The hook points that were read, in the order of the forward pass."""
        return list(self.values)

    @cached_property
    def batch(self) -> Batch:
        """What was read: it says which column of a row a position is.

        Examples:
            >>> R.tokens[0, R.batch.column(-1, 0)]  # of row 0's last real token
            tensor(3.6442)
        """
        decoder = self.decoder_attention_mask
        if decoder is None and self.decoder_tokens is not None:
            decoder = torch.ones_like(self.decoder_tokens, dtype=torch.bool)
        return Batch.of_mask(
            self.attention_mask, decoder=None if decoder is None else Batch.of_mask(decoder)
        )

    def heads(self, row: int = 0) -> pd.DataFrame:
        """Relevance of heads: `attn.hook_z`, and recurrent mixers' `hook_scan_out` (`"3.mixer"`).

        Args:
            row: which prompt of the batch.

        Returns:
            [layer, head], in the target's unit (logits for a logit); NaN where a layer has fewer.

        Raises:
            InputError: neither was read, or was reduced over the heads.

        Examples:
            >>> R.heads().shape  # a model of 30 layers with 9 heads each
            (30, 9)
        """
        return tables.head_table(self, row)

    def experts(self, row: int = 0) -> pd.DataFrame:
        """Relevance of every expert of every mixture: `mlp.hook_expert_post`, summed over neurons.

        Args:
            row: which prompt of the batch.

        Returns:
            [layer, expert], in the target's unit. An expert that no token was sent to has 0.

        Raises:
            InputError: `mlp.hook_expert_post` was not read, or was reduced.
        """
        return tables.expert_table(self, row)

    def residual(self, row: int = 0) -> pd.DataFrame:
        """Relevance of the residual stream: before every block, and after the last one.

        Args:
            row: which prompt of the batch.

        Returns:
            [layer, position], in the target's unit, padding left out; the last row is `"final"`.
            Each row sums to the target but for what the layers above absorb (see `ledger`).

        Raises:
            InputError: `hook_resid_pre` or `hook_resid_post` was not read.
        """
        return tables.residual_table(self, row)

    def top(self, hook: str = "mlp.hook_post", k: int = 10, row: int = 0) -> pd.DataFrame:
        """The k most relevant units, by absolute value, at one hook of every block.

        Args:
            hook: a hook point inside a block, whose relevance is [batch, pos, features].
            k: how many units, over all layers and positions.
            row: which prompt of the batch.

        Returns:
            Columns `layer`, `position` (of the row's own text, as targets and edits count it),
            `token`, `neuron`, `relevance` (in the target's unit) and `activation` (where it was
            kept); at `mlp.hook_expert_post` also `expert`. In tensors, the position's column is
            another one where padding is on the left.

        Raises:
            InputError: `k` below 1, or a hook that was not read, or was reduced.

        Examples:
            >>> R.top("mlp.hook_post", k=1)[["layer", "position", "neuron"]].to_numpy().shape
            (1, 3)
        """
        return tables.top_table(self, hook, k, row)

    def words(self, row: int = 0, *, decoder: bool = False) -> pd.DataFrame:
        """The words of the text: one row a word with its relevance and its tokens' positions.

        A word has the white space before it, so that words join to the text. Its relevance is the
        sum over its tokens: the total is kept. Special tokens are words of their own, and padding
        is left out. Scripts without spaces are not cut into words: there a word is a token, or
        several that share a character.

        Args:
            row: which prompt of the batch.
            decoder: of an encoder-decoder, the words that its decoder was given.

        Returns:
            Columns `word`, `relevance` (in the target's unit) and `positions` (of the word's
            tokens, as targets count them).

        Raises:
            InputError: a model without a decoder of its own, or a file that has no words.

        Examples:
            >>> R.words()["word"].tolist()
            ['The', ' capital', ' of', ' France', ' is']
        """
        return tables.word_table(self, row, decoder=decoder)

    def ledger(self) -> Ledger:
        """The account of the whole target: what arrived at the leaves, and what was absorbed.

        Returns:
            A `Ledger`, summed over the batch.

        Raises:
            InputError: a difference or one row of a larger batch has none, nor has a run with
                ``ledger=False``.

        Examples:
            >>> abs(R.ledger().error) < 1e-4
            True
        """
        if self.ledger_ is None:
            raise InputError(
                "no ledger: this is a difference, one row of a larger batch (whose account is of "
                "all its rows), or the run had ledger=False"
            )
        return self.ledger_

    def plot(self, kind: str = "residual", **options: Any) -> Figure | Any:
        """Draw relevance with matplotlib (the extra `plot`).

        Args:
            kind: ``"residual"`` (layer x position), ``"heads"``, ``"neurons"``, ``"ledger"``,
                ``"tokens"``, or ``"image"`` (with ``image=``: over it).
            options: what the figure of that kind takes besides, such as ``row``.

        Returns:
            A matplotlib figure.

        Raises:
            InputError: another kind, or a hook that it draws was not read.
            MissingExtraError: matplotlib is not installed.
        """
        from lenslrp.analysis.views import (
            figures as plots,  # drawing is optional and imported when asked for
        )

        return plots.plot(self, kind, **options)

    def __sub__(self, other: RelevanceCache) -> RelevanceCache:
        """Relevance here minus there, hook by hook: of another target, composite or checkpoint.

        Raises:
            InputError: the two read other tokens, at other positions or other hook points.

        Examples:
            >>> (R_paris - R_rome).target.text
            "(logit of ' Paris' at position -1) - (logit of ' Rome' at position -1)"
        """
        return subtracted(self, other)

    @property
    def rows(self) -> Rows:
        """Every prompt of the batch as a cache of its own; ``R[i]`` is short for ``R.rows[i]``."""
        return Rows(self)

    def to_dataframe(self) -> pd.DataFrame:
        """Relevance at the leaves, a row a token; padding is left out.

        Returns:
            ``row`` (which prompt of the batch), ``prompt``, ``position`` (0 is the row's first
            token that is not padding), ``token``, ``token_id``, ``relevance``, ``target`` (what was
            explained in this row) and ``value`` (its value; relevance is in its unit). Where a
            model has them: ``side`` (``encoder`` or ``decoder``; ``text`` or ``image`` where it
            reads both), ``positional`` (relevance of the learned position) and ``patch_row``,
            ``patch_column``.
        """
        return tables.token_table(self)

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file (no pickle); `load` reads it back.

        Args:
            path: where. An earlier file of this kind is replaced, whole or not at all.

        Returns:
            The path.

        Raises:
            InputError: the folder is not there, or ``path`` is one.
            StorageError: the file cannot be written, or another one is there.
        """
        return save_cache(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> RelevanceCache:
        """Read what `save` wrote. The composite comes back as names, for display only.

        Args:
            path: of the file.

        Raises:
            InputError: a file that is something else.
        """
        return cls(**load_parts(Path(path)))

    def __repr__(self) -> str:
        batch, length = self.tokens.shape
        return (
            f"RelevanceCache({self.composite.name}, {self.target}, batch {batch}, {length} tokens, "
            f"{len(self.values)} hooks)"
        )

    @property
    def grid(self) -> tuple[int, int] | None:
        """(rows, columns) of the image whose patches the last tokens are, if they are."""
        if self.patches is None:
            return None
        rows, columns = self.patches.shape[1:]
        named = self.str_tokens[0][-1] == f"{rows - 1},{columns - 1}"
        return (rows, columns) if named and self.tokens.shape[1] >= rows * columns else None

    def _repr_html_(self) -> str:
        from lenslrp.views.heatmap import token_heatmap

        rows = []
        several = len(self.str_tokens) > 1
        for row, tokens in enumerate(self.str_tokens[:SHOWN_ROWS]):
            value = f"{self.target.of(row)} = {float(self.target.value[row]):.4g}"
            where = f"{self.composite.name}{f', row {row}, its own scale' * several}: "
            mask = self.attention_mask[row].tolist()
            rows.append(
                token_heatmap(
                    tokens, self.tokens[row].tolist(), title=where + value, attention_mask=mask,
                    grid=self.grid,
                )
            )  # fmt: skip
            if self.decoder_tokens is not None and self.decoder_str_tokens is not None:
                written, title = self.decoder_tokens[row].tolist(), f"decoder of {where}{value}"
                rows.append(token_heatmap(self.decoder_str_tokens[row], written, title=title))
        if len(self.str_tokens) > SHOWN_ROWS:
            rows.append(f"<p>{len(self.str_tokens) - SHOWN_ROWS} more rows: R[row] shows one.</p>")
        if self.coverage.uncovered:
            rows.append(f"<p>No rule for: {html.escape('; '.join(self.coverage.uncovered))}</p>")
        return "".join(rows)
