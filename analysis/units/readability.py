"""Whether the tokens at the end of a list say something, or are what any direction would list.

Every direction of the residual stream has ten highest tokens, a random one too. They say something
where they are related to one another, and that can be seen in the rows that stand for them (the
unembedding's for what is written, the embedding's for what is read)::

    row' = row - mean - its part in the first d_model / 100 principal components
    two tokens are related: cos(row', row') > the quantile 1 - 0.01 / pairs of random tokens'

The components that are taken out (Mu and Viswanath 2018, "All-but-the-top", arXiv:1702.01417) say
how frequent a token is and how it is cut, and would relate all rare fragments to one another. Of a
list of random tokens, one in a hundred holds any related pair. A list is **readable** where at
least four tokens of ten are related to another one of it.

Some tokens are related to nothing, whatever their rows say: special tokens, bytes that make no
character, and tokens that training has hardly touched (Land and Bartolo 2024, arXiv:2405.05417),
whose rows' length is far below the others'. They are `junk`, and count as not related.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lenslrp.analysis.units.unembedding import (
    VOCABULARY_CHUNK,
    embedding,
    token_labels,
    unembedding,
)
from lenslrp.errors import InputError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

READ_TOKENS = 10
"""Tokens of a list that are judged."""

READABLE_SHARE = 0.4
"""Share of a list's tokens that are related to another one of it, from which on it is readable."""

CHANCE = 0.01
"""Of lists of random tokens, those with any related pair."""

UNTRAINED = -4.0
"""Robust standard deviations of the rows' log length, below which a token is hardly trained."""

SAMPLED_ROWS = 8192
COMPARED_ROWS = 2048
LISTS_AT_ONCE = 4096
STATUSES = ("related", "unrelated", "junk")


@dataclass(frozen=True, eq=False)
class Readability:
    """Lists of tokens, each token with whether another one of its list is related to it.

    Attributes:
        related: [list, token].
        junk: [list, token]: special, part of a character, or hardly trained.
    """

    related: Bool[Tensor, "list token"]
    junk: Bool[Tensor, "list token"]

    @property
    def share(self) -> Float[Tensor, " list"]:
        """Share of each list's tokens that are related to another one of it."""
        return self.related.float().mean(dim=1)

    @property
    def readable(self) -> Bool[Tensor, " list"]:
        return self.share >= READABLE_SHARE

    @property
    def status(self) -> Int[Tensor, "list token"]:
        """Of each token, which of `STATUSES`."""
        return torch.where(self.junk, 2, torch.where(self.related, 0, 1))


@dataclass(frozen=True, eq=False)
class TokenRelations:
    """Which tokens of a model are related, as it writes or reads them; see the module.

    Attributes:
        rows: those of the unembedding, or of the embedding.
        mean: of the rows.
        components: [d_model, component], taken out.
        junk: [row].
        cosines: of random pairs, ascending.

    Examples:
        ```python
        relations = TokenRelations.of(model, "writes")
        best = writes(model, Neuron(5, 17)).scores.topk(10).indices
        relations.judged(best[None]).readable  # tensor([True])
        ```
    """

    rows: Float[Tensor, "row d_model"] = field(repr=False)
    mean: Float[Tensor, " d_model"] = field(repr=False)
    components: Float[Tensor, "d_model component"] = field(repr=False)
    junk: Bool[Tensor, " row"] = field(repr=False)
    cosines: Float[Tensor, " pair"] = field(repr=False)

    @classmethod
    @torch.no_grad()
    def of(cls, model: TransformerBridge, role: str = "writes") -> TokenRelations:
        """The relations of a model's tokens.

        Args:
            model: a ``TransformerBridge``.
            role: ``"writes"``, by the unembedding, or ``"reads"``, by the embedding.

        Raises:
            InputError: another role; the model writes or reads no tokens.
        """
        if role not in ("writes", "reads"):
            raise InputError(f"role is writes or reads, not {role!r}")
        rows = unembedding(model)[0] if role == "writes" else embedding(model)
        draw = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        sample = rows[draw[:SAMPLED_ROWS].to(rows.device)].float()
        mean = sample.mean(dim=0)
        sample = sample - mean
        taken = round(rows.shape[1] / 100)
        components = torch.linalg.eigh(sample.T @ sample).eigenvectors[:, rows.shape[1] - taken :]
        bare = cls(rows, mean, components, torch.zeros(0, dtype=torch.bool), torch.zeros(0))
        some = bare.directions(draw[:COMPARED_ROWS])
        pairs = torch.triu_indices(len(some), len(some), 1, device=some.device)
        cosines = (some @ some.T)[pairs[0], pairs[1]].cpu().sort().values
        return cls(rows, mean, components, bare.untrained() | _unspeakable(model, rows), cosines)

    def _centred(self, rows: Tensor) -> Tensor:
        centred = rows.float() - self.mean
        return centred - (centred @ self.components) @ self.components.T

    def directions(self, ids: Int[Tensor, "*list"]) -> Float[Tensor, "*list d_model"]:
        """Rows as they are compared: centred, without the first components, of length 1."""
        return torch.nn.functional.normalize(
            self._centred(self.rows[ids.to(self.rows.device)]), dim=-1
        )

    def untrained(self) -> Bool[Tensor, " row"]:
        """Tokens whose rows are far shorter than the others'."""
        chunks = self.rows.split(VOCABULARY_CHUNK)
        lengths = torch.cat([self._centred(some).norm(dim=1) for some in chunks]).cpu().log()
        low, middle, high = lengths.nanquantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        return lengths < middle + UNTRAINED * (high - low) / 1.349  # of a normal distribution

    @torch.no_grad()
    def judged(self, ids: Int[Tensor, "list token"]) -> Readability:
        """Which tokens of each list are related to another one of it.

        Args:
            ids: of tokens.
        """
        count = ids.shape[1]
        junk = self.junk[ids.cpu()]
        if count < 2:
            return Readability(torch.zeros_like(junk), junk)
        quantile = 1 - CHANCE / (count * (count - 1) / 2)
        limit = self.cosines[min(int(quantile * len(self.cosines)), len(self.cosines) - 1)]
        related = []
        for some, bad in zip(ids.split(LISTS_AT_ONCE), junk.split(LISTS_AT_ONCE), strict=True):
            rows = self.directions(some)
            close = (rows @ rows.mT).cpu() > limit
            close &= ~(bad[:, :, None] | bad[:, None, :] | torch.eye(count, dtype=torch.bool))
            related.append(close.any(dim=2))
        return Readability(torch.cat(related), junk)


def _unspeakable(model: TransformerBridge, rows: Tensor) -> Bool[Tensor, " row"]:
    """Special tokens, and bytes that make no character."""
    found = torch.zeros(len(rows), dtype=torch.bool)
    if model.tokenizer is not None:
        special, label = set(model.tokenizer.all_special_ids), token_labels(model)
        names = (label(token) for token in range(len(rows)))
        bad = [i for i, name in enumerate(names) if i in special or "⟨0x" in name]
        found[bad] = True
    return found
