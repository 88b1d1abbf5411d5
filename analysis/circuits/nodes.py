"""Nodes of a circuit: what can be patched at a hook point, one by one.

A component class says at which hook point its nodes are and what one node is: the whole vector, a
head, or a single entry. Everything about nodes is computed on one view of a hook point's tensor,
[pair, pos, unit, feature].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lenslrp.analysis.circuits.measured_pairs import MeasuredPairs, batch_of, metric_values
from lenslrp.analysis.circuits.pairs import ordered
from lenslrp.analysis.circuits.rows import PairRows
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.analysis.units.kinds import Unit
from lenslrp.analysis.units.locations import (
    head_hooks,
    require_one_meaning,
    require_readable_heads,
)
from lenslrp.analysis.units.parsing import parse_unit
from lenslrp.batch import Batch
from lenslrp.edits import Edit
from lenslrp.errors import InputError
from lenslrp.hooks.components import hook_points
from lenslrp.hooks.readers import SCAN_HOOKS, select_names
from lenslrp.hooks.structure import components, layer_of
from lenslrp.logits import Target, at_columns
from lenslrp.progress import progress_bar
from lenslrp.reductions import Deliver
from lenslrp.unused import require_used

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Kind = Literal["whole", "head", "entry"]
Units = Float[Tensor, "pair pos unit feature"]


@dataclass(frozen=True)
class Component:
    """A class of nodes: the end of their hook point's name, and what one node of it is."""

    hook: str
    kind: Kind


COMPONENTS: Mapping[str, Component] = {
    "tokens": Component("hook_embed", "whole"),
    "residual": Component("hook_resid_pre", "whole"),
    "attention": Component("hook_attn_out", "whole"),
    "mlp": Component("hook_mlp_out", "whole"),
    "heads": Component("attn.hook_z", "head"),
    "neurons": Component("mlp.hook_post", "entry"),
    "q": Component("attn.hook_q", "head"),
    "k": Component("attn.hook_k", "head"),
    "v": Component("attn.hook_v", "head"),
    "recurrent": Component("hook_scan_out", "head"),
    "channels": Component("hook_scan_in", "entry"),
}
"""Name -> component. To patch a head's query is to patch what it reads through its query matrix;
`k` and `v` of grouped queries have one node a group.

`heads` are those of attention and of recurrent mixers; with `recurrent` beside them, those of
attention. The head of a mixer without heads is its whole scan. `channels` are the values that a
scan takes up, one number each (of mixers with heads, one head's after another's)."""


@dataclass(frozen=True, order=True)
class Node:
    """One node: a unit at a hook point, at one position or (`None`) at all of them.

    A position counts the tokens of each row's own prompt, -1 being its last. Shorter rows may lack
    one that counts from the beginning; all must have one that counts from the end.

    Examples:
        >>> str(Node("blocks.9.attn.hook_z", 6, -1))
        'blocks.9.attn.hook_z[6]@-1'
    """

    hook: str
    unit: int
    position: int | None = None

    def place(self, pairs: PairRows) -> tuple[Any, Any, int]:
        """Where it is in the units of its hook point, in the rows that have it."""
        return (*pairs.batch.place(self.position), self.unit)

    def as_unit(self) -> Unit:
        """The neuron, head or channel that it is, at all positions.

        Raises:
            InputError: a node that is none: a whole vector, a head's query, key or value.

        Examples:
            >>> Node("blocks.9.attn.hook_z", 6, -1).as_unit()
            Head(layer=9, index=6, cross=False, side='decoder')
        """
        return parse_unit(str(replace(self, position=None)))

    def __str__(self) -> str:
        place = "" if self.position is None else f"@{self.position}"
        return f"{self.hook}[{self.unit}]{place}"


TARGET = Node("target", 0)
"""Where all edges end: what is explained."""


