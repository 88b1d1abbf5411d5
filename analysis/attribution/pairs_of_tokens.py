"""BiLRP: why two texts are alike, as relevance of pairs of their tokens.

A similarity is a product of two vectors, y = sum_m a_m b_m. Each component is explained in its own
text, and the pairs are R_ij = sum_m R_i(a_m) R_j(b_m) (Eberle et al., "Building and Interpreting
Deep Similarity Models", TPAMI 2020). Under rules that conserve each component, the sum over j is
the relevance of token i for the similarity with the other text constant
(`lenslrp.targets.Similarity`), and the sum over all pairs is y.

Relevance is linear in what is explained, so R_ij is what token i gets when sum_m R_j(b_m) a_m is: a
backward pass for each component of one text's vector, and one for each of its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.analysis.views.drawing import (
    LIGHT,
    Theme,
    draw_grid,
    label_token_columns,
    label_token_rows,
    largest_magnitude,
    one_panel,
    write_titles,
)
from lenslrp.embedding import embed
from lenslrp.errors import InputError
from lenslrp.hooks.composites import Composite
from lenslrp.hooks.rule_types import Rule
from lenslrp.progress import progress_bar
from lenslrp.sentences import Embedding, Measure, SentenceEmbedding, Similarity, embedding_of
from lenslrp.sessions import Session
from lenslrp.text.words import Word
from lenslrp.views.matrix import matrix_heatmap

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.cache import RelevanceCache


@dataclass(frozen=True, eq=False, repr=False)
class TokenPairs:
    """How much each pair of tokens, one of each text, makes two texts alike.

    Attributes:
        matrix: [a, b], relevance of the pairs, in the similarity's unit.
        a: what the tokens of the first text show.
        b: likewise, of the second.
        value: the similarity. Under rules that conserve it is the sum of ``matrix``; otherwise
            biases, softmax and the like have taken the rest, in the one text or the other.
        target: what was explained.
    """

    matrix: Float[Tensor, "a b"]
    a: list[str]
    b: list[str]
    value: float
    target: str
    words_a: list[Word]
    words_b: list[Word]

    def __repr__(self) -> str:
        return f"TokenPairs({self.target} = {self.value:.3f}, {len(self.a)} by {len(self.b)})"

    def _repr_html_(self) -> str:
        sums = [f"{float(row.sum()):+.2f}" for row in self.matrix]
        return matrix_heatmap(
            self.a, sums, self.b, self.matrix, lengths=[len(self.b)] * len(self.a),
            title=f"{self.target} = {self.value:.3f}, by pairs of one token of each text",
        )  # fmt: skip

    def words(self) -> TokenPairs:
        """The same by words: the sum over the tokens of each. Special tokens are words."""
        rows = torch.stack([self.matrix[word.positions].sum(dim=0) for word in self.words_a])
        matrix = torch.stack([rows[:, word.positions].sum(dim=1) for word in self.words_b], dim=1)
        a, b = ([word.text for word in words] for words in (self.words_a, self.words_b))
        alone_a, alone_b = ([Word(text, [i]) for i, text in enumerate(texts)] for texts in (a, b))
        return replace(self, matrix=matrix, a=a, b=b, words_a=alone_a, words_b=alone_b)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The pairs with the largest absolute relevance.

        Returns:
            Columns `a` and `b` (what the tokens show), `position_a`, `position_b` (their columns in
            ``matrix``) and `relevance`.

        Raises:
            InputError: `k` below 1.
        """
        if k < 1:
            raise InputError(f"k must be at least 1, not {k}")
        flat = self.matrix.flatten()
        best = flat.abs().topk(min(k, flat.numel())).indices.tolist()
        places = [divmod(index, self.matrix.shape[1]) for index in best]
        return pd.DataFrame(
            [(self.a[i], self.b[j], i, j, float(self.matrix[i, j])) for i, j in places],
            columns=["a", "b", "position_a", "position_b", "relevance"],
        )

    def plot(self, *, theme: Theme = LIGHT) -> Figure:
        """The matrix as a heatmap: the first text from the top down, the second from left to right.

        Args:
            theme: colours.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        values = self.matrix.double().cpu().numpy()
        rows, columns = values.shape
        width, height = min(3.4 + 0.34 * columns, 15.0), min(2.0 + 0.26 * rows, 12.0)
        figure, axes = one_panel(width, height, theme)
        draw_grid(figure, axes, values, largest_magnitude(values), theme, "relevance")
        label_token_columns(axes, self.b)
        label_token_rows(axes, self.a)
        axes.invert_yaxis()
        title = f"{self.target} = {self.value:.3f}"
        write_titles(axes, theme, title=title, x="second text", y="first text")
        return figure


def bilrp(
    model: TransformerBridge,
    a: Any,
    b: Any,
    pooling: str | SentenceEmbedding | None = None,
    *,
    measure: Measure | None = None,
    composite: Composite | Mapping[str, Rule] | None = None,
    prepend_bos: bool | None = None,
    attention: str = "bridge",
    batch_size: int = 32,
) -> TokenPairs:
    """Relevance of pairs of tokens for the similarity of two texts.

    Takes a backward pass for each component of the second text's vector, and one for each of its
    tokens, ``batch_size`` of them at once. To learn the relevance of tokens alone, one backward
    pass is enough: explain `lenslrp.targets.Similarity`.

    Args:
        model: a ``TransformerBridge`` of a model without a head.
        a: one text: a string, or token ids [1, pos].
        b: likewise.
        pooling: as for `lenslrp.targets.Embedding`.
        measure: ``"cosine"`` or ``"dot"``; ``None`` for what the checkpoint says, else the cosine.
        composite: the rules; ``AttnLRP()`` if not given.
        prepend_bos: as for `lenslrp.run_with_relevance`.
        attention: likewise.
        batch_size: copies of a text that run at once, each explained for another component.

    Returns:
        A matrix of the tokens of the one with those of the other. A token's relevance is that of
        its embedding and, where positions are learned, of its position.

    Raises:
        InputError: more or less than one text on a side, or what cannot be explained.
        CoverageError: an operation on the path has no rule.

    Examples:
        ```python
        pairs = bilrp(encoder, "A cat sat on the mat.", "The kitten is on a rug.", "mean")
        pairs.words().top(3)  # the pairs of words that make the texts alike
        pairs.plot()
        ```
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}")
    a, b = _one_text(a), _one_text(b)
    own = embedding_of(getattr(model, "sentence_embedding", None), pooling)
    first, second = (embed(model, text, own, prepend_bos=prepend_bos) for text in (a, b))
    for vectors in (first, second):
        if len(vectors) != 1:
            raise InputError(f"give one text on each side, not {len(vectors)}")
    with Session(model, composite, attention=attention, stays=False) as session:

        def explained(text: Any, target: Any) -> RelevanceCache:
            return session.run_with_relevance(text, target, [], prepend_bos=prepend_bos)[1]

        def by_target(text: Any, targets: Sequence[Any]) -> Float[Tensor, "target pos"]:
            parts = []
            for at in progress_bar("backward passes", range(0, len(targets), batch_size)):
                some = list(targets[at : at + batch_size])
                R = explained(_copies(text, len(some)), some)
                parts.append(R.tokens if R.positions is None else R.tokens + R.positions)
            return torch.cat(parts)

        of_a = explained(a, Similarity(second[0], own, measure))
        of_b = explained(b, Similarity(first[0], own, measure))
        components = by_target(b, [Embedding(m, own) for m in range(second.shape[1])])
        weights = components.T * Similarity(measure=measure).scale(own, first, second)
        matrix = by_target(a, [Similarity(weight, own, "dot") for weight in weights]).T
    return TokenPairs(
        matrix=matrix,
        a=of_a.str_tokens[0],
        b=of_b.str_tokens[0],
        value=float(of_a.target.value),
        target=f"{measure or own.measure} similarity ({own})",
        words_a=of_a.words_[0],
        words_b=of_b.words_[0],
    )


def _one_text(text: Any) -> Any:
    """A text that is given as a batch of one, or as ids [pos], in the form that can be repeated."""
    if isinstance(text, Tensor):
        return text[None] if text.ndim == 1 else text
    several = isinstance(text, list | tuple) and not (text and isinstance(text[0], int))
    return text[0] if several and len(text) == 1 else text


def _copies(text: Any, number: int) -> Any:
    if isinstance(text, Tensor):
        return text.expand(number, *text.shape[1:])
    return [text] * number
