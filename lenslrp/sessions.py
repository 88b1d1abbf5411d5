"""A session: rules attached to a model once, for as many forward and backward passes as there are.

:func:`lenslrp.run_with_relevance` and :func:`lenslrp.relevance_for_targets` are sessions of one
call.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lenslrp import media
from lenslrp.cache import RelevanceCache
from lenslrp.errors import CoverageError, InputError
from lenslrp.explaining import WINDOW, explain
from lenslrp.forward import columns_for
from lenslrp.hooks import coverage as cover
from lenslrp.hooks.attach import Attached
from lenslrp.hooks.composites import AttnLRP, Composite, as_composite
from lenslrp.hooks.install import Rules, require_attention, require_bridge
from lenslrp.hooks.observing import Observer
from lenslrp.hooks.readers import NamesFilter, Readers, select_names
from lenslrp.hooks.rules import Rule
from lenslrp.hooks.sites import Accounts
from lenslrp.hooks.structure import unchanged
from lenslrp.hooks.turns import Turn, turn, turns_of
from lenslrp.inputs import Batch
from lenslrp.logits import Columns, at_columns, require_logits
from lenslrp.out_of_memory import explained_oom
from lenslrp.passes import Again, Pass, under_rules
from lenslrp.reductions import Reduce, check_reduce, reduction_for
from lenslrp.remembered import is_conditional, remembered
from lenslrp.running import architecture, read_at
from lenslrp.targets import Activation, Sequence, Target, as_target, parts_of, require_latent
from lenslrp.unused import unused, why_unused

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class Session:
    """Rules attached to one model; what :func:`session` returns.

    The weights are frozen and the rules attached until :meth:`close`: at the end of a ``with``
    block, when the session is collected, or after an interrupt (the next call then attaches them
    again). Hooks of the user's, edits and steering, entered before the session or inside it, take
    part in what is explained; whenever the model's hooks, weights, mode or settings have changed
    since the last call, the rules are attached anew. Between the calls the model runs as ever.

    Any thread may call a session, one at a time. Inside the thread that opened it, sessions and
    :func:`lenslrp.relevance_rules` blocks nest: the innermost is in force.
    """

    def __init__(
        self,
        model: TransformerBridge,
        composite: Composite | Mapping[str, Rule] | None = None,
        *,
        attention: str = "bridge",
        checkpoint: bool = False,
        ledger: bool = True,
        strict: bool = True,
        logits: str = "all",
        stays: bool = True,
    ) -> None:
        require_attention(attention)
        require_logits(logits)
        self.model = model
        self.composite = as_composite(AttnLRP() if composite is None else composite)
        self.attention, self.checkpoint = attention, checkpoint
        self.ledger, self.strict, self.logits = ledger, strict, logits
        self.closed = False
        self._stays = stays  # the model is kept from other threads, which wait for others' blocks
        self._rules = Rules(model, self.composite, attention, Accounts() if ledger else None)
        self._fresh = False  # nothing can have changed since the rules were attached
        self._ways: set[str] = set()
        self._readers: Readers | None = None
        self._asked: Any = None
        self._block: Turn | None = None
        self._release: weakref.finalize[..., Any] | None = None
        require_bridge(model)
        with unchanged(model):
            self._hold()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Detach everything; a second call does nothing."""
        self.closed = True
        if self._release is not None:
            self._release()

    def run_with_relevance(
        self,
        input: Any = None,
        target: Any = None,
        names_filter: NamesFilter = None,
        **given: Any,
    ) -> tuple[Tensor, RelevanceCache]:
        """As :func:`lenslrp.run_with_relevance`, under the session's rules.

        Args:
            input, target, names_filter: as there.
            given: ``prepend_bos``, ``reduce``, ``logits``, ``attention_mask``, ``inputs_embeds``,
                ``decoder_input``, ``pixel_values``, ``input_values``, ``input_features``,
                ``leaves`` and ``model_kwargs``, as there; ``read``: hook point -> what is called
                with its activations as they pass in the forward pass.
        """
        logits, caches = self._explain(input, [target], names_filter, **given)
        return logits, caches[0]

    def relevance_for_targets(
        self,
        input: Any = None,
        targets: list[Any] | tuple[Any, ...] = (None,),
        names_filter: NamesFilter = None,
        **given: Any,
    ) -> list[RelevanceCache]:
        """As :func:`lenslrp.relevance_for_targets`, under the session's rules."""
        if not isinstance(targets, list | tuple):
            raise InputError(f"targets must be a list of them, not {targets!r}")
        return self._explain(input, list(targets), names_filter, **given)[1]

    def explain(
        self,
        inputs: Iterable[Any],
        targets: Any = None,
        *,
        batch_size: int | None = None,
        names_filter: NamesFilter = (),
        prepend_bos: bool | None = None,
        window: int = WINDOW,
        **given: Any,
    ) -> Iterator[RelevanceCache]:
        """One single-row cache for each input, in the order given; see
        :func:`lenslrp.explaining.explain` for inputs, targets and batches.

        Args:
            names_filter: as for :func:`lenslrp.run_with_relevance`; no hook points by default.
            given: ``reduce`` and ``logits`` (here ``"target"`` by default), as there.

        Raises:
            InputError: an input or a target that cannot be explained; the message names its number.
        """
        given = {"logits": "target", "prepend_bos": prepend_bos, **given}

        def run(some: Any, target: Any, mask: Tensor | None) -> RelevanceCache:
            _, found = self.run_with_relevance(
                some, target, names_filter, attention_mask=mask, **given
            )
            return found

        return explain(
            run, self.model, inputs, targets, batch_size=batch_size, prepend_bos=prepend_bos,
            window=window,
        )  # fmt: skip

    @contextmanager
    def forward(
        self,
        batch: Batch,
        target: Target,
        *,
        at_nodes: Callable[[Attached, Pass], None] | None = None,
        rows: bool = False,
    ) -> Iterator[Pass]:
        """A forward pass under the session's rules, for backward passes of the caller's own.

        They belong inside the block. The graph is not checked: explain the same batch first.

        Args:
            batch: what the model reads.
            target: what logits and hook points are kept for.
            at_nodes: attaches what else belongs to the pass.
            rows: keep books, row by row.
        """
        with self._calling():
            model, rules = self.model, self._rules
            self._fit(rules, books=rows, copies=rules.copies)
            if rules.books is not None:
                rules.books.rows = len(batch.tokens)
            columns = self._columns(batch, [target], []) if self.logits == "target" else None
            latent = [t.hook for t in parts_of(target) if isinstance(t, Activation)]
            readers = Readers.plan({}, [], lambda _: None)
            try:
                with under_rules(
                    model, rules, batch, readers, latent=latent, columns=columns, at_nodes=at_nodes
                ) as made:
                    yield made
            finally:
                if rules.books is not None:
                    rules.books.rows = None

    def _hold(self) -> None:
        """Attach the rules, and see to it that they are detached whatever becomes of this."""
        turns, block = turns_of(self.model), Turn(self._rules, stays=self._stays)
        self._block = block
        self._release = weakref.finalize(self, turns.end, block)
        try:
            turns.begin(block)
        except BaseException:
            self._release()
            raise
        self._fresh = not self._stays  # then the call follows at once

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """One call: the model is this thread's, and the rules are those that fit it."""
        if self.closed:
            raise InputError("this session is closed: open another one with lenslrp.session(...)")
        if torch.is_inference_mode_enabled():
            raise InputError(
                "relevance needs autograd: leave torch.inference_mode() (no_grad is fine)"
            )
        if self._release is None or not self._release.alive:  # an interrupt has detached them
            require_bridge(self.model)
            self._hold()
        rules, opener = self._rules, self._rules.holder.thread
        with turn(self.model, rules, within=self._block):
            try:
                rules.holder.thread = get_ident()
                if not self._fresh and not rules.current:
                    require_bridge(self.model)
                    self._renew(rules)
                with unchanged(self.model, rules.state.parts if rules.state else None):
                    yield
                self._fresh = False
            except KeyboardInterrupt:
                assert self._release is not None
                self._release()
                raise
            except BaseException:
                rules.state = None  # what was left in the middle holds what it was given
                self._fresh = False
                raise
            finally:
                rules.holder.thread = opener

    def _renew(self, rules: Rules) -> None:
        rules.sites = []  # others, maybe
        turns_of(self.model).renew(rules)

    def _explain(
        self,
        text: Any,
        targets: list[Any],
        names_filter: NamesFilter,
        *,
        prepend_bos: bool | None = None,
        reduce: Reduce = None,
        logits: str | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input: Any = None,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        leaves: str = "pixels",
        model_kwargs: Mapping[str, Any] | None = None,
        read: Mapping[str, Callable[[Tensor], None]] | None = None,
    ) -> tuple[Tensor, list[RelevanceCache]]:
        model = self.model
        logits = self.logits if logits is None else logits
        require_logits(logits)
        if not targets:
            raise InputError("give at least one target")
        if leaves not in media.LEAVES:
            raise InputError(f"leaves must be one of {media.LEAVES}, not {leaves!r}")
        with self._calling():
            floats = _given(pixel_values, input_values, input_features)
            batch = media.batch_size(text, inputs_embeds, floats)
            labels = media.labels_of(model)
            wanted = [as_target(target, model.tokenizer, batch, labels) for target in targets]
            spans = [
                target.ids(model.tokenizer) for target in wanted if isinstance(target, Sequence)
            ]
            if spans and len(wanted) > 1:
                raise InputError(
                    "a Sequence target extends the prompt: explain it in a run of its own"
                )
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
            media.check_kwargs(model, model_kwargs or {}, prepared)
            prepared.kwargs.update(model_kwargs or {})
            if not media.head_of(model):
                for item in wanted:
                    require_latent(item, architecture(model))
            return self._run(prepared, wanted, names_filter, reduce, logits, leaves, read or {})

    def _run(
        self,
        prepared: Batch,
        wanted: list[Target],
        names_filter: NamesFilter,
        reduce: Reduce,
        logits: str,
        leaves: str,
        read: Mapping[str, Callable[[Tensor], None]],
    ) -> tuple[Tensor, list[RelevanceCache]]:
        model, rules = self.model, self._rules
        state, points = rules.state, rules.points
        assert state is not None
        names, named = select_names(points, names_filter)
        check_reduce(reduce, points)
        columns = None
        if logits == "target":
            columns = self._columns(prepared, wanted, names if named else [])
        hooks = [t.hook for w in wanted for t in parts_of(w) if isinstance(t, Activation)]
        memory = remembered(model, state.hooks)
        observes = state.hooked or memory.cuts is None

        def reading(at: Attached, _: Pass) -> None:
            for name, call in read.items():
                read_at(at, points, name, call)

        choices = {
            "composite": self.composite, "names_filter": names_filter, "reduce": reduce,
            "attention": self.attention, "checkpoint": self.checkpoint, "ledger": self.ledger,
            "logits": logits,
        }  # fmt: skip

        def attempt(ways: set[str]) -> tuple[Tensor, list[RelevanceCache], set[str]]:
            checked = "books" in ways or not (memory.balanced or is_conditional(model))
            self._fit(rules, books=self.ledger or checked, copies="copies" in ways)
            readers = self._reading(rules, names, reduce)
            observer = Observer(state.parts) if observes or ways else None
            with ExitStack() as stack:
                tracer = None
                if "trace" in ways:
                    tracer = cover.Tracer(state.parts)
                    stack.callback(tracer.close)
                run = stack.enter_context(
                    under_rules(
                        model, rules, prepared, readers, latent=hooks, columns=columns, leaf=leaves,
                        checkpoint=self.checkpoint, strict=self.strict, ledger=self.ledger,
                        memory=memory, observer=observer, at_nodes=reading,
                    )
                )  # fmt: skip
                if tracer is not None:
                    self._name_gaps(run, wanted, tracer)
                _require_on_path(readers, named, self.attention)
                last = len(wanted) - 1
                caches = [run.relevance(item, last=i == last) for i, item in enumerate(wanted)]
                assert run.logits is not None
                found = run.logits.detach()
                if columns is not None and run.columns is None and found.ndim == 3:
                    found = at_columns(found, columns)
            return found, caches, readers.silent

        ways = set(self._ways)
        while True:
            try:
                with explained_oom(model, prepared, **choices):
                    found, caches, silent = attempt(ways)
                break
            except Again as again:
                if again.way in ways:
                    raise
                ways.add(again.way)
        self._ways = ways & {"copies"}  # a model that writes in place will do so again
        self._warn(caches)
        if silent:
            lost = silent & unused(model, prepared, live=True, modules=self.composite.modules)
            _withdraw(model, caches, lost, named)
        return found, caches

    def _reading(self, rules: Rules, names: list[str], reduce: Reduce) -> Readers:
        """Readers of hook points; the same ones stay attached for calls that ask for the same."""
        asked = (names, reduce)
        kept = self._readers
        if kept is not None and kept.state is rules.state and self._asked == asked:
            return kept
        readers = Readers.plan(rules.points, names, partial(reduction_for, reduce))
        stay = self._stays and (
            reduce is None or isinstance(reduce, str)
        )  # others hold what they do
        if stay or kept is not None:
            rules.keep(readers if stay else None)
        self._asked, self._readers = asked, readers if stay else None
        return readers

    def _fit(self, rules: Rules, *, books: bool, copies: bool) -> None:
        """Attach the rules anew where they keep other things than this pass needs."""
        if (rules.books is not None) != books or rules.copies != copies:
            rules.books = Accounts() if books else None
            rules.copies = copies
            self._renew(rules)

    def _columns(self, prepared: Batch, wanted: list[Target], names: list[str]) -> Columns | None:
        """Where logits are computed; ``None`` where somebody sees more of them than the target."""
        inside = any(name.split(".")[0] == "unembed" for name in names)
        return None if inside else columns_for(self.model, prepared, wanted)

    def _name_gaps(self, run: Pass, wanted: list[Target], tracer: cover.Tracer) -> None:
        """Raise what has no rule, with the component that it belongs to."""
        roots = [root for item in wanted for root in run.roots(item)]
        found = run.walk(roots, tracer.place)
        if found.gaps and self.strict:
            kind, recurrent = architecture(self.model), tracer.recurrent(found)
            raise CoverageError(cover.gap_message(found.gaps, kind, recurrent))

    def _warn(self, caches: list[RelevanceCache]) -> None:
        gaps = dict.fromkeys(gap for cache in caches for gap in cache.coverage.uncovered)
        if gaps:
            said = cover.gap_message(list(gaps), architecture(self.model))
            warnings.warn(said, stacklevel=_caller())
        elif not all(cache.coverage.balanced for cache in caches):
            notes = dict.fromkeys(note for cache in caches for note in cache.coverage.notes)
            warnings.warn("; ".join(notes), stacklevel=_caller())


