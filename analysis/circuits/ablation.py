"""What nodes outside a circuit are set to, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.analysis.circuits.measured_pairs import MeasuredPairs, batch_of, metric_values
from lenslrp.analysis.circuits.metrics import Metric
from lenslrp.analysis.circuits.nodes import COMPONENTS, as_units, read_units
from lenslrp.analysis.circuits.pairs import PAIRS_AT_ONCE, Pairs
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
        keep: hook point -> [unit] or [row, unit], True or 1 where a node is left as it is, False or
            0 where it is ablated; what is between is interpolated.
        instead: hook point -> [row, pos, unit, feature]; row and pos may be 1.
    """

    def put(x: Tensor, *, name: str) -> Tensor:
        units = as_units(COMPONENTS[components[name]].kind, x, name)
        weight = keep[name].to(x).reshape(-1, 1, units.shape[2], 1)
        return torch.lerp(instead[name], units, weight).reshape(x.shape)

    names = [name for name, kept in keep.items() if kept.is_floating_point() or not kept.all()]
    return [Edit(name, function=partial(put, name=name)) for name in names]


@dataclass(frozen=True, eq=False)
class Ablation:
    """The clean run of some pairs, and what nodes are set to in it.

    Attributes:
        model, rows, components: whose run, of which rows, and hook point -> component name.
        instead: hook point -> [row, pos, unit, feature]; row and pos may be 1.
        clean: [pair], the metric of the clean run.
        floor: [pair], of the corrupted run; where `instead` are means, with every node ablated.
    """

    model: TransformerBridge
    rows: MeasuredPairs
    components: Mapping[str, str]
    instead: Mapping[str, Tensor]
    clean: Float[Tensor, " pair"]
    floor: Float[Tensor, " pair"]

    def run(self, keep: Mapping[str, Tensor], **options: Any) -> Float[Tensor, " pair"]:
        """The metric with nodes ablated.

        Args:
            keep: hook point -> [unit] or [pair, unit], as for `ablated`.
            options: of `lenslrp.forward.forward`.
        """
        copies = self.rows.parts
        rows = {hook: x if x.ndim == 1 else x.repeat(copies, 1) for hook, x in keep.items()}
        edits = ablated(self.components, rows, self.instead)
        return _clean_metric(self.model, self.rows, edits=edits, **options)


def _clean_metric(model: TransformerBridge, rows: MeasuredPairs, **options: Any) -> Tensor:
    batch = batch_of(model, rows.clean, rows)
    return rows.folded(metric_values(model, batch, rows, **options))


def ablations(
    model: TransformerBridge,
    pairs: Pairs,
    components: Mapping[str, str],
    metric: Metric,
    ablation: str,
    reference: Pairs | None,
    chunk: int,
) -> Iterator[Ablation]:
    """The clean runs of `chunk` pairs after another; arguments as for `verify`.

    Raises:
        InputError: an unknown ablation, a reference without means, the corrupted run's activations
            for prompts of different lengths.
    """
    if ablation not in ("corrupt", "mean"):
        raise InputError(f"ablation must be 'corrupt' or 'mean', not {ablation!r}")
    means = {}
    if ablation == "mean":
        by_unit = mean_activations(model, reference or pairs, components, chunk=chunk)
        means = {hook: mean[None, None] for hook, mean in by_unit.items()}
    elif reference is not None:
        raise InputError("reference is what means are taken over: it goes with ablation='mean'")
    elif pairs.counterpart is not None:
        raise InputError(
            "the prompts of these pairs have different numbers of tokens, so not every token of "
            "the clean run has activations in the corrupted one: give ablation='mean'"
        )
    for part in pairs.chunks(chunk):
        rows = MeasuredPairs.of(part, metric).beside_clean(model)
        clean = _clean_metric(model, rows)
        if means:
            found = Ablation(model, rows, components, means, clean, clean)
            nothing = {hook: torch.zeros(x.shape[2]) for hook, x in means.items()}
            yield replace(found, floor=found.run(nothing))
        else:
            batch = batch_of(model, rows.corrupt, rows)
            floor, instead = read_units(model, batch, rows, components)
            yield Ablation(model, rows, components, instead, clean, rows.folded(floor))
