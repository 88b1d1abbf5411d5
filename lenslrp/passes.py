"""One forward pass under rules, and a backward pass for each target that is explained from it.

Leaves are cut at the embeddings, readers stream, the graph is checked before relevance is returned,
and the books are closed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError
from torch.utils.checkpoint import checkpoint as checkpointed

from lenslrp import media
from lenslrp.cache import RelevanceCache
from lenslrp.errors import CoverageError, InputError
from lenslrp.hooks import coverage as cover
from lenslrp.hooks.attach import Attached, raise_failed, undo_all
from lenslrp.hooks.components import (
    BlockBridge,
    ExpertPoint,
    UnembeddingBridge,
    layer_of,
)
from lenslrp.hooks.embeddings import PER_LAYER
from lenslrp.hooks.functions import apply, product_shares
from lenslrp.hooks.install import Rules
from lenslrp.hooks.observing import WRITES, Observer
from lenslrp.hooks.readers import (
    Readers,
    converted,
    given,
    is_total,
    listen,
    owners,
    select_names,
)
from lenslrp.hooks.sites import Books, Site, row_sums
from lenslrp.inputs import Batch
from lenslrp.leaves import Leaves, Parts
from lenslrp.ledger import BALANCED, Ledger, make_ledger
from lenslrp.remembered import Remembered, is_conditional, kind_of
from lenslrp.targets import (
    PAIRED,
    Activation,
    Explained,
    Outputs,
    PerRow,
    Target,
    reads_the_encoder,
)


class _CapSkip(torch.autograd.Function):
    """The final soft-cap's values with the gradient started before it (RULES section 2)."""

    @staticmethod
    def forward(ctx: Any, before: Tensor, after: Tensor) -> Tensor:
        ctx.device = before.device  # of a model that is spread over several, not that of its output
        return after.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g.to(ctx.device), None


