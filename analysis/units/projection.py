"""What a unit writes to the vocabulary and what it reads from it.

The projection of Geva et al. 2022 ("Transformer feed-forward layers build predictions by
promoting concepts in the vocabulary space"), of Voita et al. 2023 for neurons and of Dar et al.
2023 for heads. A unit adds a multiple of a vector to the residual stream, and the unembedding turns
the residual stream into logits: that is what it **writes**. It multiplies the residual stream with
a vector, and token embeddings are where the residual stream begins: that is what it **reads**.

Norms lie in between. Their gain scales the components and their centring removes the mean, and both
belong to the reading; their denominators are positive numbers for the whole vocabulary and
cannot change the order; biases are not part of what a unit writes. So scores are in logits up to
one positive factor, unless a residual is given (``at=``): then they are differences of real
logits, through the real norm and soft-cap. A relevance lens (`lenslrp.analysis.units.lens`)
transports what is written over the layers in between.

A head reads and writes whole subspaces. Given what it attends to (``source=``), it writes one
vector; without, the components of its OV and QK circuits are read one by one, largest singular
value first (Millidge and Black 2022), queries paired with keys and values with outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.analysis.units.kinds import Feature, Head, Neuron, Unit, require_unit
from lenslrp.analysis.units.readability import TokenRelations, readable_tokens
from lenslrp.analysis.units.residual import (
    as_read,
    as_written,
    head_reads,
    head_writes,
    require_decoder,
)
from lenslrp.analysis.units.unembedding import (
    dot_products,
    embedding,
    labels,
    measure_gain,
    output_norm,
    token_labels,
    unembed,
    unembedding,
)
from lenslrp.errors import InputError
from lenslrp.hooks.structure import layer_of
from lenslrp.views.cards import Face, Shown

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.analysis.units.lens import Lens


@dataclass(frozen=True, eq=False, repr=False)
class VocabularyScores(Shown):
    """One score for each token (or class), of what a unit writes or reads.

    Attributes:
        unit: the unit's text.
        role: ``"writes"`` or ``"reads"``.
        name: which of its vectors: ``"out"``; ``"in"``, ``"gate"``; ``"q"``, ``"k"``, ``"v"``.
        scores: [d_vocab]; logits up to a positive factor, or logits where a residual was given.
        label: row -> its token (or class) as text.
        strength: of a head's component, its singular value; 1 otherwise.

    Examples:
        ```python
        writes(model, Neuron(5, 17)).top(3)  # a table with the columns id, token, score
        ```
    """

    unit: str
    role: str
    name: str
    scores: Float[Tensor, " d_vocab"]
    label: Callable[[int], str]
    strength: float = 1.0

    def face(self) -> Face:
        k = min(10, len(self.scores))
        sides = [self.top(k), self.bottom(k)]
        frame = pd.concat(
            [
                side[["token", "score"]].add_prefix(name)
                for side, name in zip(sides, ("top ", "bottom "), strict=True)
            ],
            axis=1,
        )
        singular = {"singular value": self.strength} if self.strength != 1.0 else {}
        return Face(
            f"Tokens by what the unit {self.role}",
            {"unit": self.unit, self.role: self.name, "tokens": len(self.scores), **singular},
            frame,
            coloured=["top score", "bottom score"],
            notes=["Scores are logits up to one positive factor, unless a residual was given."],
        )

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` highest scores, best first: columns id, token, score.

        Raises:
            InputError: ``k`` is not 1 to d_vocab.
        """
        return self._table(k, largest=True)

    def bottom(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` lowest scores, lowest first; see `top`."""
        return self._table(k, largest=False)

    def _table(self, k: int, *, largest: bool) -> pd.DataFrame:
        if not 1 <= k <= len(self.scores):
            raise InputError(f"k is {k}, expected 1 to {len(self.scores)} (the vocabulary)")
        best = self.scores.topk(k, largest=largest)
        ids = best.indices.tolist()
        return pd.DataFrame(
            {"id": ids, "token": [self.label(i) for i in ids], "score": best.values.tolist()}
        )


@torch.no_grad()
def project(
    model: TransformerBridge,
    vectors: Float[Tensor, "n d_model"],
    *,
    at: Float[Tensor, " d_model"] | None = None,
) -> Float[Tensor, "n rows"]:
    """Residual vectors in the vocabulary: by the final norm's gain, or by the real head at ``at``.

    Args:
        at: a residual vector before the final norm, from which each vector is a step: scores are
            ``logits(at + vector) - logits(at)``. None: the gain only, no bias and no soft-cap.
    """
    rows, _ = unembedding(model)
    if at is not None:
        state = at.to(vectors)[None]
        return unembed(model, state + vectors) - unembed(model, state)
    norm = output_norm(model)
    if norm is not None:
        vectors = vectors.to(rows.device)
        vectors = measure_gain(model, norm, vectors).forward(vectors)
    return dot_products(rows, vectors)


@torch.no_grad()
def writes(
    model: TransformerBridge,
    unit: Unit,
    *,
    source: str | int | Float[Tensor, " d_model"] | None = None,
    component: int = 0,
    at: Float[Tensor, " d_model"] | None = None,
    amount: float = 1.0,
    lens: Lens | None = None,
) -> VocabularyScores:
    """What ``unit`` writes to the vocabulary.

    The projection of Geva et al. 2022 (arXiv:2203.14680) for neurons and of Dar et al. 2023
    (arXiv:2209.02535) for heads.

    Args:
        model: a ``TransformerBridge``.
        unit: a `Neuron`, `Head`, `Direction` or `Feature` of the decoder.
        source: of a head: the token, or the residual vector, that it attends to; it then writes
            that one's image under its OV circuit.
        component: of a head without ``source``: which singular component of the OV circuit.
        at: a residual vector before the final norm, from which the unit's vector is a step: then
            scores are ``logits(at + vector) - logits(at)``.
        amount: how much of the vector is written, with ``at``.
        lens: transport the vector to the final residual first.

    Returns:
        Scores [d_vocab], in logits up to one positive factor; with ``at``, in logits.

    Raises:
        InputError: the unit is not in the model, or the model has no vocabulary to read it in.

    Examples:
        ```python
        writes(model, Neuron(5, 17)).top(5)                  # tokens it raises
        writes(model, Head(5, 2), source=" Paris").top(5)    # what it writes when it sees " Paris"
        writes(model, Neuron(5, 17), lens=lens).bottom(5)    # through the layers above
        ```
    """
    require_decoder(model, unit)
    strength = 1.0
    if isinstance(unit, Head):
        vector, strength = head_writes(model, unit, source, component)
    elif source is not None:
        raise InputError("source is for heads: other units write the same whatever they read")
    else:
        vector = unit.writes(model)["out"][0]
    vector = as_written(model, unit, vector[None])
    if lens is not None:
        if isinstance(unit, Feature) and unit.coder.later:
            raise InputError(f"{unit} writes at several layers, and a lens is of one")
        vector = lens.transport(_layer_of(unit), vector)
    scores = project(model, vector * amount, at=at)[0]
    return VocabularyScores(str(unit), "writes", "out", scores.cpu(), labels(model), strength)


@torch.no_grad()
def reads(
    model: TransformerBridge, unit: Unit, *, component: int = 0
) -> dict[str, VocabularyScores]:
    """What ``unit`` reads: dot products of token embeddings with its input vectors.

    A neuron has ``"in"`` and, if gated, ``"gate"``; a head has ``"q"``, ``"k"`` and ``"v"``, of
    which ``q`` and ``k`` are one component of QK (position apart: rotary embeddings are left out)
    and ``v`` one of OV.

    Args:
        model: a ``TransformerBridge``.
        unit: a `Neuron`, `Head`, `Direction` or `Feature`.
        component: of a head: which singular component of QK and OV.

    Returns:
        For each of its vectors, scores [d_vocab] up to one positive factor.

    Raises:
        InputError: the unit is not in the model, or the model reads no tokens.

    Examples:
        ```python
        reads(model, Neuron(5, 17))["in"].top(5)  # tokens that it responds to most
        ```
    """
    require_unit(unit)
    rows = embedding(model)
    if isinstance(unit, Head):
        vectors = head_reads(model, unit, component)
    else:
        vectors = {n: (as_read(model, unit, n, v)[0], 1.0) for n, v in unit.reads(model).items()}
    label = token_labels(model)
    return {
        name: VocabularyScores(
            str(unit), "reads", name, dot_products(rows, vector[None])[0].cpu(), label, strength
        )
        for name, (vector, strength) in vectors.items()
    }


def _layer_of(unit: Unit) -> int:
    """The block after which the residual stream holds what the unit wrote."""
    hook = str(unit).partition("[")[0]
    layer = layer_of(hook)
    if layer is not None and hook.endswith("hook_resid_pre"):
        layer -= 1
    if layer is None or layer < 0:
        raise InputError(f"{unit} is behind no block, so no lens says how it is transported")
    return layer


@torch.no_grad()
def cosines(model: TransformerBridge, unit: Unit) -> dict[str, float]:
    """Cosines between what a unit reads and what it writes, both seen from the residual stream.

    Near 1 it strengthens what it finds, near -1 it removes it (Gurnee et al. 2024).

    Args:
        model: a ``TransformerBridge``.
        unit: a `Neuron`, `Direction` or `Feature`.

    Returns:
        ``"in,out"``, and for a gated MLP also ``"gate,out"`` and ``"gate,in"``; -1 to 1.

    Raises:
        InputError: for a head, which reads and writes subspaces.

    Examples:
        >>> cosines(model, Direction("blocks.5.hook_resid_post", vector))
        {'in,out': 1.0}
    """
    require_unit(unit)
    if isinstance(unit, Head):
        raise InputError(f"{unit} reads and writes subspaces, between which there is no one angle")
    vectors = {n: as_read(model, unit, n, v)[0] for n, v in unit.reads(model).items()}
    vectors["out"] = as_written(model, unit, unit.writes(model)["out"])[0]
    pairs = [("in", "out"), *([("gate", "out"), ("gate", "in")] if "gate" in vectors else [])]
    return {
        f"{a},{b}": float(torch.cosine_similarity(vectors[a], vectors[b].to(vectors[a]), dim=0))
        for a, b in pairs
    }


def sign_cases(model: TransformerBridge, neuron: Neuron, k: int = 5) -> pd.DataFrame:
    """The four ways in which a gated neuron fires: activation = f(gate) * in.

    Where ``f`` dips below zero (SiLU, GELU), a negative gate flips the sign and writes little; a
    neuron means up to four things, of which the signs of its two inputs choose one.

    Args:
        model: a ``TransformerBridge``.
        neuron: of a gated MLP.
        k: how many tokens a cell lists.

    Returns:
        One row a case: the signs of gate, in and activation; the ``k`` tokens that push the gate
        and the input that way; the ``k`` tokens whose logits then rise.

    Raises:
        InputError: a neuron without a gate.
    """
    scores = reads(model, neuron)
    if "gate" not in scores:
        raise InputError(f"{neuron} has no gate; its sign is that of its activation")
    written = writes(model, neuron)

    def tokens(scores: VocabularyScores, sign: int) -> list[str]:
        return list((scores.top(k) if sign > 0 else scores.bottom(k))["token"])

    records = [
        {
            "gate": "+" if gate > 0 else "-",
            "in": "+" if inner > 0 else "-",
            "activation": "+" if gate * inner > 0 else "-",
            "reads gate": tokens(scores["gate"], gate),
            "reads in": tokens(scores["in"], inner),
            "writes": tokens(written, gate * inner),
        }
        for gate in (1, -1)
        for inner in (1, -1)
    ]
    return pd.DataFrame(records)


def neuron_writes(
    model: TransformerBridge,
    layer: int,
    neuron: int,
    k: int = 5,
    relations: TokenRelations | None = None,
) -> list[str]:
    """The ``k`` tokens whose logits an active MLP neuron raises most, best first.

    Short for ``writes(model, Neuron(layer, neuron)).top(k)["token"]``.

    Args:
        model: a ``TransformerBridge``.
        layer, neuron: which.
        k: how many tokens at most.
        relations: of the model's tokens. With it only what makes the list readable is given, and
            nothing where it is not (`lenslrp.analysis.units.readability`).

    Raises:
        InputError: as `writes`.
    """
    scores = writes(model, Neuron(layer, neuron))
    if relations is not None:
        return readable_tokens(relations, scores, k)
    return list(scores.top(k)["token"])
