"""A text as one vector, and how alike two texts are: targets on the hidden states of a bare model.

Pooling is linear in the hidden states: weights of tokens that do not depend on them (``"max"``
picks a token for each feature). A norm that a vector is divided by has a constant denominator
(Achtibat et al., AttnLRP, ICML 2024, Prop. 3.4). A similarity is then linear in each text's vector,
given the other's: each of the two is explained with the other constant, so that its relevance
accounts for the whole similarity. Shared between the two, as the uniform rule shares a product
(Prop. 3.2), all of it would be half of that. The same relevance by pairs of tokens is BiLRP (Eberle
et al., TPAMI 2020): `lenslrp.analysis.bilrp`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.errors import InputError
from lenslrp.hooks.sites import widened
from lenslrp.logits import Outputs

Measure = Literal["cosine", "dot"]

WEIGHTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda number, length: (number > 0) / length,
    "cls": lambda number, _: number == 1,
    "last": lambda number, length: number == length,
    "mean_sqrt_len": lambda number, length: (number > 0) / length.sqrt(),
    "weighted_mean": lambda number, _: number / number.sum(dim=1, keepdim=True),
}
"""The weight of each token [batch, pos]: of its number, 1, 2, ... in each row and 0 at padding, and
of the row's length [batch, 1]."""

POOLINGS = (*WEIGHTS, "max")


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda x: x,
    "Tanh": torch.tanh,
}
"""Of a dense layer, by the name of torch's module; each is 0 at 0."""


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """A linear layer behind the pooling, and its activation, under the epsilon and identity rules.

    What its bias keeps is ``nonlinear_target`` in the ledger: it belongs to the target.

    Args:
        weight: [out, in].
        bias: [out], if there is one.
        activation: a name in `ACTIVATIONS`.
    """

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None = None
    activation: str = "Identity"

    def __call__(self, x: Float[Tensor, "batch in"]) -> Float[Tensor, "batch out"]:
        bias = None if self.bias is None else self.bias.to(x)
        z = torch.nn.functional.linear(x, self.weight.to(x), bias)
        constant = z.detach()
        ratio = ACTIVATIONS[self.activation](constant) / torch.where(constant == 0, 1, constant)
        return z * torch.where(constant == 0, 1, ratio)


