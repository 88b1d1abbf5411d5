"""What the autograd graph of a pass shows: which rules are on the path, and what is not covered.

What earlier passes of a model have shown is kept with the model, and forgotten when its hooks
change, so that a later pass need not be walked again. Whether a graph's account balances is known
by the operations in it; what a model's code cuts off the graph, by the hooks that were there.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lenslrp.batch import reads_the_encoder
from lenslrp.errors import CoverageError, InputError
from lenslrp.forward import Forward
from lenslrp.hooks import coverage as cover
from lenslrp.hooks import graph_walk
from lenslrp.hooks.constants import sequence_number
from lenslrp.hooks.graph_walk import Walk
from lenslrp.hooks.install import Rules
from lenslrp.hooks.observing import Observer
from lenslrp.hooks.readers import Readers
from lenslrp.hooks.sites import Accounts, Site
from lenslrp.hooks.structure import layer_of
from lenslrp.hooks.view_writes import VIEW_WRITES, is_noted
from lenslrp.leaves import Leaves
from lenslrp.logits import Target
from lenslrp.running import UNCAPPED, architecture

TRUSTED = 50
"""How often what was found in a graph is taken for granted before it is walked again."""

GRAPHS_KEPT = 64
"""How many graphs of a model are remembered."""


@dataclass
class GraphFacts:
    """What a walk over a graph has shown.

    Attributes:
        sites: which rules are on the path, by their place among all.
        kind: what the graph is made of.
        writes: something is written into a view.
        uses: how often that was taken for granted since.
    """

    sites: frozenset[int]
    kind: Any
    writes: bool
    uses: int = 0


@dataclass
class GraphMemory:
    """One model's past passes.

    Attributes:
        hooks: the hooks, and forward passes of single modules, that it had.
        cuts: where values were cut off the graph; ``None`` before anybody has looked.
        hidden: a graph had writes into views that only an observer can tell.
        balanced: the graphs whose account has been found to balance.
        walked: what was found in graphs of code that does the same at every call.
    """

    hooks: int = 0
    cuts: list[str] | None = None
    hidden: bool = False
    balanced: set[Any] = field(default_factory=set)
    walked: dict[Any, GraphFacts] = field(default_factory=dict)

    def keep(self, key: Any, facts: GraphFacts) -> None:
        """Remember what a walk has shown, unless nothing tells such a graph from another."""
        if key is not None:
            if len(self.walked) >= GRAPHS_KEPT:
                self.walked.clear()
            self.walked[key] = facts


_models: WeakKeyDictionary[nn.Module, GraphMemory] = WeakKeyDictionary()


def remembered(model: nn.Module, hooks: int) -> GraphMemory:
    """What is known of a model with the hooks that it had before rules were attached."""
    known = _models.get(model)
    if known is None or known.hooks != hooks:
        known = _models[model] = GraphMemory(hooks)
    return known


_conditional: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@contextmanager
def conditional(model: nn.Module) -> Iterator[None]:
    """Inside the block gradients are masked on purpose, so that no account can add up."""
    _conditional[model] = _conditional.get(model, 0) + 1
    try:
        yield
    finally:
        _conditional[model] -= 1


def is_conditional(model: nn.Module) -> bool:
    """Whether a block of `conditional` is open."""
    return _conditional.get(model, 0) > 0


def kind_of(graph: Walk, *conditions: Any) -> Any:
    """A graph by its operations, whatever the length of the input, and what it was made under."""
    operations = Counter(type(node).__name__ for node in graph.nodes.values())
    return (*conditions, frozenset(operations.items()))


class RunAgain(CoverageError):
    """The pass has to be run once more, in another way; the error is raised if that was tried.

    Args:
        need: ``"trace"``: watch which component each operation belongs to, and what writes in
            place hide. ``"copies"``: keep copies of what is written to in place. ``"accounts"``:
            account for relevance, to see whether it balances.
    """

    def __init__(self, need: str, message: str) -> None:
        super().__init__(message)
        self.need = need


@dataclass
class RuledForward(Forward):
    """One forward pass under rules, whose autograd graph can be checked.

    Attributes:
        rules: those in force.
        leaves: where relevance ends.
        strict: raise where the graph shows an operation without a rule, or a rule off the path.
        observer: has watched the pass for what the graph does not show.
        memory: what earlier passes of the model have shown.
        first_node: autograd's number of the first node of this pass.
    """

    rules: Rules = field(kw_only=True)
    leaves: Leaves = field(default_factory=Leaves)
    strict: bool = True
    observer: Observer | None = None
    memory: GraphMemory = field(default_factory=GraphMemory)
    first_node: int = 0

    @property
    def accounts(self) -> Accounts | None:
        """Where relevance is accounted for; ``None`` where that is left out."""
        return self.rules.accounts

    def walk(self, roots: list[Tensor], place: Callable[[Any], str] = lambda _: "") -> Walk:
        """The graph from ``roots`` down, with what was seen of writes into views."""
        writes = {} if self.observer is None else self.observer.writes
        units = [x for name, x in self.captured.items() if name != UNCAPPED]
        latent = any(root is x for root in roots for x in units)
        return graph_walk.walk(roots, place, self.rules.weights, writes, latent)

    def name_gaps(self, targets: Iterable[Target], tracer: cover.Tracer) -> None:
        """Raise what has no rule, if strict, with the component that it belongs to."""
        roots = [root for target in targets for root in self.roots(target)]
        graph = self.walk(roots, tracer.place)
        if graph.gaps and self.strict:
            kind, recurrent = architecture(self.model), tracer.recurrent(graph.gaps)
            raise CoverageError(cover.gap_message(graph.gaps, kind, recurrent))

    def check(self, roots: list[Tensor], latent: list[str]) -> tuple[GraphFacts, list[str]]:
        """What the graph shows, and what of it is not covered (raised if strict)."""
        key = self._shape_of_graph(roots, latent)
        known = self.memory.walked.get(key)
        if known is not None and known.uses < TRUSTED:
            known.uses += 1
            return known, []
        graph, faults = self._walked(roots, latent)
        if self.observer is not None and self.memory.cuts is None:
            self.memory.cuts = self.observer.cuts(graph.nodes)
        names = {type(node).__name__ for node in graph.nodes.values()}
        facts = GraphFacts(
            frozenset(i for i, site in enumerate(self.rules.sites) if id(site) in graph.sites),
            kind_of(graph, repr(self.rules.composite), self.rules.attention),
            writes=not VIEW_WRITES.isdisjoint(names),
        )
        hidden = facts.writes and any(
            type(node).__name__ in VIEW_WRITES and not is_noted(node)
            for node in graph.nodes.values()
        )
        self.memory.hidden |= hidden
        if not (faults or hidden or graph_walk.depends_on_values(names)):
            self.memory.keep(key, facts)
        return facts, faults

    def _shape_of_graph(self, roots: list[Tensor], latent: list[str]) -> Any:
        """By what a graph is known again without a walk: ``None`` where nothing else is certain.

        Code that does the same at every call makes as many nodes whatever the length of the input,
        and at the same places. With a hook, or code of anybody's, the same number proves nothing.
        """
        rules = self.rules
        state = rules.state
        if state is None or not state.known or state.hooked:
            return None
        if torch._C._len_torch_function_stack():  # somebody changes what operations do
            return None
        places = (
            sequence_number() - self.first_node,
            *(_order(root) - self.first_node for root in roots),
        )
        fired = tuple(site.forward for site in rules.sites)
        kept = (self.strict, self.accounts is None, rules.copies, bool(self.batch.media))
        settings = (state.hooks, state.rest, repr(rules.composite), rules.attention)
        return (*settings, kept, places, fired, *latent)

    def _walked(self, roots: list[Tensor], latent: list[str]) -> tuple[Walk, list[str]]:
        graph = self.walk(roots)
        if graph.gaps and self.strict:
            raise RunAgain("trace", "uncovered operations")
        sites = self.rules.sites
        below = min((_layer(hook) for hook in latent), default=math.inf)
        if latent and below == math.inf:  # outside the blocks: below the first, or above the last
            on_path = [s.layer for s in sites if id(s) in graph.sites and s.layer is not None]
            below = max(on_path, default=-1) + 1
        started = max((_order(root) for root in roots), default=math.inf)
        of_encoder = bool(latent) and all(reads_the_encoder(hook) for hook in latent)
        # A stack that did not run at all (the vision tower of a text prompt) was not called for.
        ran = {_stack(s) for s in sites if s.forward}
        unread: Collection[str] = getattr(getattr(self.model, "adapter", None), "unread", ())
        idle = [s for s in sites if s.forward == 0 and not s.optional and _stack(s) in ran]
        lost = [
            s
            for s in sites
            if s.forward
            and not (s.cut or s.passed_over)
            and id(s) not in graph.sites
            and not _pools(s)
            and s.hook not in unread
            and not self._above_features(s, graph.sites)
            and (not latent or (s.layer is not None and s.layer < below and s.order < started))
            and not (of_encoder and s.hook.startswith("decoder_"))
        ]
        faults = [
            *graph.faults(),
            *(f"{_at(s)}: rules were attached and their operations never ran" for s in idle),
            *(f"{_at(s)} is not on the path to the target: the graph is cut" for s in lost),
        ]
        if faults and self.strict:
            raise CoverageError(
                f"{architecture(self.model)}: {'; '.join(faults[:6])}. The model's forward pass "
                "differs from what the rules expect, so the relevance would be wrong."
            )
        return graph, [*(str(gap) for gap in graph.gaps), *faults]

    def _above_features(self, site: Site, on_path: set[int]) -> bool:
        """Whether a tower ran a site after the last one that the text is given anything of.

        LLaVA takes its features below the top of its vision tower. What a cut leaves off the path
        ran before something that is on it.
        """
        if not self.batch.media or not self.leaves.tokens or "blocks" in _stack(site):
            return False
        used = [s.order for s in self.rules.sites if id(s) in on_path and _stack(s) == _stack(site)]
        return bool(used) and site.order > max(used)


def _at(site: Site) -> str:
    return f"{site.rule.name} at {site.hook}"


def _pools(site: Site) -> bool:
    """Whether a site is in a pooler: a branch of its own beside the hidden states.

    Where the graph is cut on the way to it, what lies below is found missing as well.
    """
    return any(part.endswith("pooler") for part in site.hook.split("."))


def _order(root: Tensor) -> float:
    """When a tensor was made: autograd's number for its node."""
    return math.inf if root.grad_fn is None else float(root.grad_fn._sequence_nr())


