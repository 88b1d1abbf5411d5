"""One block of a corpus through the model: what flows at the hook points, handed on as it passes.

Activations are read by forward hooks; where relevance is wanted too, the same forward pass runs
under the rules and one backward pass serves every unit. Nothing of size [row, pos, unit] outlives
the call that hands it on. Without relevance the forward pass stops at the last hook point that is
read, and the unembedding never runs; with it, the unembedding runs at the targets' positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lenslrp.analysis.conditions import through as only_through
from lenslrp.analysis.corpus import Block
from lenslrp.analysis.plan import Place, Plan
from lenslrp.analysis.readouts import Readout, Site
from lenslrp.analysis.topk import priorities
from lenslrp.analysis.units import Unit
from lenslrp.errors import InputError
from lenslrp.forward import undone
from lenslrp.hooks.attach import Attached
from lenslrp.hooks.components import UnembeddingBridge, components, hook_points, layer_of
from lenslrp.hooks.composites import Composite
from lenslrp.hooks.readers import converted, select_names
from lenslrp.hooks.turns import turn
from lenslrp.run import run_with_relevance
from lenslrp.targets import Outputs, Target

Spans = list[tuple[int, int]]
Visit = Callable[[Place, Float[Tensor, "row pos unit"], Spans], None]

TARGETS: Mapping[str, str] = {
    "next": "logit of the true next token",
    "argmax": "top logit",
    "logit_diff": "logit of the true next token minus the best other",
}
"""Targets that a corpus has by itself, at one position a document."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """One target a row, at a position of its own. ``logits`` may hold those positions only."""

    kind: str
    positions: Int64[Tensor, " row"]
    tokens: Int64[Tensor, " row"]

    def values(self, outputs: Outputs) -> Tensor:
        logits, rows = outputs.logits, torch.arange(len(self.tokens))
        if logits.shape[1] > 1:
            logits = logits[rows, self.positions.to(logits.device)]
        else:
            logits = logits[:, 0]
        index = self.tokens.to(logits.device)[:, None]
        if self.kind == "argmax":
            index = logits.argmax(dim=1, keepdim=True)
        picked = logits.gather(1, index)[:, 0]
        if self.kind != "logit_diff":
            return picked
        others = logits.detach().scatter(1, index, -torch.inf).argmax(dim=1, keepdim=True)
        return picked - logits.gather(1, others)[:, 0]

    def text(self, outputs: Outputs) -> str:
        return f"{TARGETS[self.kind]}, at one position a document"


@dataclass(frozen=True)
class Aims:
    """What was explained in each row of a block; -1 where a target has no such thing."""

    positions: Int64[Tensor, " row"]
    tokens: Int64[Tensor, " row"]
    values: Float[Tensor, " row"]


class _Stop(Exception):
    """Raised at the last hook point that is read, to leave the forward pass."""


@dataclass(frozen=True, eq=False)
class BlockPass:
    """How blocks are run: the model and all that decides what it is read for."""

    model: Any
    plan: Plan
    sites: tuple[Site, ...]
    composite: Composite | None = None
    target: Target | None = None
    through: tuple[Unit, ...] = ()

    def run(
        self, block: Block, on_activation: Visit, on_relevance: Visit | None = None
    ) -> Aims | None:
        """One block; each place is handed to the callbacks once, with the positions that count.

        Raises:
            InputError: a hook point that did not fire, or fired twice.
        """
        points = hook_points(self.model, components(self.model))
        spans = [(int(self.plan.skip_first), length) for length in block.lengths]
        seen: list[str] = []
        by_hook: dict[str, list[tuple[Place, Readout]]] = {}
        for place, readout in self._placed():
            by_hook.setdefault(place.hook, []).append((place, readout))
        last = None if on_relevance is not None else self.plan.places[-1].hook
        tokens = block.tokens.to(next(self.model.parameters()).device)

        def read(hook: str, x: Tensor) -> None:
            if hook in seen:
                raise InputError(f"{hook} fires more than once in a pass; it cannot be searched")
            seen.append(hook)
            x = unflattened(x, block)
            for place, readout in by_hook[hook]:
                on_activation(place, readout.activation(x).float(), spans)
            if hook == last:
                raise _Stop

        with ExitStack() as stack:
            stack.enter_context(turn(self.model))
            for hook in by_hook:
                stack.enter_context(_reading(points[hook], partial(read, hook)))
            if on_relevance is None:
                with torch.no_grad(), suppress(_Stop):
                    _forward(self.model, tokens, block)
                aims = None
            else:
                aims = self._explain(stack, tokens, block, by_hook, on_relevance)
        missing = [hook for hook in by_hook if hook not in seen]
        if missing:
            raise InputError(f"{missing[0]} does not fire in this model's forward pass")
        return aims

    def _placed(self) -> Iterator[tuple[Place, Readout]]:
        readouts = {site.name: site.readout for site in self.sites}
        for place in self.plan.places:
            yield place, readouts[place.site]

    def _explain(
        self,
        stack: ExitStack,
        tokens: Tensor,
        block: Block,
        by_hook: Mapping[str, Sequence[tuple[Place, Readout]]],
        on_relevance: Visit,
    ) -> Aims:
        target, aims, spans = self._aim(block)
        stack.enter_context(only_through(self.model, self.through))
        if isinstance(target, Recorded):
            stack.enter_context(unembedding_at(self.model, target.positions))

        def deliver(hook: str, x: Tensor, g: Tensor) -> None:
            x, g = unflattened(x, block), unflattened(g, block)
            for place, readout in by_hook[hook]:
                relevance = readout.relevance(x, g).float()
                on_relevance(place, self._conditioned(place, relevance), spans)

        reduce = {hook: Deliver(partial(deliver, hook)) for hook in by_hook}
        mask = None if bool(block.mask.all()) else block.mask.long()
        _, cache = run_with_relevance(
            self.model,
            tokens,
            target,
            self.composite,
            names_filter=list(by_hook),
            reduce=reduce,
            attention=self.plan.attention,
            ledger=False,
            attention_mask=mask,
        )
        return Aims(aims.positions, aims.tokens, cache.target.value.float().cpu())

    def _conditioned(self, place: Place, relevance: Tensor) -> Tensor:
        """At a hook with a condition, the units that do not pass have no relevance."""
        units = [u.index for u in self.through if u.hook(self.model) == place.hook]  # type: ignore[attr-defined]
        if not units:
            return relevance
        keep = torch.zeros(relevance.shape[-1], device=relevance.device)
        keep[units] = 1
        return relevance * keep

    def _aim(self, block: Block) -> tuple[Target, Aims, Spans]:
        lengths = torch.tensor(block.lengths)
        first = int(self.plan.skip_first)
        nothing = torch.full_like(lengths, -1)
        if self.target is not None:
            spans = [(first, length) for length in block.lengths]
            return self.target, Aims(nothing, nothing, nothing.float()), spans
        positions = target_positions(block.docs, lengths, self.plan.seed)
        tokens = block.tokens.gather(1, positions[:, None] + 1)[:, 0]
        kind = str(self.plan.target)
        spans = [(first, int(position) + 1) for position in positions]
        aims = Aims(positions, nothing if kind == "argmax" else tokens, nothing.float())
        return Recorded(kind, positions, tokens), aims, spans


class Deliver:
    """A reduction that hands relevance on and keeps nothing of it."""

    def __init__(self, deliver: Callable[[Tensor, Tensor], None]) -> None:
        self.deliver = deliver

    def of_product(self, x: Tensor, g: Tensor) -> Tensor:
        self.deliver(x, g)
        return x.new_zeros(())

    def __call__(self, relevance: Tensor) -> Tensor:
        raise AssertionError("readers prefer of_product")


def target_positions(
    docs: Int64[Tensor, " row"], lengths: Int64[Tensor, " row"], seed: int
) -> Int64[Tensor, " row"]:
    """The position of each document whose next token is explained.

    Drawn by hash from the document's second half: the last position alone would make a full stop
    of most targets.
    """
    low = (lengths - 1) // 2
    return low + priorities(docs, seed + 1) % (lengths - 1 - low)


def unflattened(x: Tensor, block: Block) -> Tensor:
    """Some MLPs (OPT's) see batch and positions as one axis."""
    rows, length = block.tokens.shape
    if x.shape[0] == rows * length and x.shape[:2] != (rows, length):
        return x.reshape(rows, length, *x.shape[1:])
    return x


def _forward(model: Any, tokens: Tensor, block: Block) -> None:
    kwargs: dict[str, Any] = {}
    if not bool(block.mask.all()):
        kwargs["attention_mask"] = block.mask.long().to(tokens.device)
    model(tokens, return_type="logits", use_cache=False, **kwargs)


@contextmanager
def _reading(point: nn.Module, read: Callable[[Tensor], None]) -> Iterator[None]:
    def hook(module: Any, args: tuple[Any, ...], out: Tensor) -> None:
        with torch.no_grad():
            read(converted(module, out.detach()))

    handle = point.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def unembedding_at(model: Any, positions: Tensor) -> Iterator[None]:
    """Unembed one position a row (``positions`` [row]), or k (``positions`` [row, k]).

    Models whose head is another component keep all positions.
    """
    unembed = getattr(model, "_modules", {}).get("unembed")
    if not isinstance(unembed, UnembeddingBridge):
        with turn(model):
            yield
        return

    def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor) or args[0].ndim != 3:
            return None
        x = args[0]
        if x.shape[1] <= int(positions.max()):  # a pass of another text
            return None
        rows = torch.arange(len(x), device=x.device)[:, None]
        return (x[rows, positions.to(x.device).reshape(len(x), -1)], *args[1:])

    with turn(model), undone(Attached()) as at:
        at.pre_hook(unembed, pick)
        yield


