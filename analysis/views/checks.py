"""What a report sets beside relevance: the model's predictions, and two interventions.

Relevance says which head and which token mattered most for the explained token. So the head is
switched off, and the token replaced by another one, and the token's probability is read again; each
beside a control of the same size, a head of the same layer and a token of the same prompt whose
relevance is in the middle of the others'. One forward pass runs them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lenslrp.batch import Batch
from lenslrp.edits import Edit
from lenslrp.errors import InputError
from lenslrp.forward import forward
from lenslrp.logits import shown
from lenslrp.text.names import token_ids
from lenslrp.text.spelling import str_token
from lenslrp.text.visible_text import visible

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.cache import RelevanceCache

SHOWN_PREDICTIONS = 5
SHOWN_HEADS = 5
REPLACEMENTS = (" something", " it", " a", "the", ".", "_")
"""What stands in the place of a token: the first that is one token, of a model without a mask."""


@dataclass(frozen=True)
class Trial:
    """One intervention and its control: the explained token's probability.

    Attributes:
        what, control: what is changed.
        before: the probability in the model as it is.
        after, control_after: with the change.
    """

    what: str
    control: str
    before: float
    after: float
    control_after: float

    @property
    def agrees(self) -> bool:
        """Whether the probability falls, and by more than under the control."""
        return self.after < min(self.before, self.control_after)


@dataclass(frozen=True)
class HeadRead:
    """A head, its relevance, and where its attention is from the explained position."""

    layer: int
    head: int
    relevance: float
    attends: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Checks:
    """What a report sets beside relevance.

    Attributes:
        predictions: the most probable tokens there, with their probabilities.
        token: the explained one.
        rank: its rank, from 1.
        probability: its probability.
        trials: the interventions that could be made.
        heads: those with the largest relevance, in size.
    """

    predictions: tuple[tuple[str, float], ...]
    token: str
    rank: int
    probability: float
    trials: tuple[Trial, ...]
    heads: tuple[HeadRead, ...]

    def __str__(self) -> str:
        """For a terminal: what the model predicts, and a line a trial."""
        best = ", ".join(f"{visible(token)} {p:.3f}" for token, p in self.predictions)
        lines = [
            f"{trial.what}: {trial.after:.3f}; control, {trial.control}: {trial.control_after:.3f} "
            f"({'agrees' if trial.agrees else 'does not agree'})"
            for trial in self.trials
        ]
        asked = f"probability of {visible(self.token)}: {self.probability:.3f}, rank {self.rank:,}"
        return "\n  ".join([asked, *map(visible, lines), f"predicted: {best}"])


def checked(model: TransformerBridge, R: RelevanceCache, row: int = 0) -> Checks:
    """Run the model on one row of `R` again, as it is and with the four changes.

    Args:
        model: the bridge that was explained.
        R: with every head's relevance, where heads are to be looked at.
        row: which batch row.

    Raises:
        InputError: the input was no text of a decoder, or the target no single token.
    """
    if not R.target.asked:
        raise InputError("the target is about no single token")
    if R.patches is not None or R.decoder_tokens is not None or model.tokenizer is None:
        raise InputError("predictions are shown of decoders that read text alone")
    position, token = R.target.asked[row]
    own = R[row] if len(R.tokens) > 1 else R
    real = own.attention_mask[0]
    ids, relevance = own.token_ids[0][real].tolist(), own.tokens[0][real]
    query = position if position >= 0 else len(ids) + position
    heads = _ranked_heads(own)
    rows = [list(ids) for _ in range(5)]
    words = _replace_tokens(model, rows, relevance, query)
    edits, pair = _switch_off(heads)
    patterns: dict[str, Tensor] = {}
    layers = {f"blocks.{layer}.attn.hook_pattern" for layer, _, _ in heads[:SHOWN_HEADS]}
    read = {
        name: partial(_keep, patterns, name, query) for name in layers if name in model.hook_dict
    }
    columns = torch.full((len(rows), 1), query)
    with forward(model, Batch.of_rows(rows), edits=edits, read=read, columns=columns) as run:
        outputs = run.outputs()
        probabilities = outputs.rows_at(position).detach().float().softmax(dim=-1).cpu()
    first, after = probabilities[0], probabilities[:, token].tolist()
    top = first.topk(min(SHOWN_PREDICTIONS, len(first)))
    return Checks(
        tuple(
            (shown(outputs, i), p)
            for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ),
        shown(outputs, token),
        int((first > first[token]).sum()) + 1,
        after[0],
        tuple(
            Trial(*names, after[0], after[i], after[i + 1])
            for i, names in ((1, pair), (3, words))
            if names is not None
        ),
        tuple(
            HeadRead(layer, head, value, _attended(own, patterns, layer, head))
            for layer, head, value in heads[:SHOWN_HEADS]
        ),
    )


def _keep(patterns: dict[str, Tensor], name: str, query: int, x: Tensor) -> None:
    """Where the heads of the first row attend from one position, [head, key]."""
    if x.ndim == 4:
        patterns[name] = x[0, :, min(query, x.shape[2] - 1)].detach().float().cpu()


def _ranked_heads(R: RelevanceCache) -> list[tuple[int, int, float]]:
    """(layer, head, relevance), the largest first in size; none where heads were not read."""
    try:
        table = R.heads().stack()
    except InputError:
        return []
    heads = [
        (layer, int(head), float(value))
        for (layer, head), value in table.items()
        if isinstance(layer, int)
    ]
    return sorted(heads, key=lambda head: -abs(head[2]))


def _switch_off(
    heads: list[tuple[int, int, float]],
) -> tuple[list[Edit], tuple[str, str] | None]:
    """Rows 1 and 2 without the head of most relevance, and without another of its layer."""
    positive = [entry for entry in heads if entry[2] > 0]
    if not positive:
        return [], None
    layer, head, _ = max(positive, key=lambda entry: entry[2])
    others = sorted((value, other) for at, other, value in heads if at == layer and other != head)
    if not others:
        return [], None
    control = others[len(others) // 2][1]
    hook = f"blocks.{layer}.attn.hook_z"
    edits = [Edit(hook, (unit,), rows=(row,)) for row, unit in ((1, head), (2, control))]
    return edits, (f"head {layer}.{head} off", f"head {layer}.{control} off")


def _replace_tokens(
    model: TransformerBridge, rows: list[list[int]], relevance: Tensor, query: int
) -> tuple[str, str] | None:
    """Replace the token of most relevance in row 3, and one of middling relevance in row 4.

    Special tokens, the first one (where attention rests) and the position that predicts are left.
    """
    ids, tokenizer = rows[0], model.tokenizer
    special = set(tokenizer.all_special_ids)
    free = [p for p in range(1, len(ids)) if p != query and ids[p] not in special]
    free.sort(key=lambda p: -float(relevance[p]))
    other = tokenizer.mask_token_id
    for text in () if other is not None else REPLACEMENTS:
        found = token_ids(tokenizer, text)
        if len(found) == 1 and found[0] not in ids:
            other = found[0]
            break
    if len(free) < 2 or other is None:
        return None
    best, control = free[0], free[(len(free) + 1) // 2]
    rows[3][best] = rows[4][control] = other
    written = repr(str_token(tokenizer, other))
    names = [repr(str_token(tokenizer, ids[p])) for p in (best, control)]
    return f"{names[0]} replaced by {written}", f"{names[1]} replaced by {written}"


def _attended(
    R: RelevanceCache, patterns: dict[str, Tensor], layer: int, head: int
) -> tuple[tuple[str, float], ...]:
    """The two tokens that a head attends to most, with its attention."""
    pattern = patterns.get(f"blocks.{layer}.attn.hook_pattern")
    if pattern is None or head >= len(pattern):
        return ()
    best = pattern[head].topk(min(2, pattern.shape[1]))
    tokens = R.str_tokens[0]
    return tuple(
        (tokens[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
