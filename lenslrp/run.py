"""``run_with_relevance``: one forward and one backward pass, relevance at every hook.

The engine behind the public function: rules attached (:mod:`lenslrp.hooks.install`), leaves cut at
the embeddings, readers streaming, the graph checked before relevance is returned, the books closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from lenslrp.cache import RelevanceCache
from lenslrp.errors import CoverageError, InputError
from lenslrp.hooks import coverage as cover
from lenslrp.hooks.components import (
    Attached,
    BlockBridge,
    EmbeddingBridge,
    PosEmbedBridge,
    UnembeddingBridge,
    components,
    layer_of,
    original,
)
from lenslrp.hooks.composites import AttnLRP, Composite, as_composite
from lenslrp.hooks.install import Rules, relevance_rules
from lenslrp.hooks.readers import NamesFilter, Readers, select_names
from lenslrp.hooks.rules import Rule
from lenslrp.hooks.sites import Books, row_sums
from lenslrp.inputs import Prepared, prepare
from lenslrp.ledger import make_ledger
from lenslrp.reductions import Reduce, reduction_for
from lenslrp.targets import Activation, Explained, Outputs, PerRow, Sequence, Target, as_target


@dataclass
class Leaves:
    """Detached copies at the embeddings, where relevance ends."""

    tokens: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)

    def all(self) -> list[Tensor]:
        return [*self.tokens, *self.positions]


class _CapSkip(torch.autograd.Function):
    """The final soft-cap's values with the gradient started before it (RULES section 2)."""

    @staticmethod
    def forward(ctx: Any, before: Tensor, after: Tensor) -> Tensor:
        return after.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return g, None


@dataclass
class Pass:
    """One forward pass under rules, from which any number of targets can be explained."""

    model: Any
    rules: Rules
    readers: Readers
    leaves: Leaves
    prepared: Prepared
    books: Books | None
    strict: bool
    captured: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    logits: Tensor | None = None
    layers: int = 0

    def explain(self, target: Target, *, last: bool) -> RelevanceCache:
        """One backward pass for one target; ``last`` releases the graph."""
        assert self.logits is not None
        before = self._before_softcap()
        outputs = Outputs(
            self.logits if before is self.logits else _CapSkip.apply(before, self.logits),
            self.prepared.mask,
            self.model.tokenizer,
            self._activation,
            self.prepared.prompt_lengths,
        )
        values = target.values(outputs)
        self._require_finite(values)
        latent = [self.captured[t.hook] for t in _parts(target) if isinstance(t, Activation)]
        roots = latent or [before]
        gaps, on_path = self._check(roots)
        for site in self.rules.sites:
            site.backward = 0
        if self.books is not None:
            self.books.clear()
        wanted = [*self.leaves.all(), *(roots if self.books is not None else ())]
        grads = torch.autograd.grad(
            values.sum(), wanted, retain_graph=not last, allow_unused=True
        )
        at_leaves = [
            torch.zeros_like(leaf) if g is None else g
            for leaf, g in zip(self.leaves.all(), grads, strict=False)
        ]
        self._require_fired(on_path, gaps)
        relevances = [_wide(leaf) * _wide(g) for leaf, g in zip(self.leaves.all(), at_leaves, strict=True)]
        if not all(cover.is_finite(r) for r in relevances):
            raise InputError(
                f"relevance is not finite ({values.dtype}): the backward pass over- or underflowed; "
                "run the model in float32 or bfloat16"
            )
        n = len(self.leaves.tokens)
        ledger = None
        if self.books is not None:
            starts = [
                row_sums(root.detach(), g)
                for root, g in zip(roots, grads[len(at_leaves) :], strict=True)
                if g is not None
            ]
            ledger = make_ledger(
                self.books,
                float(values.detach().cpu().double().sum()),
                float(sum(row_sums(leaf.detach(), g).sum() for leaf, g in zip(self.leaves.all(), at_leaves, strict=True))),
                float(sum(start.sum() for start in starts)),
                self.layers,
            )
        read = self.readers.finish()
        return RelevanceCache(
            values=read,
            activations=dict(self.readers.activations),
            tokens=sum((r.sum(dim=-1) for r in relevances[:n]), torch.zeros_like(self.prepared.mask, dtype=relevances[0].dtype)),
            embeddings=relevances[0] if n else None,
            positions=relevances[n].sum(dim=-1) if len(relevances) > n else None,
            token_ids=self.prepared.tokens,
            attention_mask=self.prepared.mask,
            str_tokens=self.prepared.str_tokens(self.model.tokenizer),
            target=Explained(target.text(outputs), values.detach()),
            composite=self.rules.composite,
            coverage=cover.Coverage(
                cover.site_table(self.rules.sites, on_path),
                [str(gap) for gap in gaps],
                self.readers.off_path(),
                list(self.notes),
            ),
            ledger_=ledger,
            model_name=str(getattr(self.model.cfg, "model_name", "")),
            dtype=str(values.dtype).removeprefix("torch."),
        )

    def _activation(self, hook: str) -> Tensor:
        return self.captured[hook]

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
            raise InputError(
                f"the target is NaN or infinite ({values.tolist()}): activations overflowed or the "
                f"weights are broken (dtype {values.dtype}); check the model's own logits"
            )

    def _check(self, roots: list[Tensor]) -> tuple[list[cover.Gap], set[int]]:
        found = cover.walk(roots)
        idle = [site for site in self.rules.sites if site.forward == 0]
        if self.strict:
            if found.gaps:
                raise _Uncovered(found.gaps)
            self.rules.verify(*roots)
            if idle:
                raise CoverageError(
                    "rules were attached and their operations never ran: "
                    + ", ".join(f"{s.rule.name} at {s.hook}" for s in idle[:6])
                )
        return found.gaps, found.sites

    def _require_fired(self, on_path: set[int], gaps: list[cover.Gap]) -> None:
        if self.strict:
            cover.require_fired([s for s in self.rules.sites if id(s) in on_path])
        elif gaps:
            import warnings

            warnings.warn(cover.gap_message(gaps, architecture(self.model)), stacklevel=4)


