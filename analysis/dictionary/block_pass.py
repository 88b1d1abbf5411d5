"""One block of a corpus through the model: what flows at the hook points, handed on as it passes.

Activations are read by forward hooks; where relevance is wanted too, the same forward pass runs
under the rules and one backward pass serves every unit. Nothing of size [row, pos, unit] outlives
the call that hands it on: many units come a few rows at a time, and of features only what is active
is kept for their relevance. Without relevance the forward pass stops at the last hook point that is
read, and the unembedding never runs; with it, the unembedding runs at the targets' positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lenslrp.analysis.dictionary.corpus import Block
from lenslrp.analysis.dictionary.plan import Place, Plan
from lenslrp.analysis.dictionary.topk import Spans, priorities
from lenslrp.analysis.passes.conditions import through as only_through
from lenslrp.analysis.units.coders import SparseCoder
from lenslrp.analysis.units.kinds import Unit
from lenslrp.analysis.units.locations import known_hook, require_one_meaning
from lenslrp.analysis.units.readers import FeatureReader, SearchedHook, UnitReader, Written
from lenslrp.batch import Batch
from lenslrp.errors import InputError
from lenslrp.forward import forward
from lenslrp.graph_check import conditional
from lenslrp.hooks.components import hook_points
from lenslrp.hooks.composites import Composite
from lenslrp.hooks.readers import select_names
from lenslrp.hooks.structure import components, layer_of
from lenslrp.hooks.turns import turn
from lenslrp.logits import Outputs, Target
from lenslrp.reductions import Deliver
from lenslrp.sessions import Session
from lenslrp.text.spelling import special_ids

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Visit = Callable[[Place, Float[Tensor, "row pos unit"], Spans], None]
"""Takes some rows of a block, those of the spans; a place's rows come in order."""

Reads = tuple[Place, UnitReader | FeatureReader]

