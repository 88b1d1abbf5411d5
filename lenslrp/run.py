"""``run_with_relevance``: one forward and one backward pass, relevance at every hook.

The public functions; :mod:`lenslrp.passes` is the engine behind them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lenslrp import media
from lenslrp.cache import RelevanceCache
from lenslrp.errors import CoverageError, InputError
from lenslrp.hooks import coverage as cover
from lenslrp.hooks.components import Attached, components, hook_points
from lenslrp.hooks.composites import AttnLRP, Composite, as_composite
from lenslrp.hooks.install import relevance_rules, require_bridge
from lenslrp.hooks.observing import Observer
from lenslrp.hooks.readers import NamesFilter, Readers, select_names
from lenslrp.hooks.rules import Rule
from lenslrp.hooks.sites import Books
from lenslrp.hooks.turns import turn
from lenslrp.leaves import Leaves, cut_leaves, cut_media
from lenslrp.passes import (
    Again,
    Pass,
    architecture,
    capture,
    checkpoint_blocks,
    parts_of,
    run_model,
    undone,
    watch_blocks,
)
from lenslrp.reductions import Reduce, check_reduce, reduction_for
from lenslrp.remembered import is_conditional, remembered
from lenslrp.targets import Activation, Sequence, as_target, require_latent
from lenslrp.unused import unused, why_unused


def relevance_for_targets(
    model: Any,
    input: Any = None,
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
    decoder_input: Any = None,
    pixel_values: Tensor | None = None,
    input_values: Tensor | None = None,
    input_features: Tensor | None = None,
    leaves: str = "pixels",
    model_kwargs: Mapping[str, Any] | None = None,
) -> list[RelevanceCache]:
    """Explain k targets of one input from one forward pass: one cache a target.

    Arguments as for :func:`run_with_relevance`. Targets of several tokens (``Sequence``) extend the
    prompt, so at most one of them can be given, alone.
    """
    if not isinstance(targets, list | tuple):
        raise InputError(f"targets must be a list of them, not {targets!r}")
    require_bridge(model)
    with turn(model):
        _, caches = _run(
            model, input, list(targets), composite, names_filter, prepend_bos, reduce, attention,
            checkpoint, strict, ledger, attention_mask, inputs_embeds, decoder_input,
            _given(pixel_values, input_values, input_features), leaves, model_kwargs or {},
        )  # fmt: skip
    return caches


def run_with_relevance(
    model: Any,
    input: Any = None,
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
    decoder_input: Any = None,
    pixel_values: Tensor | None = None,
    input_values: Tensor | None = None,
    input_features: Tensor | None = None,
    leaves: str = "pixels",
    model_kwargs: Mapping[str, Any] | None = None,
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
        decoder_input: what the decoder of an encoder-decoder has written so far: a string or
            strings (its start token is put before them), or a token tensor [batch, pos] as it is;
            the start token alone by default. Targets are then positions of the decoder.
        pixel_values: [batch, channel, height, width], an image as the model's own processor makes
            it. Beside ``input`` where the model reads both.
        input_values: [batch, sample] of a waveform, or [batch, frame, mel] of a spectrogram.
        input_features: likewise, for models that call them so.
        leaves: ``"pixels"``: relevance ends at what was given (pixels, samples) and patches are
            read on the way; ``"patches"``: it ends at the patch embeddings.
        model_kwargs: what else the model's own forward pass takes beside an image or a sound, such
            as ``image_sizes``, ``image_grid_thw`` or ``input_features_mask``.

    Returns:
        The logits [batch, pos, vocab] (a classifier's: [batch, class]), detached and equal to the
        model's own, and the relevance in units of the target (logits).

    Raises:
        InputError: something given cannot be explained; the message says what would be valid.
        CoverageError: an operation on the path has no rule, or a rule did not fire.
    """
    require_bridge(model)
    with turn(model):
        logits, caches = _run(
            model, input, [target], composite, names_filter, prepend_bos, reduce, attention,
            checkpoint, strict, ledger, attention_mask, inputs_embeds, decoder_input,
            _given(pixel_values, input_values, input_features), leaves, model_kwargs or {},
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
    decoder_input: Any,
    floats: dict[str, Tensor],
    leaves: str,
    model_kwargs: Mapping[str, Any],
) -> tuple[Tensor, list[RelevanceCache]]:
    if torch.is_inference_mode_enabled():
        raise InputError("relevance needs autograd: leave torch.inference_mode() (no_grad is fine)")
    if not targets:
        raise InputError("give at least one target")
    if leaves not in media.LEAVES:
        raise InputError(f"leaves must be one of {media.LEAVES}, not {leaves!r}")
    batch = batch_size(text, inputs_embeds, floats)
    labels = media.labels_of(model)
    wanted = [as_target(target, model.tokenizer, batch, labels) for target in targets]
    spans = [target.ids(model.tokenizer) for target in wanted if isinstance(target, Sequence)]
    if spans and len(wanted) > 1:
        raise InputError("a Sequence target extends the prompt: explain it in a run of its own")
    prepared = media.prepare(
        model,
        text,
        floats,
        append=spans[0] if spans else [],
        prepend_bos=prepend_bos,
        attention_mask=attention_mask,
        inputs_embeds=inputs_embeds,
        decoder_input=decoder_input,
    )
    media.check_kwargs(model, model_kwargs, prepared)
    prepared.kwargs.update(model_kwargs)
    if not media.head_of(model):
        for item in wanted:
            require_latent(item, architecture(model))
    parts = list(components(model))
    points = hook_points(model, parts)
    names, named = select_names(points, names_filter)
    check_reduce(reduce, points)
    table = as_composite(AttnLRP() if composite is None else composite)
    hooks = [t.hook for w in wanted for t in parts_of(w) if isinstance(t, Activation)]

    hooked = any(part._forward_hooks or part._forward_pre_hooks for _, part in parts)
    memory = remembered(model, parts)

    def forward(ways: set[str]) -> tuple[Tensor, list[RelevanceCache], set[str]]:
        checked = "books" in ways or not (memory.balanced or is_conditional(model))
        books = Books() if ledger or checked else None
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            rules = stack.enter_context(
                relevance_rules(
                    model,
                    table,
                    attention=attention,
                    strict=False,
                    books=books,
                    copies="copies" in ways,
                )
            )
            at = stack.enter_context(undone(Attached()))
            readers = Readers.plan(points, names, partial(reduction_for, reduce))
            readers.copies = rules.copies
            observer = Observer(parts) if hooked or ways or memory.cuts is None else None
            for meter in rules.edits:
                meter.touched = lambda: 0 if observer is None else observer.touched
            run = Pass(
                model, rules, readers, Leaves(), prepared, books, strict, ledger, observer, memory
            )
            given = dict(prepared.media)
            if given:
                given = cut_media(at, parts, run.leaves, rules.sites, given, leaves)
            cut_leaves(at, parts, run.leaves, prepared)  # positions, too, of given embeddings
            run.layers = watch_blocks(at, parts, books) if books is not None else 0
            readers.attach(model, at)
            capture(at, points, parts, hooks, run.captured)
            if checkpoint:
                checkpoint_blocks(at, parts)
            tracer = cover.Tracer(parts) if "trace" in ways else None
            if tracer is not None:
                at.undo.append(tracer.close)
            with observer or nullcontext():
                run.logits = run_model(model, prepared, run.leaves, given)
            if media.reads_no_text(model):
                run.prepared = media.with_sequence(prepared, run.leaves)
            if tracer is not None:
                roots = [root for item in wanted for root in run.roots(item)]
                found = run.walk(roots, tracer.place)
                if found.gaps and strict:
                    recurrent = tracer.recurrent(found)
                    said = cover.gap_message(found.gaps, architecture(model), recurrent)
                    raise CoverageError(said)
            _require_on_path(readers, named, attention)
            last = len(wanted) - 1
            caches = [run.explain(item, last=i == last) for i, item in enumerate(wanted)]
            if any(cache.coverage.uncovered for cache in caches):
                gaps = dict.fromkeys(gap for cache in caches for gap in cache.coverage.uncovered)
                warnings.warn(cover.gap_message(list(gaps), architecture(model)), stacklevel=4)
            elif not all(cache.coverage.balanced for cache in caches):
                notes = dict.fromkeys(note for cache in caches for note in cache.coverage.notes)
                warnings.warn("; ".join(notes), stacklevel=4)
            return run.logits.detach(), caches, readers.silent

    ways: set[str] = set()
    while True:
        try:
            logits, caches, silent = forward(ways)
            break
        except Again as again:
            if again.way in ways:
                raise
            ways.add(again.way)
    if silent:
        lost = silent & unused(model, prepared, live=True, modules=table.modules)
        _withdraw(model, caches, lost, named)
    return logits, caches