def find_places(model: Any, sites: Sequence[Site], tokens: Tensor) -> tuple[Place, ...]:
    """The places of all sites, in the order in which the forward pass meets them.

    Learned from a short forward pass: [1, pos] tokens.

    Raises:
        InputError: a hook that does not exist, does not fire, or has no positions.
    """
    points = hook_points(model, components(model))
    wanted = [(site, name) for site in sites for name in select_names(points, site.hook)[0]]
    for _, name in wanted:
        if name.endswith("hook_post") and points[name] is points.get(f"{name[:-4]}out"):
            raise InputError(
                f"{name} is another name of {name[:-4]}out here: a mixture of experts has no one "
                "set of neurons; search its output by that name, or a dense layer"
            )
    sizes: dict[tuple[str, str], int] = {}
    block = Block(0, torch.zeros(1, dtype=torch.int64), tokens, torch.ones_like(tokens).bool())

    def read(site: Site, name: str, x: Tensor) -> None:
        x = unflattened(x, block)
        if x.shape[:2] != tokens.shape or x.ndim != (4 if site.readout.kind == "head" else 3):
            raise InputError(
                f"{name} is {list(x.shape)}; units are searched at hook points of shape "
                "[batch, pos, unit], and heads at [batch, pos, head, d_head]"
            )
        sizes.setdefault((site.name, name), site.readout.activation(x).shape[-1])

    with turn(model), ExitStack() as stack, torch.no_grad():
        for site, name in wanted:
            stack.enter_context(_reading(points[name], partial(read, site, name)))
        _forward(model, tokens.to(next(model.parameters()).device), block)
    for site, name in wanted:
        if (site.name, name) not in sizes:
            raise InputError(f"{name} does not fire in this model's forward pass")
    kinds = {site.name: site.readout.kind for site in sites}
    places, first = [], 0
    for (site_name, name), size in sizes.items():
        places.append(Place(name, site_name, kinds[site_name], layer_of(name), first, size))
        first += size
    return tuple(places)