def as_units(kind: Kind, x: Tensor, hook: str) -> Units:
    """A hook point's tensor as [pair, pos, unit, feature]; a view.

    Raises:
        InputError: a tensor of another shape (some MLPs flatten batch and positions into one).
    """
    if hook.endswith(SCAN_HOOKS) and x.ndim == (3 if kind == "head" else 4):
        x = x.unsqueeze(-2) if kind == "head" else x.flatten(2)
    if x.ndim != (4 if kind == "head" else 3):
        shape = "[batch, pos, head, d_head]" if kind == "head" else "[batch, pos, feature]"
        raise InputError(f"{hook} is {list(x.shape)}; nodes need {shape}")
    return x if kind == "head" else x.unsqueeze(-2 if kind == "whole" else -1)


def place_components(model: TransformerBridge, names: Sequence[str]) -> dict[str, str]:
    """Hook point -> component name, for all blocks, in the model's order.

    Raises:
        InputError: a component that does not exist, here or at all, or whose tensor nothing uses.
    """
    if isinstance(names, str):
        raise InputError(f"components is a list of names, not one name: [{names!r}]")
    unknown = [name for name in names if name not in COMPONENTS]
    if unknown or not names:
        raise InputError(f"components are some of {', '.join(COMPONENTS)}, not {names!r}")
    parts = components(model)
    points = hook_points(model, parts)
    placed: dict[str, str] = {}
    for name in sorted(names, key="heads".__ne__):  # what others name is theirs
        hooks = _hooks_of(name, points)
        if not hooks:
            there = [other for other in COMPONENTS if _hooks_of(other, points)]
            raise InputError(
                f"no hook point {COMPONENTS[name].hook!r} in this model, which has no {name!r}: "
                f"choose from {', '.join(there)}"
            )
        placed |= dict.fromkeys(hooks, name)
    if "heads" in names:
        require_readable_heads(parts)
    for hook in placed:
        require_one_meaning(points, hook)
    require_used(model, placed)
    return placed


def _hooks_of(name: str, points: Mapping[str, Any]) -> list[str]:
    """The hook points of a class of nodes, layer by layer."""
    end = f".{COMPONENTS[name].hook}"
    if name == "heads":
        return head_hooks(points)
    known = any(f".{point}".endswith(end) for point in points)
    return select_names(points, end[1:])[0] if known else []


def require_positions(nodes: Iterable[Node], pairs: MeasuredPairs) -> None:
    """Refuse a position that no pair has, or from an end that rows do not have alike.

    Raises:
        InputError: naming the node.
    """
    longest = max(pairs.batch.lengths)
    for node in nodes:
        position = node.position
        if position is not None and position < 0:
            if pairs.parts > 1:
                raise InputError(
                    f"{node}: answers of several tokens stand behind the prompts, and the two of a "
                    "pair may end at different positions: count from the beginning"
                )
            pairs.batch.require(position, f"{node}: position")
        elif position is not None and position >= longest:
            raise InputError(f"{node}: the longest prompt has {longest} tokens")


def delivering(
    hooks: Mapping[str, str], on: Callable[[str, Units, Units], None]
) -> dict[str, Deliver]:
    """Of a relevance pass, `reduce`: deliver activation and coefficient at each hook point.

    Args:
        hooks: hook point -> component.
        on: called with hook point, activation and coefficient.
    """

    def deliver(x: Tensor, g: Tensor, *, hook: str) -> None:
        kind = COMPONENTS[hooks[hook]].kind
        on(hook, as_units(kind, x, hook), as_units(kind, g, hook))

    return {hook: Deliver(partial(deliver, hook=hook)) for hook in hooks}


def largest(frame: pd.DataFrame, column: str, k: int) -> pd.DataFrame:
    """The `k` rows whose `column` is largest in size; ties keep their order."""
    order = frame[column].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order[:k]].reset_index(drop=True)


def masking(pairs: PairRows, device: Any) -> dict[str, Tensor]:
    """`attention_mask` where there is padding."""
    return {} if bool(pairs.mask.all()) else {"attention_mask": pairs.mask.long().to(device)}


