"""One forward pass under rules, and a backward pass for each target that is explained from it.

Leaves are cut at the embeddings, readers stream, the graph is checked before relevance is returned,
and the books are closed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError
from torch.utils.checkpoint import checkpoint as checkpointed

from lenslrp import media
from lenslrp.cache import RelevanceCache
from lenslrp.errors import CoverageError, InputError
from lenslrp.forward import Forward
from lenslrp.hooks import coverage as cover
from lenslrp.hooks.attach import Attached
from lenslrp.hooks.components import BlockBridge, layer_of
from lenslrp.hooks.constants import now
from lenslrp.hooks.functions import product_shares
from lenslrp.hooks.install import Rules
from lenslrp.hooks.observing import WRITES, Observer
from lenslrp.hooks.readers import Readers
from lenslrp.hooks.sharding import gather
from lenslrp.hooks.sites import Accounts, Site, has_values, row_sums, widened
from lenslrp.inputs import Batch
from lenslrp.leaves import Leaves, Parts, cut_leaves, cut_media
from lenslrp.ledger import BALANCED, Ledger, make_ledger, read
from lenslrp.logits import Columns, head_component, spread, unembed_at
from lenslrp.reductions import reduction_names
from lenslrp.remembered import Remembered, Seen, is_conditional, kind_of
from lenslrp.running import UNCAPPED, architecture, capture, keep_uncapped, run_model, undone
from lenslrp.targets import PAIRED, Activation, Explained, Target, parts_of, reads_the_encoder

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

AGAIN = 50
"""How often what was found in a graph is taken for granted before it is walked again."""


@dataclass
class Pass(Forward):
    """One forward pass under rules, from which any number of targets can be explained."""

    rules: Rules = field(kw_only=True)
    readers: Readers = field(kw_only=True)
    leaves: Leaves = field(default_factory=Leaves)
    strict: bool = True
    ledger: bool = True  #: hand the books out; they may be kept for their balance alone
    observer: Observer | None = None
    memory: Remembered = field(default_factory=Remembered)
    layers: int = 0
    begun: int = 0  #: autograd's number of a node before the pass

    @property
    def books(self) -> Accounts | None:
        return self.rules.books

    def relevance(self, target: Target, *, last: bool) -> RelevanceCache:
        """One backward pass for one target; ``last`` releases the graph."""
        outputs = self.outputs()
        values = target.values(outputs)
        if not values.requires_grad:
            raise InputError("the target does not depend on the logits in a differentiable way")
        roots = self.roots(target)
        latent = [part.hook for part in parts_of(target) if isinstance(part, Activation)]
        try:
            seen, faults = self._check(roots, latent)
        except CoverageError:  # broken weights break the form of norms and activations too
            self._require_finite(values, [])
            raise
        on_path = {id(self.rules.sites[index]) for index in seen.sites}
        free = self.ledger or bool(faults) or is_conditional(self.model)
        unknown = not free and seen.kind not in self.memory.balanced
        if unknown and self.books is None:
            raise Again("books", "a graph that has not been seen to balance")
        for site in self.rules.sites:
            site.backward = 0
        if self.books is not None:
            self.books.clear()
        self.leaves.passing.clear()
        leaves = self.leaves.all()
        gather(self.model, latent)
        with starting(roots if self.books is not None else []) as started:
            try:
                grads = torch.autograd.grad(
                    values.sum(), leaves, retain_graph=not last, allow_unused=True
                )
            except CheckpointError as error:
                raise CoverageError(
                    f"{architecture(self.model)}: a part of the model is recomputed in the "
                    "backward pass (torch.utils.checkpoint), where the rules for its operations "
                    "are not met: switch gradient checkpointing off; checkpoint=True recomputes "
                    f"whole blocks under rules. torch says: {str(error).splitlines()[0]}"
                ) from error
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                raise Again("copies", f"{architecture(self.model)}: {error}") from error
        at_leaves = [
            torch.zeros_like(leaf) if g is None else g
            for leaf, g in zip(leaves, grads, strict=True)
        ]
        if self.strict:
            cover.require_fired([s for s in self.rules.sites if id(s) in on_path])
        relevances = [
            widened(x.detach()) * widened(g) for x, g in zip(leaves, at_leaves, strict=True)
        ]
        self._require_finite(values, relevances)
        ledger = self._close_books(target, values, roots, grads, started)
        note = "" if faults else self._unbalanced(ledger, values.dtype, seen)
        if unknown and not note:
            self.memory.balanced.add(seen.kind)
        at = self._split(relevances)
        patches = self._patches(at["patches"])
        tokens, positions = _total(at["tokens"]), _total(at["positions"])
        patch_positions = _total(at["patch_positions"])
        if tokens is None:  # no text: the patches are the sequence
            assert patches is not None
            tokens = media.sequence(at["special"], patches)
            positions, patch_positions = patch_positions, None
        special = torch.cat(at["special"], dim=1) if at["special"] else None
        decoder_tokens = _total(at["decoder_tokens"])
        decoder_positions = _total(at["decoder_positions"])
        decoder = self.batch.decoder
        rows = self.batch.rows(self.model.tokenizer)
        written = decoder.rows(self.model.tokenizer) if decoder else []
        values_read = self.readers.finish()
        return RelevanceCache(
            values=values_read,
            reduced=reduction_names(self.readers.reducers, values_read),
            activations=dict(self.readers.activations),
            # Gemma 4 has embeddings of another width besides; LED has positions for its padding.
            tokens=tokens.sum(dim=-1)
            + sum(part.sum(dim=-1) for part in at["tokens"] if part.shape != tokens.shape),
            embeddings=tokens,
            positions=None if positions is None else positions.sum(dim=-1)[:, : tokens.shape[1]],
            decoder_tokens=None if decoder_tokens is None else decoder_tokens.sum(dim=-1),
            decoder_positions=None if decoder_positions is None else decoder_positions.sum(dim=-1),
            patches=None if patches is None else media.grid(patches),
            patch_positions=None if patch_positions is None else patch_positions.sum(dim=-1),
            special=None if special is None else special.sum(dim=-1),
            inputs=dict(zip(self.leaves.inputs, at["inputs"], strict=True)),
            decoder_str_tokens=[row.pieces for row in written] if decoder else None,
            decoder_words_=[row.words for row in written],
            token_ids=self.batch.tokens,
            attention_mask=self.batch.mask,
            decoder_token_ids=None if decoder is None else decoder.tokens,
            decoder_attention_mask=None if decoder is None else decoder.mask,
            str_tokens=[row.pieces for row in rows],
            words_=[row.words for row in rows],
            prompts=[row.prompt for row in rows],
            target=Explained.by(target, outputs, values),
            composite=self.rules.composite,
            coverage=cover.Coverage(
                cover.site_rows(self.rules.sites, on_path),
                faults,
                self.readers.off_path(),
                [note] if note else [],
                list(self.memory.cuts or ()),
                balanced=not note,
            ),
            ledger_=ledger if self.ledger else None,
            routing=dict(self.rules.routing),
            n_experts=max(self.rules.experts.values(), default=0),
            model_name=str(getattr(self.model.cfg, "model_name", "")),
            dtype=str(values.dtype).removeprefix("torch."),
        )

    def _activation(self, hook: str) -> Tensor:
        x = self.captured.get(hook)
        constant = hook.endswith(PAIRED) and product_shares(self.rules.composite["attention_av"])
        if x is None or not x.requires_grad or (constant and constant[0] == 0):
            why = ""
            if constant and self.rules.attention == "fused":
                why = '; attention="fused" forms no patterns or scores'
            elif constant and constant[0] == 0:
                why = f"; under {self.rules.composite.name} patterns are constants"
            raise InputError(
                f"{hook} is not on the path in this pass{why}: no relevance can start there"
            )
        if constant and constant[0] != constant[1] and not hook.endswith("hook_attn_scores"):
            raise InputError(
                f"under {self.rules.composite.name} patterns get {constant[0]:g} of their product "
                f"with values, and values {constant[1]:g}: {hook} can be explained where "
                "attention_av shares evenly"
            )
        return x

    def _unbalanced(self, ledger: Ledger | None, dtype: torch.dtype, seen: Seen) -> str:
        """What to say where the account does not add up; raised if strict.

        The graph shows neither a constant that is added on the path nor a gradient that a hook
        changes: only the account does.
        """
        if ledger is None or not math.isfinite(ledger.error):
            return ""
        changed = dict.fromkeys(self.rules.changed)
        if ledger.imbalance <= BALANCED[dtype] and not changed:
            return ""
        note = (
            f"the books do not balance: {ledger.target - ledger.accounted:+.4g} of "
            f"{ledger.target:.4g} is not accounted for. Something adds a constant on the path, "
            "changes a gradient, or computes what LensLRP does not know; see R.ledger().table "
            "(with strict=False) for the layer"
            + (
                f". A backward hook at {', '.join(changed)} changes what passes it"
                if changed
                else ""
            )
        )
        overwritten = seen.writes or any(meter.missed for meter in self.rules.edits)
        if overwritten and not self.rules.copies:  # what was measured is not there any more
            raise Again("copies", note)
        if self.strict:
            raise CoverageError(f"{architecture(self.model)}: {note}")
        return note

    def _split(self, relevances: list[Tensor]) -> dict[str, list[Tensor]]:
        """Relevance at each leaf, by the group that the leaf is in."""
        left = iter(relevances)
        return {name: [next(left) for _ in group] for name, group in self.leaves.groups().items()}

    def _patches(self, at_leaves: list[Tensor]) -> Tensor | None:
        """Relevance of the first image's patches: at the leaves, or where it passed them."""
        if at_leaves or not self.leaves.seen:
            return at_leaves[0] if at_leaves else None
        x, g = self.leaves.seen[0], self.leaves.passing.get(0)
        return widened(x) * widened(torch.zeros_like(x) if g is None else g)

    def _close_books(
        self,
        target: Target,
        values: Tensor,
        roots: list[Tensor],
        grads: tuple[Tensor | None, ...],
        started: dict[int, Tensor],
    ) -> Ledger | None:
        if self.books is None:
            return None
        leaves = zip(self.leaves.all(), grads, strict=True)
        arrived = [row_sums(x.detach(), g) for x, g in leaves if g is not None]
        parts = parts_of(target)
        begun = []
        for root in roots:
            if id(root) not in started:
                continue
            rows = started[id(root)]
            if len(roots) > 1:  # rows that start elsewhere only pass through here
                rows = rows[[r for r, t in enumerate(parts) if self.roots(t)[0] is root]]
            begun.append(rows)
        return make_ledger(self.books, values, arrived, begun, self.layers)

    def _require_finite(self, values: Tensor, relevances: list[Tensor]) -> None:
        """Both are looked at when the backward pass has ended: the host waits for neither."""
        of_target, *of_leaves = read(x.isfinite().all() for x in (values, *relevances))
        if not of_target:
            reason = "activations overflowed or the weights are broken"
            if values.dtype == torch.float64 and not bool(self.batch.mask[:, :1].all()):
                reason = (
                    "in float64 Hugging Face's softmax is NaN where a position sees nothing but "
                    "padding, so pad on the right, give rows of one length, or use float32"
                )
            raise InputError(
                f"the target is NaN or infinite ({values.tolist()}): {reason} "
                f"(dtype {values.dtype}); check the model's own logits"
            )
        if not all(of_leaves):
            raise InputError(
                f"relevance is not finite ({values.dtype}): the backward pass overflowed; run the "
                "model in float32 or bfloat16"
            )

    def _above_features(self, site: Site, on_path: set[int]) -> bool:
        """Whether a tower ran a site after the last one that the text is given anything of.

        LLaVA takes its features below the top of its vision tower. What a cut leaves off the path
        ran before something that is on it.
        """
        if not self.batch.media or not self.leaves.tokens or "blocks" in _stack(site):
            return False
        used = [s.order for s in self.rules.sites if id(s) in on_path and _stack(s) == _stack(site)]
        return bool(used) and site.order > max(used)

    def walk(self, roots: list[Tensor], place: Callable[[Any], str] = lambda _: "") -> cover.Walk:
        """The graph from ``roots`` down, with what was seen of writes into views."""
        writes = {} if self.observer is None else self.observer.writes
        units = [x for name, x in self.captured.items() if name != UNCAPPED]
        latent = any(root is x for root in roots for x in units)
        return cover.walk(roots, place, self.rules.weights, writes, latent)

    def _check(self, roots: list[Tensor], latent: list[str]) -> tuple[Seen, list[str]]:
        """What the graph shows, and what of it is not covered (raised if strict)."""
        key = self._shape_of_graph(roots, latent)
        known = self.memory.walked.get(key)
        if known is not None and known.uses < AGAIN:
            known.uses += 1
            return known, []
        found, faults = self._walked(roots, latent)
        if self.observer is not None and self.memory.cuts is None:
            self.memory.cuts = self.observer.cuts(found.nodes)
        names = {type(node).__name__ for node in found.nodes.values()}
        seen = Seen(
            frozenset(i for i, site in enumerate(self.rules.sites) if id(site) in found.sites),
            kind_of(found, repr(self.rules.composite), self.rules.attention),
            writes=not WRITES.isdisjoint(names),
        )
        if not (faults or seen.writes or cover.depends_on_values(names)):
            self.memory.keep(key, seen)
        return seen, faults

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
        places = (now() - self.begun, *(_order(root) - self.begun for root in roots))
        fired = tuple(site.forward for site in rules.sites)
        kept = (self.strict, self.books is None, rules.copies, bool(self.batch.media))
        return (
            state.hooks,
            state.rest,
            repr(rules.composite),
            rules.attention,
            kept,
            places,
            fired,
            *latent,
        )

    def _walked(self, roots: list[Tensor], latent: list[str]) -> tuple[cover.Walk, list[str]]:
        found = self.walk(roots)
        if found.gaps and self.strict:
            raise Again("trace", "uncovered operations")
        sites = self.rules.sites
        below = min((_layer(hook) for hook in latent), default=math.inf)
        if latent and below == math.inf:  # outside the blocks: below the first, or above the last
            met = [s.layer for s in sites if id(s) in found.sites and s.layer is not None]
            below = max(met, default=-1) + 1
        started = max((_order(root) for root in roots), default=math.inf)
        of_encoder = bool(latent) and all(reads_the_encoder(hook) for hook in latent)
        # A stack that did not run at all (the vision tower of a text prompt) was not called for.
        ran = {_stack(s) for s in sites if s.forward}
        idle = [s for s in sites if s.forward == 0 and not s.optional and _stack(s) in ran]
        lost = [
            s
            for s in sites
            if s.forward
            and not (s.cut or s.passed_over)
            and id(s) not in found.sites
            and not _pools(s)
            and not self._above_features(s, found.sites)
            and (not latent or (s.layer is not None and s.layer < below and s.order < started))
            and not (of_encoder and s.hook.startswith("decoder_"))
        ]
        faults = [
            *found.faults(),
            *(f"{_at(s)}: rules were attached and their operations never ran" for s in idle),
            *(f"{_at(s)} is not on the path to the target: the graph is cut" for s in lost),
        ]
        if faults and self.strict:
            raise CoverageError(
                f"{architecture(self.model)}: {'; '.join(faults[:6])}. The model's forward pass "
                "differs from what the rules expect, so the relevance would be wrong."
            )
        return found, [*(str(gap) for gap in found.gaps), *faults]


