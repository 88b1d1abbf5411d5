"""Relevance of the features of sparse coders, and of what the coders leave out.

Where a coder writes, the tensor y is a sum: of what its features write, a constant, a skip
connection where there is one, and what the coder does not reconstruct::

    y = sum_j scale a_j d_j + (scale b_dec + mean) + x W_skip + error

Relevance at a hook point is ``y * g`` with the coefficient ``g`` that came back to it, so each part
has its own and they add up to the relevance there. An autoencoder's part is of the tensor that it
reads, a transcoder's of the output that it predicts from the input ``x``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.analysis.units.coders import SparseCoder
from lenslrp.analysis.units.cross_layer import require_one_layer
from lenslrp.analysis.units.locations import known_hook
from lenslrp.cache import RelevanceCache
from lenslrp.errors import InputError
from lenslrp.hooks.composites import Composite
from lenslrp.hooks.rule_types import Rule
from lenslrp.hooks.sites import widened
from lenslrp.reductions import Deliver
from lenslrp.sessions import Session
from lenslrp.views.cards import Face, Shown

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False, repr=False)
class FeatureRelevance(Shown):
    """Relevance where one coder writes, told apart; in the target's unit (logits for a logit).

    Attributes:
        coder: whose features.
        features: of each feature at each position.
        activations: likewise.
        bias: of what the coder writes without any feature.
        skip: of its skip connection; zeros without.
        error: of what it does not reconstruct.
        cache: the explanation: target, tokens, relevance elsewhere.
    """

    coder: SparseCoder
    features: Float[Tensor, "batch pos feature"]
    activations: Float[Tensor, "batch pos feature"]
    bias: Float[Tensor, "batch pos"]
    skip: Float[Tensor, "batch pos"]
    error: Float[Tensor, "batch pos"]
    cache: RelevanceCache

    @property
    def total(self) -> Float[Tensor, "batch pos"]:
        """The sum of all parts: the relevance at the hook point where the coder writes."""
        return self.features.sum(dim=-1) + self.bias + self.skip + self.error

    def top(self, k: int = 10, row: int = 0) -> pd.DataFrame:
        """The features with the largest absolute relevance, a feature at a position each.

        Args:
            k: how many.
            row: which prompt of the batch.

        Returns:
            Columns `position` (of the row's own text), `token`, `feature`, `relevance` and
            `activation`.

        Raises:
            InputError: `k` below 1.
        """
        if k < 1:
            raise InputError(f"k must be at least 1, not {k}")
        positions, tokens = self._text(row)
        flat = self.features[row].flatten()
        best = flat.abs().topk(min(k, flat.numel())).indices.tolist()
        width = self.features.shape[-1]
        return pd.DataFrame(
            [
                (positions[i], tokens[i], j, float(self.features[row, i, j]),
                 float(self.activations[row, i, j]))
                for i, j in (divmod(index, width) for index in best)
                if positions[i] >= 0
            ],
            columns=["position", "token", "feature", "relevance", "activation"],
        )  # fmt: skip

    def to_dataframe(self, row: int = 0) -> pd.DataFrame:
        """The parts at each position: a row each, padding left out.

        Returns:
            Columns `position`, `token`, `features` (their sum), `bias`, `skip`, `error` and
            `total`.
        """
        positions, tokens = self._text(row)
        parts = {"features": self.features.sum(dim=-1), "bias": self.bias, "skip": self.skip,
                 "error": self.error, "total": self.total}  # fmt: skip
        frame = pd.DataFrame({"position": positions, "token": tokens})
        for name, part in parts.items():
            frame[name] = part[row].cpu().double().numpy()
        return frame[frame["position"] >= 0].reset_index(drop=True)

    def _text(self, row: int) -> tuple[list[int], list[str]]:
        """Of each column: its position in the row's text (negative at padding), and its token."""
        cache, hook = self.cache, self.coder.written_at
        text = cache.batch.of(hook, self.error)
        spelled = cache.str_tokens
        if text is cache.batch.decoder and cache.decoder_str_tokens is not None:
            spelled = cache.decoder_str_tokens
        return text.positions[row].tolist(), spelled[row]

    def face(self) -> Face:
        parts = {name: float(getattr(self, name).sum())
                 for name in ("features", "bias", "skip", "error")}  # fmt: skip
        return Face(
            "Relevance of features",
            {"coder": self.coder.name, "target": self.cache.target.text, **parts},
            self.top(),
            ["relevance"],
            ["The largest in size, of the first row; in units of the target, as the parts."],
        )


def feature_relevance(
    model: TransformerBridge,
    input: Any,
    target: Any = None,
    coders: SparseCoder | Sequence[SparseCoder] = (),
    composite: Composite | Mapping[str, Rule] | None = None,
    **options: Any,
) -> list[FeatureRelevance]:
    """Relevance of every feature of some coders, and of their errors, from one explanation.

    Args:
        model: a ``TransformerBridge``, in eval mode.
        input: as for `lenslrp.run_with_relevance`.
        target: likewise.
        coders: one, or several; each is read beside the others, not through them.
        composite: the rules, likewise.
        options: likewise, such as ``prepend_bos`` or ``attention_mask``.

    Returns:
        One result a coder, in the order given.

    Raises:
        InputError: no coders, a hook point that the model lacks or that is not on the path of the
            target, a coder of another width, a layer of a cross-layer transcoder, or what
            `lenslrp.run_with_relevance` refuses.

    Examples:
        >>> found = feature_relevance(model, "The capital of France is", " Paris", coder)[0]
        >>> torch.testing.assert_close(found.total, R["blocks.5.hook_resid_post"].sum(dim=-1))
    """
    coders = [coders] if isinstance(coders, SparseCoder) else list(coders)
    if not coders:
        raise InputError("give a coder, or several")
    for coder in coders:
        require_one_layer(coder, "feature_relevance")
    places = {coder.written_at for coder in coders}
    inputs = {coder.hook for coder in coders} - places
    for hook in sorted(places | inputs):
        known_hook(model, hook)
    read: dict[str, Tensor] = {}
    delivered: dict[str, tuple[Tensor, Tensor]] = {}

    def deliver(hook: str, y: Tensor, g: Tensor) -> None:
        if hook in delivered:
            raise InputError(f"{hook} is met several times in one pass, where coders have no place")
        delivered[hook] = (y.clone(), g.clone())

    with Session(model, composite, ledger=False, stays=False) as session:
        _, cache = session.run_with_relevance(
            input, target, sorted(places),
            reduce={hook: Deliver(partial(deliver, hook)) for hook in places},
            read={hook: partial(read.__setitem__, hook) for hook in inputs},
            **options,
        )  # fmt: skip
    missing = sorted(places - set(delivered))
    if missing:
        raise InputError(
            f"{', '.join(missing)}: not on the path of this target, no relevance there"
        )
    read |= {hook: y for hook, (y, _) in delivered.items()}
    return [
        _of_coder(
            coder,
            widened(read[coder.hook].detach()),
            *delivered[coder.written_at],
            cache,
        )
        for coder in coders
    ]


@torch.no_grad()
def _of_coder(
    coder: SparseCoder, x: Tensor, y: Tensor, g: Tensor, cache: RelevanceCache
) -> FeatureRelevance:
    y, g = coder.flat_output(y), coder.flat_output(g)
    activations = coder.encode(x)
    written = coder.decode(activations, x)
    mean, scale = coder.denormalizer(coder.flat(x))
    constant = scale * coder.b_dec.to(g) + mean
    skip = torch.zeros_like(y) if coder.W_skip is None else coder.flat(x) @ coder.W_skip.to(x)
    return FeatureRelevance(
        coder, activations * scale * (g @ coder.W_dec.to(g).T), activations,
        bias=(constant * g).sum(dim=-1), skip=(skip * g).sum(dim=-1),
        error=((y - written) * g).sum(dim=-1), cache=cache,
    )  # fmt: skip