class _Uncovered(CoverageError):
    """Gaps found, not yet named; :func:`_run` names their components with a traced pass."""

    def __init__(self, gaps: list[cover.Gap]) -> None:
        super().__init__("uncovered operations")
        self.gaps = gaps


def _wide(x: Tensor) -> Tensor:
    return x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach()


def _parts(target: Target) -> tuple[Target, ...]:
    return target.targets if isinstance(target, PerRow) else (target,)


def architecture(model: Any) -> str:
    """The Hugging Face class name of what a bridge wraps."""
    return type(getattr(model, "original_model", model)).__name__


def _cut_leaves(at: Attached, model: nn.Module, leaves: Leaves, batch: int) -> None:
    """Make the outputs of the embeddings leaves of the graph."""
    for _, module in components(model):
        if not isinstance(module, EmbeddingBridge | PosEmbedBridge):
            continue
        inner = original(module)
        if inner is None or not any(True for _ in inner.parameters()):
            continue  # rotary tables are no embeddings
        kept = leaves.positions if isinstance(module, PosEmbedBridge) else leaves.tokens

        def cut(
            _: nn.Module, args: tuple[Any, ...], out: Tensor, kept: list[Tensor] = kept
        ) -> Tensor:
            leaf = out.detach()
            if leaf.shape[0] == 1 and batch > 1:
                leaf = leaf.expand(batch, *leaf.shape[1:])
            leaf = leaf.clone().requires_grad_()
            kept.append(leaf)
            return leaf

        at.hook(inner, cut)


def _watch_blocks(at: Attached, model: nn.Module, books: Books) -> int:
    """Book the total relevance that enters and leaves every block; returns how many there are."""
    layers = 0
    for path, module in components(model):
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


def _capture(at: Attached, model: Any, hooks: list[str], captured: dict[str, Tensor]) -> None:
    """Keep the tensors, on the graph, at the unembedding and at the targets' own hook points."""
    points = dict(model.hook_dict)
    for name in hooks:
        if name not in points:
            select_names(points, name)  # raises with the nearest names

        def keep(point: Any, args: tuple[Any, ...], x: Tensor, name: str = name) -> None:
            conversion = getattr(point, "hook_conversion", None)
            captured[name] = x if conversion is None else conversion.convert(x)

        at.hook(points[name], keep)
    for _, module in components(model):
        if isinstance(module, UnembeddingBridge):

            def unembedded(_: nn.Module, args: tuple[Any, ...], x: Tensor) -> None:
                captured["unembed"] = x

            at.hook(module, unembedded)


