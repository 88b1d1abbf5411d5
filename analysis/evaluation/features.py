"""The target's value when a part of the input, or of the model, is taken away.

A perturbation test evaluates the target many times, each time without some features. Everything
that can be perturbed is therefore one type, `Features`: tokens whose embeddings
are replaced, heads and neurons that are switched off, patches of an image that are painted over.
The metrics of `lenslrp.analysis.evaluation.faithfulness` know nothing else.

Tokens go as in Achtibat et al. 2024: their whole embedding is set to zero, through a hook at the
embedding (learned positions stay).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lenslrp.analysis.common.statistics import Numbers
from lenslrp.analysis.passes.prompts import (
    ExplainedPrompt,
    Values,
    batch_logits,
    target_values,
)
from lenslrp.batch import Batch
from lenslrp.errors import InputError
from lenslrp.text.names import token_id

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Masks = NDArray[np.bool_]

TOKENS_PER_PASS = 4096
"""Tokens of all rows of one forward pass, padding included."""


@dataclass(frozen=True, eq=False)
class Features:
    """What can be taken away from one input.

    Attributes:
        index: [size], which entry of the relevance vector each feature is.
        without: from masks [row, size], True where a feature is gone, to the target's values.
    """

    index: NDArray[np.int64]
    without: Callable[[Masks], Values]

    @property
    def size(self) -> int:
        return len(self.index)

    def of(self, relevance: Any) -> Numbers:
        """The features' part of a relevance vector (tensor or array), in float64."""
        if isinstance(relevance, Tensor):
            relevance = relevance.detach().double().cpu().numpy()
        values: Numbers = np.asarray(relevance, dtype=np.float64).ravel()[self.index]
        return values


def tokens_of(
    model: TransformerBridge,
    prompt: ExplainedPrompt,
    *,
    baseline: str = "zero",
    keep: Sequence[int] = (),
) -> Features:
    """The tokens of a prompt as features.

    Args:
        model: a ``TransformerBridge``.
        prompt: from `as_prompt`.
        baseline: what stands in place of a token: ``"zero"``, the ``"mean"`` embedding of the
            vocabulary, or a token, as ``"token:</s>"`` (``"eos"`` and ``"pad"`` are the
            tokenizer's).
        keep: positions that are never taken away; negative from the end of the prompt. ``[0]``
            keeps the first token, at which many models park attention that is meant for nothing.

    Returns:
        `Features` of size pos less the kept ones; ``without(masks)`` are the target's values.

    Raises:
        InputError: an unknown baseline, or a position outside the prompt.

    Examples:
        ```python
        features = tokens_of(model, as_prompt(model, "The capital of France is", " Paris"))
        features.without(np.eye(features.size, dtype=bool)).value  # [5]: one token gone in each
        ```
    """
    text = Batch.of_rows([prompt.given[0].tolist()])
    kept = {text.column(position, what="keep: position") for position in keep}
    index = np.array([i for i in range(prompt.length) if i not in kept], dtype=np.int64)
    _fill(model, baseline)  # an unknown one is refused here, not later

    def without(removed: Masks) -> Values:
        whole = np.zeros((len(removed), prompt.length), dtype=bool)
        whole[:, index] = removed
        return token_values(model, [prompt], [whole], baseline=baseline)[0]

    return Features(index, without)


def token_values(
    model: TransformerBridge,
    prompts: Sequence[ExplainedPrompt],
    removed: Sequence[Masks],
    *,
    baseline: str = "zero",
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> list[Values]:
    """The targets of several prompts, each with several sets of its tokens taken away.

    Rows of all prompts share forward passes of up to ``tokens_per_pass`` tokens.

    Args:
        removed: for each prompt, masks [row, pos] over its tokens.
        baseline: as in `tokens_of`.

    Returns:
        One `Values` a prompt, a value for each of its rows.
    """
    values = [np.full((2, len(masks)), np.nan) for masks in removed]
    rows = [(p, row) for p, masks in enumerate(removed) for row in range(len(masks))]
    rows.sort(key=lambda row: len(prompts[row[0]].tokens))
    fill = _fill(model, baseline)
    for chunk in _chunks(rows, [len(prompts[p].tokens) for p, _ in rows], tokens_per_pass):
        chunk_prompts = [prompts[p] for p, _ in chunk]
        gone = [torch.from_numpy(removed[p][row]) for p, row in chunk]
        logits = batch_logits(
            model, chunk_prompts, embed=_replacing(gone, len(chunk_prompts[-1].tokens), fill)
        )
        for p in dict.fromkeys(p for p, _ in chunk):
            where = [i for i, (q, _) in enumerate(chunk) if q == p]
            values[p][:, [chunk[i][1] for i in where]] = target_values(
                model, prompts[p], logits[where]
            )
    return [Values(*pair) for pair in values]


def _chunks(
    rows: list[tuple[int, int]], lengths: list[int], limit: int
) -> Iterator[list[tuple[int, int]]]:
    """Rows in order of length, as many at once as fit, at least one."""
    start = 0
    for stop in range(1, len(rows) + 1):
        if stop == len(rows) or (stop + 1 - start) * lengths[stop] > limit:
            yield rows[start:stop]
            start = stop


def _replacing(
    gone: list[Tensor], width: int, fill: Callable[..., Any]
) -> Callable[[nn.Module, Tensor], Tensor]:
    """Replace the embeddings of removed tokens: the first stack's."""
    removed = torch.stack([nn.functional.pad(row, (0, width - len(row))) for row in gone])

    def replaced(module: nn.Module, out: Tensor) -> Tensor:
        return torch.where(removed.to(out.device)[..., None], fill(module), out)

    return replaced


def _fill(model: TransformerBridge, baseline: str) -> Callable[..., Any]:
    """A function from an embedding module to the vector that stands for a token that is gone."""
    if baseline == "zero":
        return _zero
    if baseline == "mean":
        return _mean
    name = {
        "eos": getattr(model.tokenizer, "eos_token", None),
        "pad": getattr(model.tokenizer, "pad_token", None),
    }.get(baseline, baseline.removeprefix("token:") if baseline.startswith("token:") else None)
    if name is None:
        raise InputError(
            f"baseline is 'zero', 'mean', 'eos', 'pad' or 'token:TOKEN', not {baseline!r}"
            + (", which this tokenizer does not have" if baseline in ("eos", "pad") else "")
        )
    return partial(_embedding_of, token_id(model.tokenizer, name, int(model.cfg.d_vocab)))


def _zero(module: nn.Module) -> float:
    return 0.0


def _embedding_of(token: int, module: Any) -> Tensor:
    ids = torch.tensor([[token]], device=module.weight.device)
    vector: Tensor = module.forward(ids)[0, 0]  # past the hooks
    return vector


def _mean(module: Any) -> Tensor:
    words = len(module.weight)
    total = torch.zeros(1, dtype=torch.float64, device=module.weight.device)
    for ids in torch.arange(words, device=total.device).split(1 << 14):
        total = total + module.forward(ids[None])[0].double().sum(dim=0)
    mean: Tensor = (total / words).to(module.weight.dtype)
    return mean