def _given(*floats: Tensor | None) -> dict[str, Tensor]:
    """The float inputs that were given, by name, in the order of ``media.LAYOUTS``."""
    return {n: v for n, v in zip(media.LAYOUTS, floats, strict=True) if v is not None}


def batch_size(text: Any, inputs_embeds: Tensor | None, floats: dict[str, Tensor]) -> int:
    """How many rows were given."""
    if inputs_embeds is not None:
        return len(inputs_embeds)
    if text is None and floats:
        return len(next(iter(floats.values())))
    if isinstance(text, Tensor) and text.is_floating_point():
        return len(text)
    if isinstance(text, str):
        return 1
    if isinstance(text, Tensor):
        return 1 if text.ndim < 2 else len(text)
    if isinstance(text, list) and text and isinstance(text[0], int):
        return 1
    return len(text) if isinstance(text, list) else 1


def _withdraw(model: Any, caches: list[RelevanceCache], lost: set[str], named: bool) -> None:
    """Take back zeros that are none: no gradient came, because nothing uses the tensor.

    Raises:
        InputError: they were asked for by name.
    """
    if lost and named:
        raise InputError(f"no relevance can be read: {why_unused(model, min(lost))}")
    for cache in caches:
        for name in sorted(lost):
            del cache.values[name]
        cache.coverage.off_path.extend(sorted(lost))


def _require_on_path(readers: Readers, named: bool, attention: str) -> None:
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