def _checkpoint_blocks(at: Attached, model: nn.Module) -> None:
    """Recompute each block in the backward pass (non-reentrant; identical relevance)."""
    for _, module in components(model):
        if isinstance(module, BlockBridge):
            at.attribute(
                module, "forward", partial(checkpointed, module.forward, use_reentrant=False)
            )


@contextmanager
def _undone(at: Attached) -> Iterator[Attached]:
    try:
        yield at
    finally:
        for undo in reversed(at.undo):
            undo()


def _require_model(model: Any) -> None:
    if not hasattr(model, "hook_dict") or not isinstance(model, nn.Module):
        raise InputError(
            f"model must be a TransformerBridge (lenslrp.load gives one), not {type(model).__name__}"
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise InputError(
                f"{name.replace('_original_component.', '')} is quantised ({parameter.dtype}); the "
                "rules cannot read it: load the model in float32, bfloat16 or float16"
            )


def _names_in_use(model: Any, names_filter: NamesFilter) -> tuple[list[str], bool]:
    return select_names(dict(model.hook_dict), names_filter)


def relevance_for_targets(
    model: Any,
    input: Any = None,  # noqa: A002 - TransformerLens' own name
    targets: list[Any] | tuple[Any, ...] = (None,),
    composite: Composite | Mapping[str, Rule] | None = None,
    names_filter: NamesFilter = None,
    *,
    prepend_bos: bool | None = None,
    reduce: Reduce = None,
    attention: str = "bridge",
    checkpoint: bool = False,
    strict: bool = True,
    ledger: bool = True,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> list[RelevanceCache]:
    """Explain k targets of one input from one forward pass: one cache a target.

    Arguments as for :func:`run_with_relevance`. Targets of several tokens (``Sequence``) extend the
    prompt, so at most one of them can be given, alone.
    """
    _, caches = _run(
        model, input, list(targets), composite, names_filter, prepend_bos, reduce, attention,
        checkpoint, strict, ledger, attention_mask, inputs_embeds,
    )  # fmt: skip
    return caches


def run_with_relevance(
    model: Any,
    input: Any = None,  # noqa: A002 - TransformerLens' own name
    target: Any = None,
    composite: Composite | Mapping[str, Rule] | None = None,
    names_filter: NamesFilter = None,
    *,
    prepend_bos: bool | None = None,
    reduce: Reduce = None,
    attention: str = "bridge",
    checkpoint: bool = False,
    strict: bool = True,
    ledger: bool = True,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> tuple[Tensor, RelevanceCache]:
    """Logits, and the relevance of every hook point for a target; mirrors ``run_with_cache``.

    Args:
        model: a ``TransformerBridge``, in eval mode.
        input: a string, strings, or a token tensor [batch, pos].
        target: a token (string or id), a :mod:`lenslrp.targets` object, a list of one per row, or
            ``None`` for the top logit at the last position. A string of several tokens is
            teacher-forced as a ``Sequence``.
        composite: the rules; ``AttnLRP()`` if not given.
        names_filter: as in ``run_with_cache``: ``None`` for all on the path, a name, names, or a
            predicate. ``"mlp.hook_post"`` stands for that hook in every block; ``[]`` for none.
        prepend_bos: for strings; ``None`` is the model's own default.
        reduce: what to keep of each hook: everything, ``"sum"`` over features, ``TopK(k)``, any
            function of the relevance tensor, or a dict from hook name to one of these.
        attention: ``"bridge"``, or ``"fused"`` for torch's fused kernel (no patterns, no scores).
        checkpoint: recompute each block in the backward pass, for long inputs.
        strict: raise on an operation without a rule; otherwise warn, and say so in ``R.coverage``.
        ledger: keep the books; ``False`` saves a few per cent.
        attention_mask: [batch, pos], for token tensors with padding on one side.
        inputs_embeds: [batch, pos, d_model] instead of ``input``; they are then the leaves.

    Returns:
        The logits [batch, pos, vocab], detached and equal to the model's own, and the relevance in
        units of the target (logits).

    Raises:
        InputError: something given cannot be explained; the message says what would be valid.
        CoverageError: an operation on the path has no rule, or a rule did not fire.
    """
    logits, caches = _run(
        model, input, [target], composite, names_filter, prepend_bos, reduce, attention, checkpoint,
        strict, ledger, attention_mask, inputs_embeds,
    )  # fmt: skip
    return logits, caches[0]


def _run(
    model: Any,
    text: Any,
    targets: list[Any],
    composite: Composite | Mapping[str, Rule] | None,
    names_filter: NamesFilter,
    prepend_bos: bool | None,
    reduce: Reduce,
    attention: str,
    checkpoint: bool,
    strict: bool,
    ledger: bool,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
) -> tuple[Tensor, list[RelevanceCache]]:
    _require_model(model)
    if not targets:
        raise InputError("give at least one target")
    batch = _batch_size(text, inputs_embeds)
    wanted = [as_target(target, model.tokenizer, batch) for target in targets]
    spans = [target.ids(model.tokenizer) for target in wanted if isinstance(target, Sequence)]
    if spans and len(wanted) > 1:
        raise InputError("a Sequence target extends the prompt: explain it in a run of its own")
    prepared = prepare(
        model,
        text,
        append=spans[0] if spans else [],
        prepend_bos=prepend_bos,
        attention_mask=attention_mask,
        inputs_embeds=inputs_embeds,
    )
    names, named = _names_in_use(model, names_filter)
    table = as_composite(AttnLRP() if composite is None else composite)
    hooks = [t.hook for w in wanted for t in _parts(w) if isinstance(t, Activation)]

    def forward(tracer: bool) -> tuple[Tensor, list[RelevanceCache]]:
        books = Books() if ledger else None
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            rules = stack.enter_context(
                relevance_rules(model, table, attention=attention, strict=False, books=books)
            )
            at = stack.enter_context(_undone(Attached()))
            readers = Readers.plan(model.hook_dict, names, partial(reduction_for, reduce))
            run = Pass(model, rules, readers, Leaves(), prepared, books, strict)
            if inputs_embeds is None:
                _cut_leaves(at, model, run.leaves, len(prepared.tokens))
            run.layers = _watch_blocks(at, model, books) if books is not None else 0
            _capture(at, model, hooks, run.captured)
            readers.attach(model)
            at.undo.append(readers.detach)
            if checkpoint:
                _checkpoint_blocks(at, model)
            trace = cover.Tracer(model) if tracer else None
            if trace is not None:
                at.undo.append(trace.close)
            run.logits = _forward(model, prepared, run.leaves)
            if trace is not None:
                found = cover.walk(_roots(run, hooks), place=trace.place)
                raise CoverageError(cover.gap_message(found.gaps, architecture(model)))
            _require_on_path(readers, named, attention)
            caches = [
                run.explain(target, last=index == len(wanted) - 1)
                for index, target in enumerate(wanted)
            ]
            return run.logits.detach(), caches

    try:
        return forward(tracer=False)
    except _Uncovered:
        pass
    return forward(tracer=True)


def _roots(run: Pass, hooks: list[str]) -> list[Tensor]:
    return [run.captured[h] for h in hooks] or [run._before_softcap()]


def _batch_size(text: Any, inputs_embeds: Tensor | None) -> int:
    if inputs_embeds is not None:
        return len(inputs_embeds)
    if isinstance(text, str):
        return 1
    if isinstance(text, Tensor):
        return 1 if text.ndim == 1 else len(text)
    if isinstance(text, list) and text and isinstance(text[0], int):
        return 1
    return len(text) if isinstance(text, list) else 1


def _forward(model: Any, prepared: Prepared, leaves: Leaves) -> Tensor:
    kwargs = dict(prepared.kwargs)
    if "inputs_embeds" in kwargs:
        leaf = kwargs.pop("inputs_embeds").detach().clone().requires_grad_()
        leaves.tokens.append(leaf)
        logits: Tensor = model(leaf, return_type="logits", **kwargs)
        return logits
    logits = model(prepared.tokens, return_type="logits", **kwargs)
    if not leaves.tokens:
        raise CoverageError("no token embedding ran in the forward pass: there are no leaves")
    return logits


def _require_on_path(readers: Readers, named: bool, attention: str) -> None:
    off = readers.off_path()
    if named and off:
        hint = (
            'attention="fused" forms no patterns or scores; use attention="bridge"'
            if attention == "fused"
            else "it is not on the path from the embeddings to the target in this model"
        )
        raise InputError(f"no relevance can be read at {', '.join(off[:4])}: {hint}")


__all__ = ["Callable", "relevance_for_targets", "run_with_relevance"]
