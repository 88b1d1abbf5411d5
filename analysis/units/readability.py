"""Whether the tokens at the end of a list say something, or are what any direction would list.

Every direction of the residual stream has ten highest tokens, a random one too. They say something
where they are related to one another, and that can be seen in the rows that stand for them (the
unembedding's for what is written, the embedding's for what is read)::

    row' = row - mean - its part in the first d_model / 100 principal components
    two tokens are related: cos(row', row') > the quantile 1 - 0.01 / pairs of random tokens'

The components that are taken out (Mu and Viswanath 2018, "All-but-the-top", arXiv:1702.01417) say
how frequent a token is and how it is cut, and would relate all rare fragments to one another. Of a
list of random tokens, one in a hundred holds any related pair. A list is **readable** where at
least four tokens of ten are one group, in which each is related to another one; two pairs that have
nothing to do with each other are no meaning.

Some tokens are related to nothing, whatever their rows say: special tokens, bytes that make no
character, and tokens that training has hardly touched (Land and Bartolo 2024, arXiv:2405.05417),
whose rows' length is far below the others'. They are `junk`, and count as not related.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lenslrp.analysis.units.unembedding import (
    VOCABULARY_CHUNK,
    embedding,
    unembedding,
)
from lenslrp.errors import InputError
from lenslrp.media import labels_of
from lenslrp.text.spelling import Speller

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.analysis.units.projection import VocabularyScores

UNRELATED = "no group of related tokens"
"""What is said of a list that is not readable by this; a reader may still find a meaning in it."""

READ_TOKENS = 10
"""Tokens of a list that are judged."""

READABLE_SHARE = 0.4
"""Share of a list's tokens in its largest group, from which on it is readable."""

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
    """Lists of tokens, and which of them are related.

    Attributes:
        related: [list, token]: it belongs to the largest group of related tokens of its list.
        junk: [list, token]: special, part of a character, or hardly trained.
    """

    related: Bool[Tensor, "list token"]
    junk: Bool[Tensor, "list token"]

    @property
    def readable(self) -> Bool[Tensor, " list"]:
        """Whether the largest group is a meaning: `READABLE_SHARE` of the list."""
        return self.related.float().mean(dim=1) >= READABLE_SHARE

    @property
    def status(self) -> Int[Tensor, "list token"]:
        """Of each token, which of `STATUSES`."""
        return torch.where(self.junk, 2, torch.where(self.related, 0, 1))


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The rows that stand for tokens, and what is taken out of them before they are compared.

    Attributes:
        rows: those of the unembedding, or of the embedding.
        mean: of the rows.
        components: their first principal components.
    """

    rows: Float[Tensor, "row d_model"] = field(repr=False)
    mean: Float[Tensor, " d_model"] = field(repr=False)
    components: Float[Tensor, "d_model component"] = field(repr=False)

    @classmethod
    def of(cls, rows: Float[Tensor, "row d_model"], draw: Int[Tensor, " row"]) -> TokenRows:
        """Mean and components over the first rows of those drawn."""
        sample = rows[draw[:SAMPLED_ROWS].to(rows.device)].float().nan_to_num()
        mean = sample.mean(dim=0)
        sample = sample - mean
        kept = rows.shape[1] - round(rows.shape[1] / 100)
        return cls(rows, mean, torch.linalg.eigh(sample.T @ sample).eigenvectors[:, kept:])

    def centred(self, rows: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """Rows less the mean and the components."""
        rows = rows.float() - self.mean
        return rows - (rows @ self.components) @ self.components.T

    def directions(self, ids: Int[Tensor, "*n"]) -> Float[Tensor, "*n d_model"]:
        """The same of some tokens, of length 1."""
        rows = self.centred(self.rows[ids.to(self.rows.device)])
        return torch.nn.functional.normalize(rows, dim=-1)

    def untrained(self) -> Bool[Tensor, " row"]:
        """Tokens whose rows are far shorter than the others'."""
        chunks = self.rows.split(VOCABULARY_CHUNK)
        lengths = torch.cat([self.centred(some).norm(dim=1) for some in chunks]).cpu().log()
        low, middle, high = lengths.nanquantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        return lengths.lt(middle + UNTRAINED * (high - low) / 1.349)  # of a normal distribution


