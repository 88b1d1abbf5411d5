"""A session: rules attached to a model once, for as many forward and backward passes as there are.

:func:`lenslrp.run_with_relevance` and :func:`lenslrp.relevance_for_targets` are sessions of one
call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lenslrp import media
from lenslrp.cache import RelevanceCache
from lenslrp.errors import InputError
from lenslrp.explaining import WINDOW, explain
from lenslrp.forward import columns_for
from lenslrp.graph_check import RunAgain, is_conditional, remembered, warn_of
from lenslrp.held_rules import HeldRules
from lenslrp.hooks import coverage as cover
from lenslrp.hooks.attach import Attached
from lenslrp.hooks.composites import AttnLRP, Composite, as_composite
from lenslrp.hooks.install import require_attention
from lenslrp.hooks.observing import Observer
from lenslrp.hooks.readers import NamesFilter, Readers, select_names
from lenslrp.hooks.rules import Rule
from lenslrp.inputs import Batch
from lenslrp.logits import Columns, at_columns, require_logits
from lenslrp.out_of_memory import explained_oom
from lenslrp.passes import Pass, under_rules
from lenslrp.reductions import Reduce, check_reduce
from lenslrp.running import architecture, read_at
from lenslrp.targets import Activation, Sequence, Target, as_target, parts_of, require_latent
from lenslrp.unused import require_on_path, unused, withdraw

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
        self._held = HeldRules(model, self.composite, attention, ledger=ledger, stays=stays)
        self._needs: set[str] = set()

    @property
    def closed(self) -> bool:
        """Whether the session has been closed."""
        return self._held.closed

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
        self._held.close()

    def run_with_relevance(
        self,
        input: Any = None,
        target: Any = None,
        names_filter: NamesFilter = None,
        **options: Any,
    ) -> tuple[Tensor, RelevanceCache]:
        """As :func:`lenslrp.run_with_relevance`, under the session's rules.

        Args:
            input, target, names_filter: as there.
            given: ``prepend_bos``, ``reduce``, ``logits``, ``attention_mask``, ``inputs_embeds``,
                ``decoder_input``, ``pixel_values``, ``input_values``, ``input_features``,
                ``leaves`` and ``model_kwargs``, as there; ``read``: hook point -> what is called
                with its activations as they pass in the forward pass.
        """
        logits, caches = self._explain(input, [target], names_filter, **options)
        return logits, caches[0]

    def relevance_for_targets(
        self,
        input: Any = None,
        targets: list[Any] | tuple[Any, ...] = (None,),
        names_filter: NamesFilter = None,
        **options: Any,
    ) -> list[RelevanceCache]:
        """As :func:`lenslrp.relevance_for_targets`, under the session's rules."""
        if not isinstance(targets, list | tuple):
            raise InputError(f"targets must be a list of them, not {targets!r}")
        return self._explain(input, list(targets), names_filter, **options)[1]

    def explain(
        self,
        inputs: Iterable[Any],
        targets: Any = None,
        *,
        batch_size: int | None = None,
        names_filter: NamesFilter = (),
        prepend_bos: bool | None = None,
        window: int = WINDOW,
        **options: Any,
    ) -> Iterator[RelevanceCache]:
        """One single-row cache for each input, in the order given; see
        :func:`lenslrp.explaining.explain` for inputs, targets and batches.

        Args:
            names_filter: as for :func:`lenslrp.run_with_relevance`; no hook points by default.
            given: ``reduce`` and ``logits`` (here ``"target"`` by default), as there.

        Raises:
            InputError: an input or a target that cannot be explained; the message names its number.
        """
        options = {"logits": "target", "prepend_bos": prepend_bos, **options}

        def run_one(inputs: Any, target: Any, mask: Tensor | None) -> RelevanceCache:
            _, R = self.run_with_relevance(
                inputs, target, names_filter, attention_mask=mask, **options
            )
            return R

        return explain(
            run_one, self.model, inputs, targets, batch_size=batch_size, prepend_bos=prepend_bos,
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
            rows: account for relevance row by row.
        """
        with self._held.calling():
            model, rules = self.model, self._held.rules
            self._held.fit(accounts=rows, copies=rules.copies)
            if rules.books is not None:
                rules.books.rows = len(batch.tokens)
            columns = self._columns(batch, [target], []) if self.logits == "target" else None
            latent = [t.hook for t in parts_of(target) if isinstance(t, Activation)]
            readers = Readers.plan({}, [], lambda _: None)
            try:
                with under_rules(
                    model, rules, batch, readers, latent=latent, columns=columns, at_nodes=at_nodes
                ) as run:
                    yield run
            finally:
                if rules.books is not None:
                    rules.books.rows = None

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
        with self._held.calling():
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
            prepared = media.prepare_batch(
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
        model, rules = self.model, self._held.rules
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

        def attempt(needs: set[str]) -> tuple[Tensor, list[RelevanceCache], set[str]]:
            checked = "accounts" in needs or not (memory.balanced or is_conditional(model))
            self._held.fit(accounts=self.ledger or checked, copies="copies" in needs)
            readers = self._held.readers(names, reduce)
            observer = Observer(state.parts) if observes or needs else None
            with ExitStack() as stack:
                tracer = None
                if "trace" in needs:
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
                    run.name_gaps(wanted, tracer)
                require_on_path(readers, named, self.attention)
                last = len(wanted) - 1
                caches = [run.relevance(item, last=i == last) for i, item in enumerate(wanted)]
                assert run.logits is not None
                values = run.logits.detach()
                if columns is not None and run.columns is None and values.ndim == 3:
                    values = at_columns(values, columns)
            return values, caches, readers.silent

        needs = set(self._needs)
        while True:
            try:
                with explained_oom(model, prepared, **choices):
                    values, caches, silent = attempt(needs)
                break
            except RunAgain as again:
                if again.need in needs:
                    raise
                needs.add(again.need)
        self._needs = needs & {"copies"}  # a model that writes in place will do so again
        warn_of([cache.coverage for cache in caches], architecture(model))
        if silent:
            lost = silent & unused(model, prepared, live=True, modules=self.composite.modules)
            withdraw(model, caches, lost, named)
        return values, caches

    def _columns(self, prepared: Batch, wanted: list[Target], names: list[str]) -> Columns | None:
        """Where logits are computed; ``None`` where somebody sees more of them than the target."""
        inside = any(name.split(".")[0] == "unembed" for name in names)
        return None if inside else columns_for(self.model, prepared, wanted)


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


def _given(*floats: Tensor | None) -> dict[str, Tensor]:
    """The float inputs that were given, by name, in the order of ``media.LAYOUTS``."""
    return {n: v for n, v in zip(media.LAYOUTS, floats, strict=True) if v is not None}