def read_units(
    model: TransformerBridge, batch: Batch, target: Target, hooks: Mapping[str, str], **options: Any
) -> tuple[Float[Tensor, " pair"], dict[str, Units]]:
    """Metrics and the activations at hook points (hook -> component), in one pass."""
    units: dict[str, Units] = {}

    def keep(x: Tensor, *, hook: str) -> None:
        units[hook] = as_units(COMPONENTS[hooks[hook]].kind, x, hook)

    readers = {hook: partial(keep, hook=hook) for hook in hooks}
    return metric_values(model, batch, target, read=readers, **options), units


def patched(node: Node, component: str, units: Units, pairs: PairRows) -> Edit:
    """One node as it is in `units`, the activations of its hook point in another run."""
    at = node.place(pairs)

    def put(x: Tensor) -> Tensor:
        y = x.clone(memory_format=torch.contiguous_format)  # so that its units are a view
        as_units(COMPONENTS[component].kind, y, node.hook)[at] = units[at]
        return y

    return Edit(node.hook, function=put)


def outputs_before(outputs: Mapping[int, Any], hook: str) -> dict[int, Any]:
    """Of what blocks returned, that of the blocks before a hook point's own."""
    return {layer: out for layer, out in outputs.items() if layer < (layer_of(hook) or 0)}


@dataclass(frozen=True, eq=False)
class Runs:
    """The two runs of some pairs.

    Attributes:
        pairs, other_pairs: the rows as the base run and the other one see them, and the metric.
        base, other: [pair, pos], tokens of the run that is changed, and of the one whose
            activations are patched in.
        hooks: hook point -> component, of the nodes.
        passes: counts those of one pair through the model.
    """

    model: TransformerBridge
    pairs: MeasuredPairs
    other_pairs: MeasuredPairs
    base: Int[Tensor, "pair pos"]
    other: Int[Tensor, "pair pos_other"]
    hooks: Mapping[str, str]
    by_position: bool
    passes: PassCount

    def read(self, **options: Any) -> tuple[Float[Tensor, " pair"], dict[str, Units]]:
        """`read_units` of the base run."""
        return self._read(self.base, self.pairs, options)

    def read_other(self, **options: Any) -> tuple[Float[Tensor, " pair"], dict[str, Units]]:
        """`read_units` of the other run, at its own positions."""
        return self._read(self.other, self.other_pairs, options)

    def _read(
        self, tokens: Tensor, pairs: MeasuredPairs, options: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Units]]:
        self.passes.forward += len(pairs)
        batch = batch_of(self.model, tokens, pairs)
        return read_units(self.model, batch, pairs, self.hooks, **options)

    def exchanged(self, other: Float[Tensor, "pair pos_other unit feature"], base: Units) -> Units:
        """Activations of the other run at the base run's positions.

        A token that nothing in the other run corresponds to keeps those that it has.
        """
        if self.pairs.counterpart is None:
            return other
        columns = self.pairs.counterpart.to(other.device)
        found = at_columns(other, columns.clamp(min=0))
        return torch.where((columns >= 0)[..., None, None], found, base)


def paired_runs(
    model: TransformerBridge,
    measured: MeasuredPairs,
    size: int,
    direction: str,
    hooks: Mapping[str, str],
    by_position: bool,
    passes: PassCount,
) -> Iterator[Runs]:
    """The runs of `size` rows after another, on the model's device."""
    device = next(model.parameters()).device
    with progress_bar("pairs", total=len(measured), unit="row") as bar:
        for part in measured.chunks(size):
            rows = part.beside_clean(model)
            passes.forward += len(rows) if rows.clean_logits is not None else 0
            sides = ordered(direction, rows.seen_from("corrupt"), rows.seen_from("clean"))
            base, other = ordered(direction, rows.corrupt.to(device), rows.clean.to(device))
            yield Runs(model, *sides, base, other, hooks, by_position, passes)
            bar.update(len(part))
