"""Directions of the residual stream: from a neuron, two sets of texts, relevance, or a token.

Each is a `Direction` (`lenslrp.analysis.units.kinds`), to be read as a unit, steered along
(`lenslrp.analysis.steering.operations`) or kept in a file (`lenslrp.analysis.steering.files`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.analysis.units.kinds import Direction, Head, Neuron, Unit, require_unit
from lenslrp.analysis.units.locations import block_before, blocks_name, known_hook
from lenslrp.analysis.units.unembedding import measure_gain, output_norm, unembedding
from lenslrp.errors import InputError
from lenslrp.forward import forward
from lenslrp.hooks.sites import widest
from lenslrp.inputs import prepare_text
from lenslrp.progress import progress_bar
from lenslrp.reductions import Deliver
from lenslrp.sessions import Session
from lenslrp.text.names import token_id

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.analysis.units.lens import Lens

TEXTS_AT_ONCE = 16


def written_by(model: TransformerBridge, unit: Unit, at: str | None = None) -> Direction:
    """What a unit adds to the stream for each unit of its activation: of a neuron, W_out's row.

    Args:
        model: the bridge.
        unit: anything that writes one vector.
        at: a hook point of the residual stream; by default that after the neuron's block.

    Returns:
        A direction of length [d_model], named after the unit.

    Raises:
        InputError: a head, which writes a whole space; no such unit or hook point.
    """
    require_unit(unit)
    if isinstance(unit, Head):
        raise InputError(f"{unit} writes a space of vectors, not one; choose one of unit.writes()")
    (vector,) = unit.writes(model)["out"]
    if at is None:
        if not isinstance(unit, Neuron):
            raise InputError(f"{unit}: say at which hook point of the residual stream")
        at = f"{blocks_name(model, unit.side)}.{unit.layer}.hook_resid_post"
    return Direction(known_hook(model, at), vector, name=f"written by {unit}")


def mean_difference(
    model: TransformerBridge,
    positive: Sequence[str],
    negative: Sequence[str],
    at: str,
    *,
    tokens: Literal["last", "all"] = "last",
    prepend_bos: bool | None = None,
    name: str | None = None,
) -> Direction:
    """Mean activation over `positive` texts less that over `negative` ones.

    Args:
        model: the bridge.
        positive, negative: two sets of texts, alike but for what is to be steered.
        at: a hook point whose activations are [batch, pos, features].
        tokens: `"last"`: each text by its last token; `"all"`: by the mean over all.
        prepend_bos: as in `model.to_tokens`.
        name: of the direction, shown wherever it is.

    Returns:
        A direction of length [features], in units of the activations.

    Raises:
        InputError: no texts, no such hook point, or activations of another shape.

    Examples:
        >>> happy = mean_difference(gpt2, ["I am glad"], ["I am sad"], "blocks.6.hook_resid_post")
        >>> happy.vector.shape
        torch.Size([768])
    """
    if tokens not in ("last", "all"):
        raise InputError(f"tokens is 'last' or 'all', not {tokens!r}")
    means = []
    for texts in (positive, negative):
        rows = [
            row[-1] if tokens == "last" else row.mean(dim=0, dtype=widest(row))
            for row in states(model, texts, at, prepend_bos=prepend_bos)
        ]
        means.append(torch.stack(rows).mean(dim=0, dtype=widest(rows[0])))
    return Direction(at, (means[0] - means[1]).to(_kept(model)), name)


def _kept(model: TransformerBridge) -> torch.dtype:
    """The type of a direction: the model's, or float32 where that is coarser."""
    return torch.promote_types(next(model.parameters()).dtype, torch.float32)