CORPUS_TARGETS: Mapping[str, str] = {
    "next": "logit of the true next token",
    "argmax": "top logit",
    "logit_diff": "logit of the true next token minus the best other",
}
"""Targets that a corpus has by itself, at one position a document."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """One target a row, at a position of its own."""

    kind: str
    positions: Int64[Tensor, " row"]
    tokens: Int64[Tensor, " row"]

    def columns(self, outputs: Outputs) -> Int64[Tensor, "row 1"]:
        """Where it reads the logits."""
        return self.positions[:, None]

    def values(self, outputs: Outputs) -> Tensor:
        logits = outputs.logits_at(self.positions[:, None])[:, 0]
        index = self.tokens.to(logits.device)[:, None]
        if self.kind == "argmax":
            index = logits.argmax(dim=1, keepdim=True)
        picked = logits.gather(1, index)[:, 0]
        if self.kind != "logit_diff":
            return picked
        others = logits.detach().scatter(1, index, -torch.inf).argmax(dim=1, keepdim=True)
        return picked - logits.gather(1, others)[:, 0]

    def text(self, outputs: Outputs) -> str:
        return f"{CORPUS_TARGETS[self.kind]}, at one position a document"


@dataclass(frozen=True)
class Aims:
    """What was explained in each row of a block; -1 where a target has no such thing."""

    positions: Int64[Tensor, " row"]
    tokens: Int64[Tensor, " row"]
    values: Float[Tensor, " row"]


@dataclass(frozen=True, eq=False)
class BlockPass:
    """How blocks are run: the model and all that decides what it is read for."""

    model: TransformerBridge
    plan: Plan
    sites: tuple[SearchedHook, ...]
    composite: Composite | None = None
    target: Target | None = None
    through: tuple[Unit, ...] = ()

    @contextmanager
    def open(self) -> Iterator[Runner]:
        """What runs one block after the other; what is the same for all is attached once."""
        sites = {site.name: site for site in self.sites}
        runner = Runner(self)
        for place in self.plan.places:
            site = sites[place.site]
            reads = place, site.reader
            runner.by_hook.setdefault(place.hook, []).append(reads)
            runner.by_output.setdefault(site.hook_out or place.hook, []).append(reads)
        for unit in self.through:
            runner.passing.setdefault(unit.hook(self.model), []).append(unit.index)  # type: ignore[attr-defined]
        with ExitStack() as stack:
            if self.plan.relevance:
                if self.through:
                    stack.enter_context(only_through(self.model, self.through))
                runner.rules = stack.enter_context(
                    Session(
                        self.model, self.composite, attention=self.plan.attention, ledger=False,
                        logits="target",
                    )
                )  # fmt: skip
            yield runner


@dataclass(eq=False)
class Runner:
    """Runs blocks through a model.

    Attributes:
        by_hook: whose activations are read where.
        by_output: whose relevance is read where.
        passing: the units that pass at a hook with a condition; the others have no relevance.
        written: what the features wrote in this block, until their relevance is read.
        rules: where relevance is wanted.
    """

    of: BlockPass
    by_hook: dict[str, list[Reads]] = field(default_factory=dict)
    by_output: dict[str, list[Reads]] = field(default_factory=dict)
    passing: dict[str, list[int]] = field(default_factory=dict)
    written: dict[Place, list[Written]] = field(default_factory=dict)
    rules: Session | None = None

    def run(self, block: Block, on_activation: Visit, on_relevance: Visit) -> Aims | None:
        """One block; each row of a place is handed to the callbacks once, with the positions that
        count.

        Raises:
            InputError: a hook point that did not fire, or fired twice.
        """
        plan, lengths = self.of.plan, block.lengths
        spans = self._spans(block, lengths)
        seen: set[str] = set()

        def read(hook: str, x: Tensor) -> None:
            if hook in seen:
                raise InputError(f"{hook} fires more than once in a pass; it cannot be searched")
            seen.add(hook)
            with torch.no_grad():
                x = unflattened(x.detach(), block)
                for place, reader in self.by_hook[hook]:
                    for some in spans.parts(x.shape[1] * place.size):
                        activation = reader.activation(x[some.rows])
                        if self.rules is not None and isinstance(reader, FeatureReader):
                            kept = reader.written(activation, x[some.rows])
                            self.written.setdefault(place, []).append(kept)
                        on_activation(place, activation.float(), some)

        reads = {hook: partial(read, hook) for hook in self.by_hook}
        aims = None
        if self.rules is not None:
            aims = self._explain(self.rules, block, lengths, reads, on_relevance)
        else:
            last = plan.places[-1].hook
            with forward(self.of.model, _batch(self.of.model, block), read=reads, stop_after=last):
                pass
        missing = [hook for hook in self.by_hook if hook not in seen]
        if missing:
            raise InputError(f"{missing[0]} does not fire in this model's forward pass")
        return aims

    def _explain(
        self,
        rules: Session,
        block: Block,
        lengths: list[int],
        reads: Mapping[str, Callable[[Tensor], None]],
        on_relevance: Visit,
    ) -> Aims:
        target, aims, spans = self._aim(block, lengths)

        def deliver(hook: str, x: Tensor, g: Tensor) -> None:
            x, g = unflattened(x, block), unflattened(g, block)
            if hook in self.passing:
                keep = g.new_zeros(g.shape[2])
                keep[self.passing[hook]] = 1
                g = g * keep.view(-1, *(1 for _ in g.shape[3:]))
            for place, reader in self.by_output[hook]:
                for n, some in enumerate(spans.parts(x.shape[1] * place.size)):
                    if isinstance(reader, FeatureReader):
                        relevance = reader.relevance(self.written[place][n], g[some.rows])
                    else:
                        relevance = reader.relevance(x[some.rows], g[some.rows])
                    on_relevance(place, relevance.float(), some)

        self.written.clear()
        with turn(self.of.model), conditional(self.of.model):
            _, cache = rules.run_with_relevance(
                block.tokens,
                target,
                list(self.by_output),
                reduce={hook: Deliver(partial(deliver, hook)) for hook in self.by_output},
                attention_mask=None if bool(block.mask.all()) else block.mask.long(),
                read=reads,
            )
        return Aims(aims.positions, aims.tokens, cache.target.value.float().cpu())

    def _aim(self, block: Block, lengths: list[int]) -> tuple[Target, Aims, Spans]:
        target = self.of.target
        nothing = torch.full((len(lengths),), -1)
        if target is not None:
            return target, Aims(nothing, nothing, nothing.float()), self._spans(block, lengths)
        positions = target_positions(block.docs, torch.tensor(lengths), self.of.plan.seed)
        tokens = block.tokens.gather(1, positions[:, None] + 1)[:, 0]
        kind = str(self.of.plan.target)
        aims = Aims(positions, nothing if kind == "argmax" else tokens, nothing.float())
        spans = self._spans(block, (positions + 1).tolist())
        return Recorded(kind, positions, tokens), aims, spans

    def _spans(self, block: Block, ends: list[int]) -> Spans:
        """What is searched of a block, before `ends`."""
        plan, skipped = self.of.plan, None
        if plan.skip_special:
            special = torch.tensor(sorted(special_ids(self.of.model.tokenizer)), dtype=torch.int64)
            skipped = torch.isin(block.tokens, special)
        return Spans(int(plan.skip_first), ends, skipped=skipped)


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


def _batch(model: TransformerBridge, block: Block) -> Batch:
    """A block on the model's device; its padding is on the right."""
    device = next(model.parameters()).device
    padded = not bool(block.mask.all())
    kwargs = {"attention_mask": block.mask.long().to(device)} if padded else {}
    return Batch(block.tokens.to(device), block.mask.to(device), block.lengths, kwargs)