@dataclass(frozen=True)
class SentenceEmbedding:
    """How the hidden states of a text become its vector; sentence-transformers' modules by name.

    Args:
        pooling: one of ``"mean"`` over the tokens that are not padding, ``"cls"`` (the first of
            them), ``"last"``, ``"max"``, ``"mean_sqrt_len"`` (the sum divided by the root of their
            number) and ``"weighted_mean"`` (by position, counted from 1); or several, whose vectors
            are put after each other.
        dense: layers that the vector passes through.
        normalise: divide the vector by its norm, at last.
        measure: how two vectors are compared.
        longest: how many tokens of a text are read, ``None`` for all.
        refused: what a checkpoint does besides, that is not explained.

    Raises:
        InputError: another pooling or measure.
    """

    pooling: str | tuple[str, ...]
    normalise: bool = False
    measure: Measure = "cosine"
    dense: tuple[DenseLayer, ...] = ()
    longest: int | None = None
    refused: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.pooling, str | tuple | list) or not self.pooling:
            raise InputError(f"pooling is one of {', '.join(POOLINGS)}, not {self.pooling!r}")
        names = (self.pooling,) if isinstance(self.pooling, str) else tuple(self.pooling)
        object.__setattr__(self, "pooling", names)
        for name in names:
            if name not in POOLINGS:
                near = difflib.get_close_matches(str(name), POOLINGS, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InputError(f"pooling is one of {', '.join(POOLINGS)}, not {name!r}{hint}")
        require_measure(self.measure)

    def __str__(self) -> str:
        layers = ", a dense layer" * len(self.dense)
        return f"{' and '.join(self.pooling)} pooling{layers}"

    def vectors(self, outputs: Outputs) -> Float[Tensor, "batch d"]:
        """The vector of each row, on the graph.

        Raises:
            InputError: hidden states that are not those of the rows' tokens, or a longer text than
                the checkpoint's own embedding reads.
        """
        x, mask = outputs.logits, outputs.mask
        if outputs.batch.decoder is not None:
            raise InputError(
                "an encoder-decoder's output belongs to what its decoder has written, not to the "
                "text that it read: load its encoder alone"
            )
        if x.ndim != 3 or x.shape[:2] != mask.shape:
            raise InputError(
                f"the output is {list(x.shape)}: no hidden states of {mask.shape[1]} tokens in "
                f"{len(mask)} rows, so there is nothing to pool"
            )
        longest = max(outputs.batch.written.lengths)
        if self.longest is not None and longest > self.longest:
            raise InputError(
                f"a text has {longest} tokens, and this model's own embedding reads the "
                f"first {self.longest}: cut it, or name the pooling in the target"
            )
        real = widened(x.masked_fill(~mask[:, :, None], 0))
        number = (mask.long().cumsum(dim=1) * mask).to(real.dtype)
        parts = []
        for name in self.pooling:
            if name == "max":
                parts.append(x.masked_fill(~mask[:, :, None], -torch.inf).max(dim=1).values)
            else:
                weights = WEIGHTS[name](number, number.amax(dim=1, keepdim=True))
                parts.append((weights[:, :, None] * real).sum(dim=1).to(x.dtype))
        vectors = torch.cat(parts, dim=-1)
        for layer in self.dense:
            vectors = layer(vectors)
        return vectors / norms(vectors) if self.normalise else vectors


def norms(vectors: Float[Tensor, "batch d"]) -> Float[Tensor, "batch 1"]:
    """The norm of each, a constant."""
    length: Tensor = vectors.detach().norm(dim=-1, keepdim=True)
    return length


def require_measure(measure: Measure) -> Measure:
    if measure not in get_args(Measure):
        raise InputError(f"measure is one of {', '.join(get_args(Measure))}, not {measure!r}")
    return measure


def embedding_of(
    own: SentenceEmbedding | None, pooling: str | SentenceEmbedding | None
) -> SentenceEmbedding:
    """What a target says of pooling, else what the checkpoint says (``own``).

    Raises:
        InputError: neither says it, or the checkpoint does what is not explained.
    """
    if isinstance(pooling, SentenceEmbedding):
        return pooling
    if pooling is not None:
        return SentenceEmbedding(pooling)
    choices = f"name one in the target: pooling= one of {', '.join(POOLINGS)}"
    if own is None:
        raise InputError(f"this model does not say how its texts are pooled; {choices}")
    if own.refused:
        raise InputError(f"{own.refused}. To explain another embedding of its texts, {choices}")
    return own


@dataclass(frozen=True)
class Embedding:
    """One component of a text's vector, in the vector's unit.

    For a bare model (``BertModel``, ``LlamaModel``), whose output is hidden states.

    Args:
        component: index into the vector.
        pooling: how hidden states become the vector: a name of `SentenceEmbedding`'s, or one of
            those; ``None`` for what the checkpoint says (``modules.json`` of
            sentence-transformers).

    Examples:
        >>> _, R = lenslrp.run_with_relevance(encoder, text, targets.Embedding(7, "mean"))
        >>> R.target.text
        'component 7 of the embedding (mean pooling)'
    """

    component: int
    pooling: str | SentenceEmbedding | None = None

    def values(self, outputs: Outputs) -> Float[Tensor, " batch"]:
        """The component in each row.

        Raises:
            InputError: a component that the vector does not have, or see `SentenceEmbedding`.
        """
        vectors = embedding_of(outputs.embedding, self.pooling).vectors(outputs)
        size = vectors.shape[1]
        if isinstance(self.component, bool) or not isinstance(self.component, int):
            raise InputError(f"component must be an integer, not {self.component!r}")
        if not -size <= self.component < size:
            raise InputError(f"component {self.component} is outside the embedding, of {size}")
        return vectors[:, self.component]

    def text(self, outputs: Outputs) -> str:
        """What a cache says was explained."""
        embedding = embedding_of(outputs.embedding, self.pooling)
        return f"component {self.component} of the embedding ({embedding})"


@dataclass(frozen=True, eq=False)
class Similarity:
    """How alike two texts are: the cosine, or the product, of their vectors.

    Rows are pairs: the first with the second, the third with the fourth. In both rows of a pair the
    value is their similarity, and each is explained with the other's vector constant. With
    ``other``, every row is compared with that vector (of `lenslrp.embed`).

    Args:
        other: [d], the vector of another text.
        pooling: as for `Embedding`.
        measure: ``"cosine"`` or ``"dot"``; ``None`` for what the checkpoint says, else the cosine.

    Examples:
        >>> texts = ["A cat sat on the mat.", "The kitten is resting on a rug."]
        >>> _, R = lenslrp.run_with_relevance(encoder, texts, targets.Similarity(pooling="mean"))
        >>> R.tokens.shape, R.target.value  # the similarity, once for each of the texts
    """

    other: Float[Tensor, " d"] | None = None
    pooling: str | SentenceEmbedding | None = None
    measure: Measure | None = None

    def values(self, outputs: Outputs) -> Float[Tensor, " batch"]:
        """The similarity in each row.

        Raises:
            InputError: rows that are no pairs, a vector of another size, or see
                `SentenceEmbedding`.
        """
        embedding = embedding_of(outputs.embedding, self.pooling)
        vectors = embedding.vectors(outputs)
        others = self.others(vectors)
        return (vectors * others).sum(dim=-1) * self.scale(embedding, vectors, others)

    def scale(
        self, embedding: SentenceEmbedding, vectors: Tensor, others: Tensor
    ) -> Float[Tensor, " #batch"] | float:
        """What the product of two vectors is multiplied by, a constant."""
        if self._measure(embedding) == "dot":
            return 1.0
        return 1 / (norms(vectors) * norms(others))[:, 0]

    def others(self, vectors: Float[Tensor, "batch d"]) -> Float[Tensor, "#batch d"]:
        """What each row is compared with, a constant."""
        if self.other is None:
            if len(vectors) % 2:
                raise InputError(
                    f"texts are compared in pairs of rows, and here are {len(vectors)} by "
                    "themselves: give two texts in one batch, or other=, the vector of "
                    "lenslrp.embed"
                )
            pairs: Tensor = vectors.detach().unflatten(0, (-1, 2))
            return pairs.flip(1).flatten(0, 1)
        if not isinstance(self.other, Tensor) or self.other.shape != vectors.shape[1:]:
            got = list(self.other.shape) if isinstance(self.other, Tensor) else self.other
            raise InputError(f"other must be a vector [{vectors.shape[1]}], not {got}")
        return self.other.detach().to(vectors)[None]

    def of_rows(self, outputs: Outputs) -> tuple[Similarity, ...]:
        """The same as a target of each row by itself."""
        vectors = embedding_of(outputs.embedding, self.pooling).vectors(outputs)
        others = self.others(vectors).expand_as(vectors)
        return tuple(Similarity(other, self.pooling, self.measure) for other in others)

    def text(self, outputs: Outputs) -> str:
        """What a cache says was explained."""
        embedding = embedding_of(outputs.embedding, self.pooling)
        kind = {"cosine": "cosine similarity to", "dot": "dot product with"}
        to = "the other text" if self.other is None else "a vector"
        return f"{kind[self._measure(embedding)]} {to} ({embedding})"

    def _measure(self, embedding: SentenceEmbedding) -> Measure:
        return require_measure(self.measure or embedding.measure)