def _stack(site: Site) -> str:
    """``blocks``, ``decoder_blocks``; what only Hugging Face's code calls stands for itself."""
    top = site.hook.split(".")[0]
    return site.hook if top == "original_model" else top


def _layer(hook: str) -> float:
    layer = layer_of(hook)
    return math.inf if layer is None else layer


def warn_of(coverages: list[cover.Coverage], model: str) -> None:
    """Say what was not strict: operations without a rule, or an account that does not balance."""
    gaps = dict.fromkeys(gap for coverage in coverages for gap in coverage.uncovered)
    if gaps:
        message = cover.gap_message(list(gaps), model)
        warnings.warn(message, stacklevel=_caller())
    elif not all(coverage.balanced for coverage in coverages):
        notes = dict.fromkeys(note for coverage in coverages for note in coverage.notes)
        warnings.warn("; ".join(notes), stacklevel=_caller())


def require_on_path(readers: Readers, named: bool, attention: str) -> None:
    """Refuse hook points that were named, and whose tensors are not on the path.

    Raises:
        InputError: with the hook point that is on it instead, where there is one.
    """
    off, late = readers.off_path(), readers.late()
    if named and late:
        block = late[0].rpartition(".")[0]
        raise InputError(
            f"{late[0]} stands behind the MLP in this model, whose norms come last: it is not the "
            f"residual stream between attention and MLP. Read {block}.ln1.hook_out, which is"
        )
    if named and off:
        hint = (
            'attention="fused" forms no patterns or scores; use attention="bridge"'
            if attention == "fused"
            else "it is not on the path from the embeddings to the target in this model"
        )
        raise InputError(f"no relevance can be read at {', '.join(off[:4])}: {hint}")


def _caller() -> int:
    """How far above a warning's own frame the first code is that is not LensLRP's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals["__name__"]).startswith("lenslrp."):
        level, frame = level + 1, frame.f_back
    return level