def session(
    model: TransformerBridge,
    composite: Composite | Mapping[str, Rule] | None = None,
    *,
    attention: str = "bridge",
    checkpoint: bool = False,
    ledger: bool = True,
    strict: bool = True,
    logits: str = "all",
) -> Session:
    """Attach relevance rules to ``model`` once, for as many inputs as there are.

    Use it as a context manager, or across the cells of a notebook with :meth:`Session.close` at the
    end::

        with lenslrp.session(model) as s:
            logits, R = s.run_with_relevance("The capital of France is", " Paris")

    Args:
        model: a ``TransformerBridge``, in eval mode.
        composite: the rules; ``AttnLRP()`` if not given.
        attention, checkpoint, ledger, strict, logits: as for :func:`lenslrp.run_with_relevance`;
            ``logits`` can be given to each call as well.

    Raises:
        InputError: rules cannot be attached to the model, or another thread has a session open on
            it.
    """
    return Session(
        model, composite, attention=attention, checkpoint=checkpoint, ledger=ledger, strict=strict,
        logits=logits,
    )  # fmt: skip


def _caller() -> int:
    """How far above a warning's own frame the first code is that is not LensLRP's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals["__name__"]).startswith("lenslrp."):
        level, frame = level + 1, frame.f_back
    return level


def _given(*floats: Tensor | None) -> dict[str, Tensor]:
    """The float inputs that were given, by name, in the order of ``media.LAYOUTS``."""
    return {n: v for n, v in zip(media.LAYOUTS, floats, strict=True) if v is not None}


def _withdraw(
    model: TransformerBridge, caches: list[RelevanceCache], lost: set[str], named: bool
) -> None:
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