def _at(site: Site) -> str:
    return f"{site.rule.name} at {site.hook}"


def _pools(site: Site) -> bool:
    """Whether a site is in a pooler: a branch of its own beside the hidden states.

    Where the graph is cut on the way to it, what lies below is found missing as well.
    """
    return "pooler" in site.hook.split(".")


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


class Again(CoverageError):
    """The pass has to be run once more, in another way; the error is raised if that was tried.

    Args:
        way: ``"trace"``: watch which component each operation belongs to, and what writes in place
            hide. ``"copies"``: keep copies of what is written to in place. ``"books"``: keep the
            books, to see whether they balance.
    """

    def __init__(self, way: str, message: str) -> None:
        super().__init__(message)
        self.way = way


def _total(relevances: list[Tensor]) -> Tensor | None:
    """The sum over the leaves of a group that have the first one's shape, ``None`` without any.

    On the first one's device: embeddings may be spread over several.
    """
    alike = [part for part in relevances if part.shape == relevances[0].shape]
    return torch.stack([r.to(alike[0].device) for r in alike]).sum(dim=0) if alike else None


@contextmanager
def under_rules(
    model: TransformerBridge,
    rules: Rules,
    batch: Batch,
    readers: Readers,
    *,
    latent: Iterable[str] = (),
    columns: Columns | None = None,
    leaf: str = "pixels",
    checkpoint: bool = False,
    strict: bool = True,
    ledger: bool = True,
    memory: Remembered | None = None,
    observer: Observer | None = None,
    at_nodes: Callable[[Attached, Pass], None] | None = None,
) -> Iterator[Pass]:
    """A forward pass under rules that are attached; its backward passes belong inside the block.

    Args:
        model: a ``TransformerBridge``.
        rules: those in force on it.
        batch: what it reads.
        readers: what is read of relevance in the backward pass.
        latent: hook points whose units are targets.
        columns: where logits are computed; at every position if not given.
        leaf, checkpoint, strict, ledger: as for :func:`lenslrp.run_with_relevance` (``leaves``).
        memory: what is known of the model's graphs.
        observer: watches the pass for what the graph does not show.
        at_nodes: attaches what else belongs to the pass.

    Raises:
        InputError: leaves that the model does not have.
        CoverageError: no token embedding that is known has run.
    """
    assert rules.state is not None
    parts, points = rules.state.parts, rules.points
    rules.begin()
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        at = stack.enter_context(undone(Attached()))
        stack.enter_context(readers.reading(copies=rules.copies))
        for meter in rules.edits:
            meter.touched = lambda: 0 if observer is None else observer.touched
        memory = Remembered() if memory is None else memory
        made = Pass(
            model, batch, rules=rules, readers=readers, strict=strict, ledger=ledger,
            observer=observer, memory=memory,
        )  # fmt: skip
        given = dict(batch.media)
        if given:
            given = cut_media(at, parts, made.leaves, rules.sites, given, leaf)
        cut_leaves(at, rules.embedded, made.leaves, batch)  # positions, too, of given embeddings
        if rules.books is not None:
            rules.books.clear()
            made.layers = watch_blocks(at, rules.blocks, rules.books)
        if readers.state is not rules.state:
            readers.attach(rules.owned, at)
        capture(at, points, rules.owned, list(latent), made.captured)
        keep_uncapped(at, model, parts, made.captured)
        picked: list[bool] = []
        unembed, length = head_component(model), batch.written.tokens.shape[1]
        if columns is not None and unembed is not None:
            picked = unembed_at(at, unembed, columns, length)
            inside = {id(module) for module in unembed.modules()}
            readers.restore = lambda point, x: (
                spread(x, columns, length) if picked and id(point) in inside else x
            )
        if at_nodes is not None:
            at_nodes(at, made)
        if checkpoint:
            checkpoint_blocks(at, parts)
        if has_values(batch.written.mask):
            assert batch.written.lengths is not None  # read before anything runs on a device
        made.begun = now()
        with observer or nullcontext():
            made.logits = run_model(model, batch, made.leaves, given)
        if picked:
            made.columns = columns
        if media.reads_no_text(model):
            made.batch = media.with_sequence(batch, made.leaves)
        yield made


