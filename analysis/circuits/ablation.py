"""What nodes are set to when they are ablated, and the run in which some of them are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.analysis.circuits.nodes import (
    COMPONENTS,
    as_units,
    batch_of,
    logit_differences,
    read_units,
)
from lenslrp.analysis.circuits.pairs import Pairs
from lenslrp.analysis.circuits.scores import PAIRS_AT_ONCE
from lenslrp.edits import Edit
from lenslrp.errors import InputError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def mean_activations(
    model: TransformerBridge,
    pairs: Pairs,
    components: Mapping[str, str],
    *,
    chunk: int = PAIRS_AT_ONCE,
) -> dict[str, Float[Tensor, "unit feature"]]:
    """Each node's mean over both prompts of all pairs and all their real tokens."""
    sums: dict[str, Tensor] = {}
    for part in pairs.chunks(chunk):
        for tokens in (part.clean, part.corrupt):
            batch = batch_of(model, tokens, part)
            for hook, x in read_units(model, batch, part, components)[1].items():
                total = x[part.mask.to(x.device)].sum(dim=0)
                sums[hook] = sums[hook] + total if hook in sums else total
    return {hook: total / (2 * int(pairs.mask.sum())) for hook, total in sums.items()}


@dataclass(frozen=True, eq=False)
class Ablation:
    """The clean run of some pairs, and what nodes are set to in it.

    Attributes:
        model, pairs, components: whose; hook point -> component name.
        instead: hook point -> [pair, pos, unit, feature]; pair and pos may be 1.
        clean, floor: [pair], as in `Verdict`.
    """

    model: TransformerBridge
    pairs: Pairs
    components: Mapping[str, str]
    instead: Mapping[str, Tensor]
    clean: Float[Tensor, " pair"]
    floor: Float[Tensor, " pair"]

    def run(self, keep: Mapping[str, Tensor], **options: Any) -> Float[Tensor, " pair"]:
        """The logit difference with every node as far from what it is as `keep` says.

        Args:
            keep: hook point -> [unit] or [pair, unit]; True or 1 leaves a node as it is, False or 0
                ablates it, and in between it is interpolated.
            options: of `lenslrp.forward.forward`.
        """
        batch = batch_of(self.model, self.pairs.clean, self.pairs)
        edits = _ablated(self.components, keep, self.instead)
        return logit_differences(self.model, batch, self.pairs, edits=edits, **options)


def _ablated(
    components: Mapping[str, str], keep: Mapping[str, Tensor], instead: Mapping[str, Tensor]
) -> list[Edit]:
    def put(x: Tensor, *, name: str) -> Tensor:
        units = as_units(COMPONENTS[components[name]].kind, x, name)
        weight = keep[name].to(x).reshape(-1, 1, units.shape[2], 1)
        return torch.lerp(instead[name], units, weight).reshape(x.shape)

    names = [name for name, kept in keep.items() if kept.is_floating_point() or not kept.all()]
    return [Edit(name, function=partial(put, name=name)) for name in names]


def ablations(
    model: TransformerBridge,
    pairs: Pairs,
    components: Mapping[str, str],
    ablation: str,
    reference: Pairs | None,
    chunk: int,
) -> Iterator[Ablation]:
    """What nodes are set to, for `chunk` pairs after another; arguments as for `verify`."""
    if ablation not in ("corrupt", "mean"):
        raise InputError(f"ablation must be 'corrupt' or 'mean', not {ablation!r}")
    means = {}
    if ablation == "mean":
        by_unit = mean_activations(model, reference or pairs, components, chunk=chunk)
        means = {hook: mean[None, None] for hook, mean in by_unit.items()}
    elif reference is not None:
        raise InputError("reference is what means are taken over: it goes with ablation='mean'")
    for part in pairs.chunks(chunk):
        clean = logit_differences(model, batch_of(model, part.clean, part), part)
        if means:
            found = Ablation(model, part, components, means, clean, clean)
            nothing = {hook: torch.zeros(x.shape[2]) for hook, x in means.items()}
            yield replace(found, floor=found.run(nothing))
        else:
            corrupted = batch_of(model, part.corrupt, part)
            floor, instead = read_units(model, corrupted, part, components)
            yield Ablation(model, part, components, instead, clean, floor)
