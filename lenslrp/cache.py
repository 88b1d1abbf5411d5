"""``RelevanceCache``: what ``run_with_relevance`` returns, and how to look into it."""

from __future__ import annotations

import difflib
import html
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lenslrp.batch import Batch
from lenslrp.cache_file import load_parts, save_cache
from lenslrp.difference import subtracted
from lenslrp.errors import InputError
from lenslrp.hooks.components import layer_of
from lenslrp.hooks.composites import Composite
from lenslrp.hooks.coverage import Coverage
from lenslrp.ledger import Ledger
from lenslrp.rows import Rows
from lenslrp.targets import Explained
from lenslrp.text.words import Word
from lenslrp.token_table import token_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class RelevanceCache:
    """Relevance of one target at the leaves and at every hook point that was read.

    All relevance is in units of the target (logits for a logit). Index with a hook name for its
    tensor, whose first axis is the batch; with a number for one row as a cache of its own.

    Attributes:
        tokens: per token at the leaves; positional embeddings are in ``positions``.
        embeddings: per token and feature, at the token embeddings.
        positions: per token at learned positional (and token-type) embeddings, ``None`` without.
        decoder_tokens: for an encoder-decoder, the decoder's side; ``tokens`` is the encoder's.
        decoder_positions, decoder_str_tokens, decoder_token_ids, decoder_attention_mask: likewise.
        patches: of an image (or spectrogram): per patch embedding. Without text they are, after
            the learned tokens before them (CLS), the ``tokens`` too.
        special: per learned token (CLS, distillation) of an image.
        patch_positions: per learned position of an image that stands beside text.
        inputs: per value of each float input that was given; empty with ``leaves="patches"``.
        str_tokens: the tokens as text, one list a batch row. A character that spans tokens is
            shown by the first of them, and ``⟨…⟩`` by the others; bytes that make none are
            ``⟨0xE6⟩``.
        prompts: each row as it was given; the text that its ids spell, where those were given.
        routing: the experts that each position was sent to, by the name of the mixture.
        n_experts: how many experts the mixtures have (0 without).
        target: what exactly was explained, and its value.
        coverage: which rule sat where, what it did not cover, and what is off the path.
        reduced: how the value at a hook point was reduced, where it was: ``"sum"``,
            ``"sum_positions"`` or ``"custom"``.
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
        """The hook names that were read."""
        return list(self.values)

    @cached_property
    def batch(self) -> Batch:
        """Says which column of a row a position is: ``R.batch.column(position, row)``."""
        decoder = self.decoder_attention_mask
        if decoder is None and self.decoder_tokens is not None:
            decoder = torch.ones_like(self.decoder_tokens, dtype=torch.bool)
        return Batch.of_mask(
            self.attention_mask, decoder=None if decoder is None else Batch.of_mask(decoder)
        )

    def _text_at(self, name: str, x: Tensor) -> tuple[Batch, list[list[str]]]:
        """The text whose tokens a hook point's ``x`` holds: where they are, and what they are."""
        text = self.batch.of(name, x)
        if text is self.batch:
            return text, self.str_tokens
        if text is self.batch.decoder and self.decoder_str_tokens is not None:
            return text, self.decoder_str_tokens
        return text, [[str(place) for place in range(x.shape[1])]] * len(x)

    def _by_layer(self, hook: str) -> list[tuple[int, Tensor]]:
        """(layer, tensor) for one hook of every block, in order."""
        return [(layer, value) for layer, _, value in self._blocks(hook)]

    def _blocks(self, hook: str) -> list[tuple[int, str, Tensor]]:
        blocks = []
        for name, value in self.values.items():
            layer = layer_of(name)
            if layer is not None and name.split(f".{layer}.", 1)[-1] == hook:
                blocks.append((layer, name, value.to_dense() if value.is_sparse else value))
        if not blocks:
            raise InputError(f"{hook!r} was not read in any block; ask for it in names_filter")
        return sorted(blocks, key=lambda item: item[0])

    def heads(self, row: int = 0) -> pd.DataFrame:
        """Relevance of every attention head, [layer, head], from ``attn.hook_z``."""
        rows = {}
        for layer, z in self._by_layer("attn.hook_z"):
            if z.ndim == 4:  # batch pos head d_head
                z = z.sum(dim=-1)
            if z.ndim != 3:
                raise InputError(f"hook_z was reduced to {list(z.shape)}: no heads are left in it")
            rows[layer] = z[row].sum(dim=0).tolist()
        frame = pd.DataFrame.from_dict(rows, orient="index")
        return frame.rename_axis(index="layer", columns="head")

    def experts(self, row: int = 0) -> pd.DataFrame:
        """Relevance of every expert of every mixture, [layer, expert], from
        ``mlp.hook_expert_post``: the sum over its neurons. An expert that no token was sent to
        has 0."""
        rows = {}
        for layer, value in self._by_layer("mlp.hook_expert_post"):
            if value.ndim != 4:
                raise InputError(f"hook_expert_post was reduced to {list(value.shape)}")
            chosen = self._chosen(layer)[row]
            sums = value.new_zeros(self.n_experts)
            rows[layer] = sums.index_add(0, chosen.flatten(), value[row].sum(-1).flatten()).tolist()
        frame = pd.DataFrame.from_dict(rows, orient="index")
        return frame.rename_axis(index="layer", columns="expert")

    def _chosen(self, layer: int) -> Tensor:
        return next(v for name, v in self.routing.items() if layer_of(name) == layer)

    def residual(self, row: int = 0) -> pd.DataFrame:
        """Total relevance of the residual stream, [layer, position], padding left out; the last row
        is "final"."""
        pre = self._blocks("hook_resid_pre")
        _, last, final = self._blocks("hook_resid_post")[-1]
        rows: dict[int | str, list[float]] = {}
        flat: list[tuple[int | str, str, Tensor]] = [*pre, ("final", last, final)]
        for layer, name, x in flat:
            sums = x.sum(dim=-1) if x.ndim == 3 else x
            rows[layer] = sums[row, self.batch.of(name, sums).mask[row].to(x.device)].tolist()
        frame = pd.DataFrame.from_dict(rows, orient="index")
        return frame.rename_axis(index="layer", columns="position")

    def top(self, hook: str = "mlp.hook_post", k: int = 10, row: int = 0) -> pd.DataFrame:
        """The k most relevant units (by absolute value) at one hook of every block.

        Returns:
            Columns layer, position (of the row's own text, as targets and edits count it), token,
            neuron, relevance, and activation where it was kept; at ``mlp.hook_expert_post`` also
            the expert. In tensors, the position's column is another one where padding is on the
            left.
        """
        if k < 1:
            raise InputError(f"k must be at least 1, not {k}")
        activations = {
            layer_of(name): x for name, x in self.activations.items() if name.endswith(hook)
        }
        records: list[dict[str, Any]] = []
        for layer, name, value in self._blocks(hook):
            text, tokens = self._text_at(name, value)
            positions = text.positions[row].tolist()
            experts = value.ndim == 4 and hook.endswith("hook_expert_post")
            if value.ndim != 3 and not experts:
                raise InputError(
                    f"{hook} has shape {list(value.shape)}; top() needs [batch, pos, features]"
                )
            flat, shape = value[row].flatten(), value.shape[1:]
            best = flat.abs().topk(min(k, flat.numel())).indices
            for index in torch.stack(torch.unravel_index(best.cpu(), shape), dim=1).tolist():
                if positions[index[0]] < 0:
                    continue
                record = {
                    "layer": layer,
                    "position": positions[index[0]],
                    "token": tokens[row][index[0]],
                    "neuron": index[-1],
                    "relevance": float(value[(row, *index)]),
                    "activation": float(activations[layer][(row, *index)])
                    if layer in activations
                    else float("nan"),
                }
                if experts:
                    record["expert"] = int(self._chosen(layer)[row, index[0], index[1]])
                records.append(record)
        records.sort(key=lambda record: -abs(record["relevance"]))
        return pd.DataFrame(records[:k])

    def words(self, row: int = 0, *, decoder: bool = False) -> pd.DataFrame:
        """The words of the text: one row a word with its relevance and its tokens' positions.

        A word has the white space before it, so that words join to the text. Its relevance is the
        sum over its tokens: the total is kept. Special tokens are words of their own, and padding
        is left out. Scripts without spaces are not cut into words: there a word is a token, or
        several that share a character.

        Args:
            row: which batch row.
            decoder: of an encoder-decoder, the words that its decoder was given.

        Raises:
            InputError: a model without a decoder of its own, or a file that has no words.
        """
        words, relevance = self.words_, self.tokens
        if decoder:
            if self.decoder_tokens is None:
                raise InputError("decoder=True is for encoder-decoders; this model has one text")
            words, relevance = self.decoder_words_, self.decoder_tokens
        if not words:
            raise InputError("this relevance was saved without its words; explain the text again")
        values = relevance[row].tolist()
        places = (self.batch.written if decoder else self.batch).positions[row].tolist()
        return pd.DataFrame(
            [
                (
                    word.text,
                    math.fsum(values[i] for i in word.positions),
                    [places[i] for i in word.positions],
                )
                for word in words[row]
            ],
            columns=["word", "relevance", "positions"],
        )

    def ledger(self) -> Ledger:
        """The account of the whole target; see :class:`lenslrp.Ledger`."""
        if self.ledger_ is None:
            raise InputError(
                "no ledger: this is a difference, one row of a larger batch (whose account is of "
                "all its rows), or the run had ledger=False"
            )
        return self.ledger_

    def plot(self, kind: str = "residual", **options: Any) -> Figure | Any:
        """A figure: ``"residual"`` (layer x position), ``"heads"``, ``"neurons"``, ``"ledger"``,
        ``"tokens"``, ``"image"`` (with ``image=``: over it)."""
        from lenslrp.analysis.views import (
            figures as plots,  # drawing is optional and imported when asked for
        )

        return plots.plot(self, kind, **options)

    def __sub__(self, other: RelevanceCache) -> RelevanceCache:
        """Relevance here minus there, hook by hook: of another target, composite or checkpoint.

        Raises:
            InputError: the two read other tokens, at other positions or other hook points.
        """
        return subtracted(self, other)

    @property
    def rows(self) -> Rows:
        """Every prompt of the batch as a cache of its own; ``R[i]`` is short for ``R.rows[i]``."""
        return Rows(self)

    def to_dataframe(self) -> pd.DataFrame:
        """A row a token: see :func:`lenslrp.token_table.token_table`."""
        return token_table(self)

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file (no pickle); :meth:`load` reads it back."""
        return save_cache(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> RelevanceCache:
        """Read what :meth:`save` wrote. The composite comes back as names, for display only.

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
        grid = self.grid
        for row, tokens in enumerate(self.str_tokens):
            title = f"{self.composite.name}: {self.target}" if row == 0 else f"row {row}"
            mask = self.attention_mask[row].tolist()
            values = self.tokens[row].tolist()
            rows.append(token_heatmap(tokens, values, title=title, attention_mask=mask, grid=grid))
        if self.decoder_tokens is not None and self.decoder_str_tokens is not None:
            for row, tokens in enumerate(self.decoder_str_tokens):
                written = self.decoder_tokens[row].tolist()
                rows.append(token_heatmap(tokens, written, title=f"decoder, row {row}"))
        if self.coverage.uncovered:
            rows.append(f"<p>No rule for: {html.escape('; '.join(self.coverage.uncovered))}</p>")
        return "".join(rows)
