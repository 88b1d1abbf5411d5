"""What nodes outside a circuit are set to, and how."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.analysis.circuits.measured_pairs import MeasuredPairs, batch_of
from lenslrp.analysis.circuits.nodes import COMPONENTS, as_units, read_units
from lenslrp.analysis.circuits.pairs import PAIRS_AT_ONCE, Pairs
from lenslrp.edits import Edit

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def mean_activations(
    model: TransformerBridge,
    pairs: Pairs,
    components: Mapping[str, str],
    *,
    chunk: int = PAIRS_AT_ONCE,
) -> dict[str, Float[Tensor, "unit feature"]]:
    """Each node's mean over both prompts of all pairs and all their real tokens.

    Where answers have several tokens, those that are teacher-forced count as well.
    """
    sums: dict[str, Tensor] = {}
    tokens_seen = 0
    for part in MeasuredPairs.of(pairs, "logit_difference").chunks(chunk):
        for side in ("clean", "corrupt"):
            rows = part.seen_from(side)
            batch = batch_of(model, getattr(rows, side), rows)
            tokens_seen += int(rows.mask.sum())
            for hook, x in read_units(model, batch, rows, components)[1].items():
                total = x[rows.mask.to(x.device)].sum(dim=0)
                sums[hook] = sums[hook] + total if hook in sums else total
    return {hook: total / tokens_seen for hook, total in sums.items()}


def ablated(
    components: Mapping[str, str],
    keep: Mapping[str, Tensor],
    instead: Mapping[str, Tensor],
) -> list[Edit]:
    """Every node outside a circuit, set to what `instead` holds.

    Args:
        components: hook point -> component name.
        keep: hook point -> [unit], True where a node is left as it is.
        instead: hook point -> [pair, pos, unit, feature]; pair and pos may be 1.
    """

    def put(x: Tensor, *, name: str) -> Tensor:
        units = as_units(COMPONENTS[components[name]].kind, x, name)
        kept = keep[name].to(x.device)[:, None]
        return torch.where(kept, units, instead[name]).reshape(x.shape)

    names = [name for name, kept in keep.items() if not kept.all()]
    return [Edit(name, function=partial(put, name=name)) for name in names]