def watch_blocks(at: Attached, blocks: Mapping[int, Any], books: Accounts) -> int:
    """Book the total relevance that enters and leaves every block; returns how many there are."""
    passing = books.flows.__setitem__
    for layer, module in blocks.items():
        for side, point in (("in", module.hook_in), ("out", module.hook_out)):

            def watch(
                _: nn.Module, args: tuple[Any, ...], x: Tensor, key: tuple[int, str] = (layer, side)
            ) -> None:
                if x.requires_grad:
                    kept = x.detach()
                    x.register_hook(lambda g: passing(key, row_sums(kept, g, masked=False)))

            at.hook(point, watch)
    return max(blocks, default=-1) + 1


def checkpoint_blocks(at: Attached, parts: Parts) -> None:
    """Recompute each block in the backward pass (non-reentrant; identical relevance)."""
    for _, module in parts:
        if isinstance(module, BlockBridge):
            at.attribute(
                module, "forward", partial(checkpointed, module.forward, use_reentrant=False)
            )


@contextmanager
def starting(roots: list[Tensor]) -> Iterator[dict[int, Tensor]]:
    """Relevance of each row at the roots, [batch], once the backward pass has passed them.

    Measured as the gradient goes by: that of all logits is as large as they are, and is not kept.
    """
    found: dict[int, Tensor] = {}

    def measure(root: Tensor) -> Any:
        key, kept = id(root), root.detach()
        return root.register_hook(lambda g: found.__setitem__(key, row_sums(kept, g)))

    handles = [measure(root) for root in roots]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
