"""A forward pass cut at its nodes, so that a backward pass from one node ends at those before it.

At every node the graph is cut: what goes on is a leaf with the same values. A backward pass that
is seeded above the cut of a node ``d`` with ``d``'s own coefficient then carries exactly the
relevance that flows through ``d``, and arrives at every earlier node's leaf with what reached ``d``
from there without passing through any other node: along the residual stream, through norms, and
through what is not a node itself. Since no node is crossed, it is cheaper than a full one.

Each row of the batch is seeded by itself, so copies of a prompt carry as many nodes at once. Books
with rows tell for each what was absorbed on the way.
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
from lenslrp.batch import Batch
from lenslrp.cache import RelevanceCache
from lenslrp.errors import InputError
from lenslrp.hooks.components import hook_points
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.readers import converted
from lenslrp.hooks.structure import components
from lenslrp.logits import Target
from lenslrp.passes import Pass
from lenslrp.running import measuring
from lenslrp.sessions import Session

EMBEDDINGS = "embeddings"
"""Where flows that arrive at the embeddings are filed: tokens' and positions', [row, pos, 1, f]."""


def coefficients(
    session: Session, hooks: Mapping[str, str], **given: Any
) -> tuple[RelevanceCache, dict[str, tuple[Units, Units]]]:
    """Activation and coefficient of every node in one forward and backward pass.

    Args:
        hooks: hook point -> component.
        given: of :meth:`lenslrp.sessions.Session.run_with_relevance`.
    """
    found: dict[str, tuple[Units, Units]] = {}

    def keep(hook: str, x: Units, g: Units) -> None:
        found[hook] = x, g

    reduce = delivering(hooks, keep)
    _, cache = session.run_with_relevance(names_filter=list(hooks), reduce=reduce, **given)
    return cache, found


@dataclass(eq=False)
class CutPass:
    """One forward pass under rules, cut at nodes; see :func:`cut`.

    Attributes:
        hooks: hook point -> component, in the model's order.
        values: [row], the target.
        embeddings: leaves at the embeddings: tokens, then learned positions.
    """

    hooks: Mapping[str, str]
    run: Pass
    target: Target
    tops: dict[str, Tensor] = field(default_factory=dict)
    leaves: dict[str, Tensor] = field(default_factory=dict)
    points: dict[str, Any] = field(default_factory=dict)
    values: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def embeddings(self) -> list[Tensor]:
        return [*self.run.leaves.tokens, *self.run.leaves.positions]

    def at(self, hook: str) -> Units:
        """What flows at a hook point, [row, pos, unit, feature]."""
        return self._units(hook, self.tops[hook].detach())

    def flows(
        self, seeds: Mapping[str, Tensor], target: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One backward pass.

        Args:
            seeds: hook point -> coefficient above its cut, [row, pos, unit, feature], 0 where
                nothing starts.
            target: [row], 1 where a row starts at the target.

        Returns:
            Hook point -> coefficient that arrives below; hook points that nothing reaches are left
            out. And [row], the relevance with which rows that start at the target began.
        """
        outputs, starts = [], []
        for hook, seed in seeds.items():
            top = self.tops[hook]
            if top.requires_grad:
                outputs.append(top)
                starts.append(self._raw(hook, seed).to(top))
        if target is not None:
            outputs.append(self.values)
            starts.append(target.to(self.values))
        begun = self.values.new_zeros(len(self.values), dtype=torch.float64)
        if not outputs:
            return {}, begun
        if self.run.accounts is not None:
            self.run.accounts.clear()
        ends = [*self.leaves.values(), *self.embeddings]
        roots = self.run.roots(self.target) if target is not None else []
        with measuring(roots) as started:
            grads = torch.autograd.grad(outputs, ends, starts, retain_graph=True, allow_unused=True)
        for rows in started.values():
            begun = begun + rows
        found = {
            hook: self._units(hook, g)
            for hook, g in zip(self.leaves, grads[: len(self.leaves)], strict=True)
            if g is not None
        }
        for leaf, g in zip(self.embeddings, grads[len(self.leaves) :], strict=True):
            if g is not None:
                found.setdefault(EMBEDDINGS, leaf.new_zeros(0))
                found[EMBEDDINGS] = _beside(found[EMBEDDINGS], g)
        return found, begun

    def into(
        self, downs: Sequence[Node], here: Mapping[str, tuple[Tensor, Tensor]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """A backward pass in which the k-th copy of the batch starts at the k-th node.

        Args:
            downs: nodes, :data:`~lenslrp.analysis.circuits.nodes.TARGET` among them; without a
                position, at all positions.
            here: hook point -> activation and coefficient, as :func:`coefficients` finds them for
                the batch.

        Returns:
            As :meth:`flows` does.
        """
        seeds: dict[str, Tensor] = {}
        starts = torch.zeros(len(self.values))
        batch = len(next(iter(here.values()))[1])
        text = Batch.of_mask(self.run.batch.mask[:batch])
        for k, down in enumerate(downs):
            rows = slice(k * batch, (k + 1) * batch)
            if down == TARGET:
                starts[rows] = 1
                continue
            g = here[down.hook][1]
            if down.hook not in seeds:
                seeds[down.hook] = g.new_zeros(len(starts), *g.shape[1:])
            at = (*text.place(down.position), down.unit)
            seeds[down.hook][rows][at] = g[at]
        return self.flows(seeds, starts if bool(starts.any()) else None)

    def embedded(self) -> Units:
        """The embeddings, tokens' and positions' features side by side."""
        made = torch.empty(0)
        for leaf in self.embeddings:
            made = _beside(made, leaf.detach())
        return made

    def absorbed(self) -> dict[str, Tensor]:
        """Term of the ledger -> [row], what the last backward pass lost to it."""
        found: dict[str, Tensor] = {}
        terms = {} if self.run.accounts is None else self.run.accounts.terms
        for (term, _, _), amount in terms.items():
            amount = amount.cpu().double()
            found[term] = found[term] + amount if term in found else amount
        return found

    def _units(self, hook: str, x: Tensor) -> Units:
        x = converted(self.points[hook], x)
        return as_units(COMPONENTS[self.hooks[hook]].kind, x, hook)

    def _raw(self, hook: str, units: Tensor) -> Tensor:
        """The inverse of :meth:`_units`."""
        kind = COMPONENTS[self.hooks[hook]].kind
        x = units if kind == "head" else units.squeeze(-2 if kind == "whole" else -1)
        conversion = getattr(self.points[hook], "hook_conversion", None)
        return (x if conversion is None else conversion.revert(x)).reshape(self.tops[hook].shape)


def _beside(made: Tensor, x: Tensor) -> Tensor:
    x = x.unsqueeze(-2)
    return x if made.numel() == 0 else torch.cat([made, x[:, : made.shape[1]]], dim=-1)


@contextmanager
def cut(
    session: Session,
    prepared: Batch,
    target: Target,
    hooks: Mapping[str, str],
    *,
    keep: Mapping[str, Bool[Tensor, "pos unit"]] | None = None,
    books: bool = False,
) -> Iterator[CutPass]:
    """A forward pass that is cut at nodes, ready for any number of backward passes.

    Coverage is not checked here: the graph is cut on purpose. Run
    :func:`coefficients` on the same input first.

    Args:
        session: of the model and its rules.
        prepared: the rows.
        target: what is explained, a value a row.
        hooks: hook point -> component: where nodes are.
        keep: which units are nodes; all if not given. The others conduct.
        books: keep books, with rows.

    Raises:
        InputError: a hook point that does not fire, or fires twice.
    """
    points = hook_points(session.model, components(session.model))
    nodes: dict[str, Any] = {hook: points[hook] for hook in hooks}
    found: list[CutPass] = []

    def at_nodes(at: Attached, run: Pass) -> None:
        found.append(CutPass(hooks, run, target, points=nodes))
        for hook in hooks:
            kept = None if keep is None else keep[hook]
            at.hook(points[hook], partial(_cut, made=found[0], hook=hook, kept=kept))

    with session.forward(prepared, target, at_nodes=at_nodes, rows=books) as run:
        (made,) = found
        missing = [hook for hook in hooks if hook not in made.tops]
        if missing:
            raise InputError(f"{missing[0]} does not fire in this model's forward pass")
        made.values = target.values(run.outputs())
        yield made


def _cut(
    _: Any, args: Any, out: Tensor, *, made: CutPass, hook: str, kept: Tensor | None
) -> Tensor | None:
    if hook in made.tops:
        raise InputError(f"{hook} fires more than once in a pass; its units cannot be nodes")
    made.tops[hook] = out
    if kept is not None and not bool(kept.any()):
        return None
    leaf = made.leaves[hook] = out.detach().requires_grad_()
    if kept is None:
        return leaf
    units = made._units(hook, out)
    mask = made._raw(hook, kept[None, ..., None].to(out.device).expand_as(units).contiguous())
    return torch.where(mask, leaf, out)
