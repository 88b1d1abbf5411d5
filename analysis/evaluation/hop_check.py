"""Is what hops point at needed? The answer's probability without it, against a control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from lenslrp import targets
from lenslrp.analysis.attribution.hops import Hops
from lenslrp.analysis.common.statistics import Numbers
from lenslrp.analysis.evaluation.features import Features, tokens_of
from lenslrp.analysis.evaluation.model_features import heads_of
from lenslrp.analysis.passes.prompts import as_prompt
from lenslrp.analysis.units.kinds import Head
from lenslrp.analysis.units.parsing import parse_unit
from lenslrp.errors import InputError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def check_hops(
    model: TransformerBridge, hops: Hops, *, k: int = 3, draws: int = 10, seed: int = 0
) -> pd.DataFrame:
    """The answer's probability with the traced tokens, or the top head, taken away.

    Tokens lose their embeddings (set to zero), a head writes nothing anywhere. The first token of
    the prompt is never taken, neither as traced nor as a control: many models park attention there.

    Args:
        model: the bridge that was explained, a decoder.
        hops: from `explain_hops`.
        k: how many tokens of the prompt, those with the most positive relevance over all hops.
        draws: how many controls: ``k`` other tokens of the prompt each, drawn by ``seed``; for the
            head, all others of its layer.
        seed: of the draws.

    Returns:
        A row for what is taken away: ``removed``, ``answer`` (the span's probability after the
        thought as it was written) and ``written`` (that of thought and answer together, which a
        broken step of the thought lowers). Controls are geometric means.

    Raises:
        InputError: an encoder-decoder, or a prompt of fewer than ``2k + 1`` tokens.

    Examples:
        >>> check_hops(model, H).loc["traced tokens", "answer"]
    """
    writing, (first, stop) = hops.writing, hops.span
    if k < 1 or draws < 1 or 2 * k + 1 > hops.start:
        raise InputError(
            f"{k} traced tokens and {k} others beside the first do not fit in a prompt of "
            f"{hops.start}: k is from 1 to {(hops.start - 1) // 2}, and draws from 1"
        )
    scored = {
        "answer": ([*writing.prompt, *writing.written[:first]], writing.written[first:stop]),
        "written": (writing.prompt, writing.written[:stop]),
    }
    traced = (1 + hops.prompt[1:].topk(k).indices).tolist()
    others = sorted({*range(1, hops.start)} - {*traced})
    random = np.random.default_rng(seed)
    drawn = [random.choice(others, k, replace=False).tolist() for _ in range(draws)]
    heads = [head for head in map(parse_unit, hops.hops[0].heads["head"]) if isinstance(head, Head)]
    best, order = heads[0], sorted(heads, key=lambda head: (head.layer, head.index))
    rivals = [
        [place]
        for place, head in enumerate(order)
        if head.layer == best.layer and head.index != best.index
    ]
    shown = ", ".join(repr(hops.str_tokens[place]) for place in traced)
    removed = ["", shown, f"{k} others, {draws} draws", str(best), f"{len(rivals)} of its layer"]
    table = {}
    for name, (before, span) in scored.items():
        prompt = as_prompt(model, torch.tensor(before), targets.Sequence(span))
        parts, tokens = heads_of(model, prompt), tokens_of(model, prompt)
        (whole, of_traced), of_drawn = np.split(_without(tokens, [[], traced, *drawn]), [2])
        (of_head,), of_rivals = np.split(_without(parts, [[order.index(best)], *rivals]), [1])
        table[name] = np.exp([whole, of_traced, of_drawn.mean(), of_head, of_rivals.mean()])
    index = ["nothing", "traced tokens", "other tokens", "top head", "other heads"]
    return pd.DataFrame({"removed": removed, **table}, index=index)


def _without(features: Features, gone: Sequence[Sequence[int]]) -> Numbers:
    """Log-probabilities of the target with each set of features taken away."""
    masks = np.zeros((len(gone), features.size), dtype=bool)
    for mask, places in zip(masks, gone, strict=True):
        mask[np.isin(features.index, places)] = True
    logs: Numbers = np.log(features.without(masks).probability)
    return logs