def relevance_direction(
    model: TransformerBridge,
    texts: Sequence[str],
    targets: Sequence[Any],
    at: str,
    *,
    prepend_bos: bool | None = None,
    name: str | None = None,
) -> Direction:
    """What the stream holds where it matters: the relevance-weighted mean of normed activations.

    `v = sum_p R_p x_p / rms(x_p) / sum_p |R_p|` over all tokens p of all texts, where `R_p` is the
    AttnLRP relevance (Achtibat et al. 2024) of the stream at p for the text's target, summed over
    features. States count by their direction, as the norms that read them see them: otherwise the
    first token, whose state is hundreds of times longer than any other in many models, would be all
    of the mean.

    Args:
        model: the bridge.
        texts, targets: one target a text, as in `lenslrp.run_with_relevance`.
        at: a hook point of the residual stream.
        prepend_bos: as in `model.to_tokens`.
        name: of the direction, shown wherever it is.

    Returns:
        A direction of length [d_model]; a weighted mean of vectors whose entries have a root mean
        square of 1.

    Raises:
        InputError: no texts, or not one target a text; no such hook point.

    Examples:
        >>> place = relevance_direction(gpt2, ["Paris is in"], [Logit(" France")],
        ...                             "blocks.6.hook_resid_post")
        >>> place.vector.shape
        torch.Size([768])
    """
    if isinstance(texts, str) or isinstance(targets, str):
        raise InputError("texts and targets are lists, with one target for each text")
    if not texts or len(texts) != len(targets):
        raise InputError(f"{len(texts)} texts and {len(targets)} targets: one target a text")
    at = known_hook(model, at)
    total, weight = torch.zeros(()), torch.zeros(())

    def add(x: Tensor, g: Tensor) -> None:
        nonlocal total, weight
        relevance, x = (x * g)[0].to(widest(x)).sum(dim=-1), x[0].to(widest(x))
        normed = x / x.square().mean(dim=-1, keepdim=True).sqrt()
        total = total.to(x) + (relevance[:, None] * normed).sum(dim=0)
        weight = weight.to(x) + relevance.abs().sum()

    with Session(model, ledger=False, logits="target", stays=False) as session:
        for text, target in progress_bar("texts", list(zip(texts, targets, strict=True))):
            session.run_with_relevance(
                text, target, at, reduce={at: Deliver(add)}, prepend_bos=prepend_bos
            )
    return Direction(at, (total / weight).to(_kept(model)), name)


def unembedding_direction(
    model: TransformerBridge,
    token: str | int,
    at: str,
    *,
    against: str | int | None = None,
    lens: Lens | None = None,
    name: str | None = None,
) -> Direction:
    """What raises a token's logit: its row of the unembedding, as the final norm's gain reads it.

    Args:
        model: the bridge.
        token: of the vocabulary.
        at: a hook point of the residual stream.
        against: a token whose row is subtracted, so that the two are told apart.
        lens: what the stream at `at`, behind a block, becomes at the end: the direction that
            raises the logit there.
        name: of the direction, shown wherever it is.

    Returns:
        A direction of length [d_model].

    Raises:
        InputError: no such token or hook point, a model that unembeds no tokens, or with a lens a
            hook point that is not behind a block of the lens.
    """
    rows, _ = unembedding(model)
    ids = [token_id(model.tokenizer, t, len(rows)) for t in (token, against) if t is not None]
    vector = rows[ids[0]] - rows[ids[1]] if len(ids) == 2 else rows[ids[0]]
    norm = output_norm(model)
    if norm is not None:
        vector = measure_gain(model, norm, vector[None]).backward(vector)
    if lens is not None:
        vector = lens.transport_back(_block_before(at), vector)
    return Direction(known_hook(model, at), vector, name)


def _block_before(at: str) -> int:
    layer = block_before(at)
    if layer is None or layer < 0:
        raise InputError(f"{at} is not the residual stream after a block, where lenses begin")
    return layer


def mean_activation(
    model: TransformerBridge, unit: Unit, texts: Sequence[str], *, prepend_bos: bool | None = None
) -> float:
    """A unit's mean activation over all tokens of some texts: what `Ablate` may set it to.

    Args:
        model: the bridge.
        unit: a neuron, head, direction or feature.
        texts: at least one.
        prepend_bos: as in `model.to_tokens`.

    Raises:
        InputError: no texts, or no such unit.
    """
    require_unit(unit)
    rows = states(model, texts, unit.hook(model), prepend_bos=prepend_bos)
    activations = torch.cat([unit.activation(row.to(_kept(model))) for row in rows])
    return float(activations.mean(dtype=widest(activations)))


@torch.no_grad()
def states(
    model: TransformerBridge, texts: Sequence[str], at: str, *, prepend_bos: bool | None = None
) -> Iterator[Float[Tensor, "pos ..."]]:
    """Each text's activations at a hook point, padding left out.

    Raises:
        InputError: no texts, or activations that are not [batch, pos, ...].
    """
    if isinstance(texts, str) or not texts:
        raise InputError("give a list of texts, at least one")
    at = known_hook(model, at)
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        some = list(texts[start : start + TEXTS_AT_ONCE])
        batch = prepare_text(model, some, prepend_bos=prepend_bos)
        read: list[Tensor] = []
        with forward(model, batch, read={at: read.append}, stop_after=at):
            pass
        if read[0].shape[:2] != batch.tokens.shape:
            raise InputError(f"{at} is {list(read[0].shape)}, expected [batch, pos, ...]")
        for row, mask in zip(read[0], batch.mask, strict=True):
            yield row[mask]