@dataclass(frozen=True, eq=False)
class TokenRelations:
    """Which tokens of a model are related, as it writes or reads them; see the module.

    Attributes:
        rows: of the tokens.
        junk: [row].
        cosines: of random pairs, ascending.

    Examples:
        ```python
        relations = TokenRelations.of(model, "writes")
        best = writes(model, Neuron(5, 17)).scores.topk(10).indices
        relations.judged(best[None]).readable  # tensor([True])
        ```
    """

    rows: TokenRows
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
            InputError: another role; the model writes (a classifier) or reads no tokens.
        """
        if role not in ("writes", "reads"):
            raise InputError(f"role is writes or reads, not {role!r}")
        if role == "writes" and labels_of(model) is not None:
            raise InputError(
                f"{type(model.original_model).__name__} unembeds classes: no list is to be judged"
            )
        weights = unembedding(model)[0] if role == "writes" else embedding(model)
        draw = torch.randperm(len(weights), generator=torch.Generator().manual_seed(0))
        rows = TokenRows.of(weights, draw)
        some = rows.directions(draw[:COMPARED_ROWS])
        pairs = torch.triu_indices(len(some), len(some), 1, device=some.device)
        cosines = (some @ some.T)[pairs[0], pairs[1]].cpu().sort().values
        return cls(rows, rows.untrained() | _unspeakable(model, len(weights)), cosines)

    @torch.no_grad()
    def judged(self, ids: Int[Tensor, "list token"]) -> Readability:
        """The largest group of related tokens of each list; of equal ones that of the best token.

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
            rows = self.rows.directions(some)
            close = (rows @ rows.mT).cpu() > limit
            close &= ~(bad[:, :, None] | bad[:, None, :] | torch.eye(count, dtype=torch.bool))
            related.append(_largest_group(close))
        return Readability(torch.cat(related), junk)


def readable_tokens(
    relations: TokenRelations, scores: VocabularyScores, k: int = READ_TOKENS
) -> list[str]:
    """What a unit's highest tokens have in common: those of the ten that are one group.

    Args:
        relations: of the model, in the role of ``scores``.
        scores: of a unit, of `lenslrp.analysis.writes` or ``reads``.
        k: how many at most, best first.

    Returns:
        Nothing where the list is not readable.
    """
    top = scores.top(min(READ_TOKENS, len(scores.scores)))
    top = with_status(relations, top)
    return list(top["token"][top["status"] == "related"][:k]) if is_readable(top) else []


def with_status(relations: TokenRelations, tokens: pd.DataFrame) -> pd.DataFrame:
    """A list of tokens (column ``id``) with each token's ``status``, one of `STATUSES`."""
    judged = relations.judged(torch.tensor([tokens["id"].tolist()]))
    return tokens.assign(status=[STATUSES[status] for status in judged.status[0].tolist()])


def is_readable(tokens: pd.DataFrame) -> bool:
    """Whether a list of tokens (column ``status``) is readable."""
    return bool((tokens["status"] == "related").mean() >= READABLE_SHARE)


def _largest_group(close: Bool[Tensor, "list token token"]) -> Bool[Tensor, "list token"]:
    reach = close.float() + torch.eye(close.shape[1])
    for _ in range(close.shape[1].bit_length()):  # paths of twice the length each time
        reach = (reach @ reach).clamp(max=1)
    sizes = reach.sum(dim=2)
    group = reach[torch.arange(len(reach)), sizes.argmax(dim=1)] > 0
    return group & (sizes.amax(dim=1) > 1)[:, None]


def _unspeakable(model: TransformerBridge, rows: int) -> Bool[Tensor, " row"]:
    """Special tokens, and bytes that make no character."""
    found = torch.zeros(rows, dtype=torch.bool)
    if model.tokenizer is not None:
        speller = Speller(model.tokenizer)
        names = (speller.token(token) for token in range(rows))
        bad = [i for i, name in enumerate(names) if i in speller.special or "⟨0x" in name]
        found[bad] = True
    return found
