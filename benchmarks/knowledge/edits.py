"""Interventions on copies of one prompt, a row each, and what they do to answers and to text.

Used by `neurons.py`. Equal edits are run once; an unedited row comes first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.knowledge.scores import HOOK, Neurons, last_only
from lenslrp.edits import Edit, edit_units

ROWS = 128  # of a batch


@dataclass(frozen=True)
class Row:
    """One intervention: what it is called, and its edits (for all rows; the batch says which)."""

    label: tuple[Any, ...]
    edits: tuple[Edit, ...]


def scaled(label: tuple[Any, ...], neurons: Neurons, scale: float) -> Row:
    layers: dict[int, list[int]] = defaultdict(list)
    for layer, neuron in neurons:
        layers[layer].append(neuron)
    edits = tuple(Edit(HOOK.format(n), tuple(sorted(layers[n])), scale) for n in sorted(layers))
    return Row(label, edits)


def set_to(label: tuple[Any, ...], neurons: Neurons, values: Iterable[float]) -> Row:
    pairs = zip(neurons, values, strict=True)
    edits = [Edit(HOOK.format(n), (i,), 0.0, v, positions=(-1,)) for (n, i), v in pairs]
    return Row(label, tuple(edits))


@torch.no_grad()
def run_rows(model: TransformerBridge, ids: Iterable[int], rows: list[Row]) -> Iterator[Tensor]:
    """Logits of every row in order, an unedited one first; equal edits are run once."""
    tokens = torch.tensor(list(ids))
    unique = list(dict.fromkeys([(), *(row.edits for row in rows)]))
    logits: list[Tensor] = []
    for start in range(0, len(unique), ROWS):
        some = unique[start : start + ROWS]
        edits = [replace(edit, rows=(place,)) for place, group in enumerate(some) for edit in group]
        with edit_units(model, edits):
            logits.extend(model(tokens.expand(len(some), -1)))
    place = {edit: index for index, edit in enumerate(unique)}
    yield logits[0]
    for row in rows:
        yield logits[place[row.edits]]


def answers(
    model: TransformerBridge, ids: Iterable[int], wanted: list[int], rows: list[Row]
) -> dict[str, Any]:
    """Logit, log-probability and rank of the wanted tokens in every row, and its top token."""
    results = []
    with model.hooks(fwd_hooks=[("unembed.hook_in", last_only)]):
        for logits in run_rows(model, ids, rows):
            last = logits[-1].double()
            normal = last.logsumexp(dim=0)
            answered = []
            for token in wanted:
                logit = float(last[token])
                rank = int((last > last[token]).sum()) + 1
                answered.append((round(logit, 5), round(logit - float(normal), 5), rank))
            results.append([answered, int(last.argmax())])
    return {
        "plain": results[0],
        "rows": [[r.label, *t] for r, t in zip(rows, results[1:], strict=True)],
    }


def surprise(model: TransformerBridge, ids: list[int], rows: list[Row]) -> dict[str, Any]:
    """Mean negative log-likelihood of a text's tokens in every row, in nats."""
    following = torch.tensor(ids[1:])
    surprises = []
    for logits in run_rows(model, ids, rows):
        losses = torch.nn.functional.cross_entropy(logits[:-1], following)
        surprises.append(round(float(losses), 6))
    return {
        "plain": surprises[0],
        "rows": [[r.label, t] for r, t in zip(rows, surprises[1:], strict=True)],
    }