@dataclass
class Pass:
    """One forward pass under rules, from which any number of targets can be explained."""

    model: Any
    rules: Rules
    readers: Readers
    leaves: Leaves
    prepared: Batch
    books: Books | None
    strict: bool
    ledger: bool = True  #: hand the books out; they may be kept for their balance alone
    observer: Observer | None = None
    memory: Remembered = field(default_factory=Remembered)
    captured: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    layers: int = 0

    def explain(self, target: Target, *, last: bool) -> RelevanceCache:
        """One backward pass for one target; ``last`` releases the graph."""
        outputs = self.outputs()
        values = target.values(outputs)
        self._require_finite(values)
        if not values.requires_grad:
            raise InputError("the target does not depend on the logits in a differentiable way")
        roots = self.roots(target)
        latent = [part.hook for part in parts_of(target) if isinstance(part, Activation)]
        found, faults = self._check(roots, latent)
        on_path = found.sites
        if self.observer is not None and self.memory.cuts is None:
            self.memory.cuts = self.observer.cuts(found.nodes)
        free = self.ledger or bool(faults) or is_conditional(self.model)
        kind = None if free else self._kind(found)
        unknown = kind is not None and kind not in self.memory.balanced
        if unknown and self.books is None:
            raise Again("books", "a graph that has not been seen to balance")
        for site in self.rules.sites:
            site.backward = 0
        if self.books is not None:
            self.books.clear()
        self.leaves.passing.clear()
        leaves = self.leaves.all()
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
        relevances = [_wide(x) * _wide(g) for x, g in zip(leaves, at_leaves, strict=True)]
        if not all(cover.is_finite(r) for r in relevances):
            raise InputError(
                f"relevance is not finite ({values.dtype}): the backward pass overflowed; run the "
                "model in float32 or bfloat16"
            )
        ledger = self._close_books(target, values, roots, grads, started)
        note = "" if faults else self._unbalanced(ledger, values.dtype, found)
        if unknown and not note:
            self.memory.balanced.add(kind)
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
        decoder = self.prepared.decoder
        rows = self.prepared.rows(self.model.tokenizer)
        written = decoder.rows(self.model.tokenizer) if decoder else []
        return RelevanceCache(
            values=self.readers.finish(),
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
            token_ids=self.prepared.tokens,
            attention_mask=self.prepared.mask,
            str_tokens=[row.pieces for row in rows],
            words_=[row.words for row in rows],
            prompts=[row.prompt for row in rows],
            target=Explained(target.text(outputs), values.detach()),
            composite=self.rules.composite,
            coverage=cover.Coverage(
                cover.site_table(self.rules.sites, on_path),
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

    def _kind(self, found: cover.Walk) -> Any:
        return kind_of(found, repr(self.rules.composite), self.rules.attention)

    def roots(self, target: Target) -> list[Tensor]:
        """Where relevance starts: the latent units of the target, or the unembedding."""
        latent = [part.hook for part in parts_of(target) if isinstance(part, Activation)]
        if latent and len(latent) < len(parts_of(target)):
            raise InputError("a batch cannot mix Activation targets with targets on the logits")
        return [self.captured[hook] for hook in dict.fromkeys(latent)] or [self._before_softcap()]

    def outputs(self) -> Outputs:
        """What targets are computed from, on the graph."""
        assert self.logits is not None
        before = self._before_softcap()
        written = self.prepared.decoder or self.prepared  # the side that the logits belong to
        return Outputs(
            self.logits if before is self.logits else apply(_CapSkip, before, self.logits),
            written.mask.to(self.logits.device),
            self.model.tokenizer,
            self._activation,
            written.prompt_lengths,
            media.labels_of(self.model),
            self.prepared.mask if self.prepared.decoder else None,
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

    def _unbalanced(self, ledger: Ledger | None, dtype: torch.dtype, found: cover.Walk) -> str:
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
        written = any(meter.missed for meter in self.rules.edits) or any(
            type(node).__name__ in WRITES for node in found.nodes.values()
        )
        if written and not self.rules.copies:  # what was measured is not there any more
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
        return _wide(x) * _wide(torch.zeros_like(x) if g is None else g)

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
        leaves = self.leaves.all()
        arrived = sum(
            float(row_sums(x.detach(), g).sum())
            for x, g in zip(leaves, grads, strict=True)
            if g is not None
        )
        parts = parts_of(target)
        start = 0.0
        for root in roots:
            if id(root) not in started:
                continue
            rows = started[id(root)]
            if len(roots) > 1:  # rows that start elsewhere only pass through here
                rows = rows[[r for r, t in enumerate(parts) if self.roots(t)[0] is root]]
            start += float(rows.sum())
        explained = float(values.detach().cpu().double().sum())
        return make_ledger(self.books, explained, arrived, start, self.layers)

    def _before_softcap(self) -> Tensor:
        """The tensor at which a backward pass from the logits starts."""
        assert self.logits is not None
        before = self.captured.get("unembed")
        cap = getattr(self.model.cfg, "output_logits_soft_cap", None)
        if before is None or not cap or float(cap) <= 0:
            return self.logits
        return before

    def _require_finite(self, values: Tensor) -> None:
        if not cover.is_finite(values):
            reason = "activations overflowed or the weights are broken"
            if values.dtype == torch.float64 and not bool(self.prepared.mask[:, :1].all()):
                reason = (
                    "in float64 Hugging Face's softmax is NaN where a position sees nothing but "
                    "padding, so pad on the right, give rows of one length, or use float32"
                )
            raise InputError(
                f"the target is NaN or infinite ({values.tolist()}): {reason} "
                f"(dtype {values.dtype}); check the model's own logits"
            )

    def _above_features(self, site: Site, on_path: set[int]) -> bool:
        """Whether a tower ran a site after the last one that the text is given anything of.

        LLaVA takes its features below the top of its vision tower. What a cut leaves off the path
        ran before something that is on it.
        """
        if not self.prepared.media or not self.leaves.tokens or "blocks" in _stack(site):
            return False
        used = [s.order for s in self.rules.sites if id(s) in on_path and _stack(s) == _stack(site)]
        return bool(used) and site.order > max(used)

    def walk(self, roots: list[Tensor], place: Callable[[Any], str] = lambda _: "") -> cover.Walk:
        """The graph from ``roots`` down, with what was seen of writes into views."""
        writes = {} if self.observer is None else self.observer.writes
        units = [x for name, x in self.captured.items() if name != "unembed"]
        latent = any(root is x for root in roots for x in units)
        return cover.walk(roots, place, self.rules.weights, writes, latent)

    def _check(self, roots: list[Tensor], latent: list[str]) -> tuple[cover.Walk, list[str]]:
        """The graph, and what of it is not covered (raised if strict)."""
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


def _wide(x: Tensor) -> Tensor:
    return x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach()


def parts_of(target: Target) -> tuple[Target, ...]:
    return target.targets if isinstance(target, PerRow) else (target,)


def architecture(model: Any) -> str:
    """The Hugging Face class name of what a bridge wraps."""
    return type(getattr(model, "original_model", model)).__name__


def watch_blocks(at: Attached, parts: Parts, books: Books) -> int:
    """Book the total relevance that enters and leaves every block; returns how many there are.

    None where a block's number does not say what flows through it: in two stacks (an encoder and a
    decoder, HRM's cycles), or where blocks have a second entrance (Gemma 4's embedding per layer).
    """
    layers = 0
    stacks = {path.split(".")[0] for path, _ in parts if re.fullmatch(r"\w*blocks\.\d+", path)}
    if len(stacks) > 1 or any(path.endswith(PER_LAYER) for path, _ in parts):
        return 0
    for path, module in parts:
        layer = layer_of(path + ".")
        if not isinstance(module, BlockBridge) or layer is None:
            continue
        layers = max(layers, layer + 1)
        for side, point in (("in", module.hook_in), ("out", module.hook_out)):

            def watch(
                _: nn.Module, args: tuple[Any, ...], x: Tensor, key: tuple[int, str] = (layer, side)
            ) -> None:
                if x.requires_grad:
                    kept = x.detach()
                    x.register_hook(lambda g: books.flows.__setitem__(key, row_sums(kept, g)))

            at.hook(point, watch)
    return layers


def capture(
    at: Attached,
    points: Mapping[str, nn.Module],
    parts: Parts,
    hooks: list[str],
    captured: dict[str, Tensor],
) -> None:
    """Keep the tensors, on the graph, at the unembedding and at the targets' own hook points."""
    owned = owners(module for _, module in parts)
    for name in hooks:
        if name not in points:
            found, _ = select_names(points, name)  # raises with the nearest names
            raise InputError(f"{name} is in every block; name one: {', '.join(found[:3])}")
        point = points[name]

        def keep(point: Any, x: Any, name: str = name) -> None:
            if not isinstance(x, Tensor):
                raise InputError(f"{name} holds a {type(x).__name__} and no activations")
            x = converted(point, x)
            before = captured.get(name)
            if before is None:
                captured[name] = x
            elif before.shape != x.shape:
                raise InputError(
                    f"{name} fires for two sequences, of {before.shape[1]} and {x.shape[1]} "
                    "positions, in one pass; explain a hook point that fires for one"
                )
            else:
                captured[name] = before + x if isinstance(point, ExpertPoint) else x

        def before_it(
            _: nn.Module, args: Any, kwargs: Any, keep: Any = keep, point: Any = point
        ) -> None:
            keep(point, given(args, kwargs))

        def at_it(point: nn.Module, args: Any, x: Any, keep: Any = keep) -> None:
            keep(point, x)

        owner = owned.get(id(point)) if is_total(name) else None
        if owner is not None:  # the residual stream itself, as the readers see it
            at.first_pre_hook(owner, before_it, with_kwargs=True)
        else:
            listen(at, point, [name], at_it)
    for _, module in parts:
        if isinstance(module, UnembeddingBridge):

            def unembedded(_: nn.Module, args: tuple[Any, ...], x: Tensor) -> None:
                captured["unembed"] = x

            at.hook(module, unembedded)


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


@contextmanager
def undone(at: Attached) -> Iterator[Attached]:
    """What ``at`` has attached is undone at the end, also after an interrupt."""
    try:
        try:
            yield at
        finally:
            raise_failed(undo_all(at.undo))
    finally:
        undo_all(at.undo)


def run_model(model: Any, prepared: Batch, leaves: Leaves, given: dict[str, Tensor]) -> Tensor:
    """The logits of a prepared input; given embeddings become leaves.

    Raises:
        CoverageError: no token embedding that is known has run.
    """
    if media.reads_no_text(model):
        only: Tensor = model(None, return_type="logits", **given)
        return only
    # A key-value cache is of no use here, and a checkpointed block would fill it twice.
    kwargs = {"use_cache": False, **prepared.kwargs, **given}
    if "inputs_embeds" in kwargs:
        leaf = kwargs.pop("inputs_embeds").detach().clone().requires_grad_()
        leaves.tokens.append(leaf)
        logits: Tensor = model(leaf, return_type="logits", **kwargs)
        return logits
    logits = model(prepared.tokens, return_type="logits", **kwargs)
    if not leaves.tokens:
        raise CoverageError(
            f"{architecture(model)}: no known token embedding ran in the forward pass, so there "
            "are no leaves to give relevance to"
        )
    return logits