def find_places(
    model: TransformerBridge, sites: Sequence[SearchedHook], tokens: Tensor
) -> tuple[Place, ...]:
    """The places of all sites, in the order in which the forward pass meets them.

    Learned from a short forward pass: [1, pos] tokens.

    Raises:
        InputError: a hook that does not exist, does not fire, or has no positions; or a coder of
            another width than its hook points.
    """
    points = hook_points(model, components(model))
    wanted = [(site, name) for site in sites for name in select_names(points, site.hook)[0]]
    for _, name in wanted:
        require_one_meaning(points, name)
    sizes: dict[tuple[str, str], int] = {}
    written: set[str] = set()
    block = Block(0, torch.zeros(1, dtype=torch.int64), tokens, torch.ones_like(tokens).bool())

    def read(name: str, x: Tensor) -> None:
        x = unflattened(x, block)
        for site in reads.get(name, []):
            if name.endswith("hook_scan_out") and x.ndim == 3:
                raise InputError(f"{name} has no heads; search the channels at hook_scan_in")
            if name.endswith("hook_scan_in") and x.ndim == 4:
                raise InputError(f"{name} has heads; search them at hook_scan_out")
            if x.shape[:2] != tokens.shape or x.ndim != site.reader.axes:
                raise InputError(
                    f"{name} is {list(x.shape)}; units are searched at hook points of shape "
                    "[batch, pos, unit], and heads at [batch, pos, head, d_head]"
                )
            sizes.setdefault((site.name, name), site.reader.activation(x).shape[-1])
        for coder in writes.get(name, []):
            coder.flat_output(x)
            written.add(name)

    reads: dict[str, list[SearchedHook]] = {}
    writes: dict[str, list[SparseCoder]] = {}
    for site, name in wanted:
        reads.setdefault(name, []).append(site)
        if isinstance(site.reader, FeatureReader) and site.hook_out is not None:
            writes.setdefault(known_hook(model, site.hook_out), []).append(site.reader.coder)
    both = {name: partial(read, name) for name in (*reads, *writes)}
    with forward(model, _batch(model, block), read=both):
        pass
    fired = {name for _, name in sizes} | written
    for name in both:
        if name not in fired:
            raise InputError(f"{name} does not fire in this model's forward pass")
    kinds = {site.name: site.reader.kind for site in sites}
    places, first = [], 0
    for (site_name, name), size in sizes.items():
        places.append(Place(name, site_name, kinds[site_name], layer_of(name), first, size))
        first += size
    return tuple(places)
