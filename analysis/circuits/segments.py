"""A forward pass in segments, so that a backward pass from one node ends at those before it.

At every node the graph is detached: what goes on is a leaf with the same values. A backward pass
that starts above the leaf of a node `d`, with `d`'s own coefficient, then propagates exactly the
relevance that flows through `d`, and arrives at every earlier node's leaf with what reached `d`
from there without passing through any other node: along the residual stream, through norms, and
through what is not a node itself. These are gradients conditional on `d`. Since no node is crossed,
such a pass is cheaper than a full one.

Each row of the batch starts by itself, so copies of a prompt serve as many nodes at once. A
relevance accounting by rows tells for each what was absorbed on the way.

Sparse coders may stand in the model's place (`lenslrp.analysis.circuits.replacement`): their active
features are nodes, [row, entry, 1, 1] instead of [row, pos, unit, feature], and their errors are
constants, where relevance ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from lenslrp.analysis.circuits.nodes import COMPONENTS, TARGET, Node, Units, as_units, delivering
from lenslrp.analysis.circuits.replacement import ActiveFeatures, features_key, stand_in
from lenslrp.analysis.units.coders import SparseCoder
from lenslrp.batch import Batch
from lenslrp.cache import RelevanceCache
from lenslrp.edits import edit_gradient
from lenslrp.errors import InputError
from lenslrp.hooks.components import hook_points
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.readers import converted, reverted
from lenslrp.hooks.structure import components
from lenslrp.logits import Target
from lenslrp.passes import Pass
from lenslrp.running import measuring
from lenslrp.sessions import Session

EMBEDDINGS = "embeddings"
"""The key of conditional gradients at the embeddings, tokens' and positions': [row, pos, 1, f]."""


def coefficients(
    session: Session, hooks: Mapping[str, str], **options: Any
) -> tuple[RelevanceCache, dict[str, tuple[Units, Units]]]:
    """Activation and coefficient of every node in one forward and backward pass.

    Args:
        hooks: hook point -> component.
        options: of `lenslrp.sessions.Session.run_with_relevance`.
    """
    nodes: dict[str, tuple[Units, Units]] = {}

    def keep(hook: str, x: Units, g: Units) -> None:
        nodes[hook] = x, g

    reduce = delivering(hooks, keep)
    _, cache = session.run_with_relevance(names_filter=list(hooks), reduce=reduce, **options)
    return cache, nodes


@dataclass(eq=False)
class SegmentedPass:
    """One forward pass under rules, detached at nodes; see `segmented`.

    Attributes:
        hooks: hook point -> component, in the model's order.
        outputs: hook point -> its tensor, above the leaf.
        leaves: hook point -> what goes on in its place.
        values: [row], the target.
        embeddings: leaves at the embeddings: tokens, then learned positions.
        active: which features of coders are nodes, by `replacement.features_key`.
        gates: hook point -> [row], what its gradient is multiplied by in the next backward pass.
    """

    hooks: Mapping[str, str]
    run: Pass
    target: Target
    keep: Mapping[str, Tensor] | None = None
    conducts: bool = False
    outputs: dict[str, Tensor] = field(default_factory=dict)
    leaves: dict[str, Tensor] = field(default_factory=dict)
    points: dict[str, Any] = field(default_factory=dict)
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    active: dict[str, ActiveFeatures] = field(default_factory=dict)
    gates: dict[str, Tensor] = field(default_factory=dict)

    @property
    def embeddings(self) -> list[Tensor]:
        return [*self.run.leaves.tokens, *self.run.leaves.positions]

    def at(self, hook: str) -> Units:
        """The activations at a hook point, [row, pos, unit, feature]."""
        return self._units(hook, self.outputs[hook].detach())

    def conditional_gradients(
        self, seeds: Mapping[str, Tensor], target: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One backward pass.

        Args:
            seeds: hook point -> coefficient above its leaf, [row, pos, unit, feature], 0 where
                nothing starts.
            target: [row], 1 where a row starts at the target.

        Returns:
            Hook point -> coefficient that arrives at its leaf; hook points that nothing reaches
            are left out. And [row], the relevance with which rows that start at the target began.
        """
        outputs, starts = [], []
        for hook, seed in seeds.items():
            top = self.outputs[hook]
            if top.requires_grad:
                outputs.append(top)
                starts.append(self._raw(hook, seed).to(top))
        if target is not None:
            outputs.append(self.values)
            starts.append(target.to(self.values))
        start_relevance = self.values.new_zeros(len(self.values), dtype=torch.float64)
        if not outputs:
            return {}, start_relevance
        if self.run.accounts is not None:
            self.run.accounts.clear()
        ends = [*self.leaves.values(), *self.embeddings]
        roots = self.run.roots(self.target) if target is not None else []
        with measuring(roots) as started:
            grads = torch.autograd.grad(outputs, ends, starts, retain_graph=True, allow_unused=True)
        for rows in started.values():
            start_relevance = start_relevance + rows
        arrived = {
            hook: self._units(hook, g)
            for hook, g in zip(self.leaves, grads[: len(self.leaves)], strict=True)
            if g is not None
        }
        for leaf, g in zip(self.embeddings, grads[len(self.leaves) :], strict=True):
            if g is not None:
                arrived.setdefault(EMBEDDINGS, leaf.new_zeros(0))
                arrived[EMBEDDINGS] = _beside(arrived[EMBEDDINGS], g)
        return arrived, start_relevance

    def into(
        self, downs: Sequence[Node], nodes: Mapping[str, tuple[Tensor, Tensor]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """A backward pass in which the k-th copy of the batch starts at the k-th node.

        Args:
            downs: nodes, `TARGET` among them; without a position, at all positions.
            nodes: hook point -> activation and coefficient, as `coefficients` finds them for the
                batch.

        Returns:
            As `conditional_gradients` does.
        """
        seeds: dict[str, Tensor] = {}
        starts = torch.zeros(len(self.values))
        batch = len(next(iter(nodes.values()))[1])
        text = Batch.of_mask(self.run.batch.mask[:batch])
        for k, down in enumerate(downs):
            rows = slice(k * batch, (k + 1) * batch)
            if down == TARGET:
                starts[rows] = 1
                continue
            g = nodes[down.hook][1]
            if down.hook not in seeds:
                seeds[down.hook] = g.new_zeros(len(starts), *g.shape[1:])
            at: tuple[Any, ...]
            if down.hook in self.active:
                at = (slice(None), *unit_at(down, self.active))
            else:
                at = (*text.place(down.position), down.unit)
            seeds[down.hook][rows][at] = g[at]
        return self.conditional_gradients(seeds, starts if bool(starts.any()) else None)

    def embedded(self) -> Units:
        """The embeddings, tokens' and positions' features side by side."""
        features = torch.empty(0)
        for leaf in self.embeddings:
            features = _beside(features, leaf.detach())
        return features

    def absorbed(self) -> dict[str, Tensor]:
        """Term of the ledger -> [row], what the last backward pass lost to it."""
        absorbed: dict[str, Tensor] = {}
        terms = {} if self.run.accounts is None else self.run.accounts.terms
        for (term, _, _), amount in terms.items():
            amount = amount.cpu().double()
            absorbed[term] = absorbed[term] + amount if term in absorbed else amount
        return absorbed

    def cut(self, key: str, out: Tensor) -> Tensor:
        """What goes on in the place of a tensor where nodes are: a leaf, where one is."""
        if key in self.outputs:
            raise InputError(f"{key} fires more than once in a pass; its units cannot be nodes")
        self.outputs[key] = out
        if self.conducts and out.requires_grad:
            self.leaves[key] = out
            return out
        kept = None
        if self.keep is not None and out.requires_grad:
            kept = self.keep.get(key)
            if kept is None or not bool(kept.any()):
                return out
        leaf = self.leaves[key] = out.detach().requires_grad_()
        if kept is None:
            return leaf
        units = self._units(key, out)
        mask = self._raw(key, kept[None, ..., None].to(out.device).expand_as(units).contiguous())
        return torch.where(mask, leaf, out)

    def _units(self, hook: str, x: Tensor) -> Units:
        if hook not in self.hooks:  # of a coder
            return x
        x = converted(self.points[hook], x)
        return as_units(COMPONENTS[self.hooks[hook]].kind, x, hook)

    def _raw(self, hook: str, units: Tensor) -> Tensor:
        """The inverse of `_units`."""
        if hook not in self.hooks:
            return units
        kind = COMPONENTS[self.hooks[hook]].kind
        x = units if kind == "head" else units.squeeze(-2 if kind == "whole" else -1)
        return reverted(self.points[hook], x).reshape(self.outputs[hook].shape)


def unit_at(node: Node, active: Mapping[str, ActiveFeatures]) -> tuple[int, int]:
    """Where a node at one position is in the units of its hook point, behind the rows."""
    there = active.get(node.hook)
    if there is None:
        return int(node.position or 0), node.unit
    return there.entries[int(node.position or 0), node.unit], 0


def _beside(features: Tensor, x: Tensor) -> Tensor:
    x = x.unsqueeze(-2)
    return x if features.numel() == 0 else torch.cat([features, x[:, : features.shape[1]]], dim=-1)


@contextmanager
def segmented(
    session: Session,
    prepared: Batch,
    target: Target,
    hooks: Mapping[str, str],
    *,
    keep: Mapping[str, Bool[Tensor, "pos unit"]] | None = None,
    accounting: bool = False,
    coders: Sequence[SparseCoder] = (),
    active: Mapping[str, ActiveFeatures] | None = None,
    gated: Sequence[str] = (),
    conducts: bool = False,
) -> Iterator[SegmentedPass]:
    """A forward pass that is detached at nodes, ready for any number of backward passes.

    Coverage is not checked here: the graph is detached on purpose. Run `coefficients` on the same
    input first.

    Args:
        session: of the model and its rules.
        prepared: the rows.
        target: what is explained, a value a row.
        hooks: hook point -> component: where nodes are.
        keep: hook point -> which of its units are nodes; all if not given. The others conduct.
        accounting: keep account of what each row's relevance is absorbed by.
        coders: stand in the model's place.
        active: which of their features are active; those that are in the first row, if not given.
        gated: hook points whose gradient `SegmentedPass.gates` may multiply.
        conducts: detach nothing; the leaves are the tensors themselves.

    Raises:
        InputError: a hook point that does not fire, or fires twice.
    """
    points = hook_points(session.model, components(session.model))
    nodes: dict[str, Any] = {hook: points[hook] for hook in hooks}
    passes: list[SegmentedPass] = []

    def at_nodes(at: Attached, run: Pass) -> None:
        segments = SegmentedPass(hooks, run, target, keep, conducts, points=nodes)
        passes.append(segments)
        for hook in hooks:
            at.hook(points[hook], partial(_detached, segments=segments, hook=hook))
        for hook in gated:
            at.hook(points[hook], partial(_gated, segments=segments, hook=hook))
        earlier: dict[str, list[tuple[ActiveFeatures, Tensor]]] = {}
        for coder in coders:
            key = features_key(coder)
            stand_in(
                at,
                points,
                coder,
                None if active is None else active[key],
                earlier,
                accounts=run.accounts,
                found=partial(segments.active.__setitem__, key),
                cut=segments.cut,
            )

    with session.forward(prepared, target, at_nodes=at_nodes, rows=accounting) as run:
        (segments,) = passes
        ends = [*hooks, *(features_key(coder) for coder in coders)]
        missing = [hook for hook in ends if hook not in segments.outputs]
        if missing:
            raise InputError(f"{missing[0]} does not fire in this model's forward pass")
        segments.values = target.values(run.outputs())
        yield segments


def _detached(_: Any, args: Any, out: Tensor, *, segments: SegmentedPass, hook: str) -> Tensor:
    return segments.cut(hook, out)


def _gated(_: Any, args: Any, out: Tensor, *, segments: SegmentedPass, hook: str) -> None:
    def gate(g: Tensor) -> Tensor | None:
        rows = segments.gates.get(hook)
        return None if rows is None else g * rows.to(g).view(-1, *[1] * (g.ndim - 1))

    if out.requires_grad:
        edit_gradient(out, gate)
