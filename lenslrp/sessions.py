"""A session: rules attached to a model once, for as many forward and backward passes as there are.

`lenslrp.run_with_relevance` and `lenslrp.relevance_for_targets` are sessions of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lenslrp import media
from lenslrp.batch import Batch
from lenslrp.cache import RelevanceCache
from lenslrp.defaults import recommended
from lenslrp.errors import InputError
from lenslrp.explaining import WINDOW, explain
from lenslrp.forward import columns_for, require_readable, targets_for
from lenslrp.graph_check import RunAgain, is_conditional, remembered, require_on_path, warn_of
from lenslrp.held_rules import HeldRules
from lenslrp.hooks import coverage as cover
from lenslrp.hooks.composites import Composite, as_composite
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.install import require_attention
from lenslrp.hooks.observing import Observer
from lenslrp.hooks.readers import NamesFilter, select_names
from lenslrp.hooks.rule_types import Rule
from lenslrp.latent import Activation
from lenslrp.logits import Columns, Target, at_columns, require_logits
from lenslrp.out_of_memory import explained_oom
from lenslrp.passes import Pass, under_rules
from lenslrp.progress import progress_bar
from lenslrp.reductions import Reduce, check_reduce
from lenslrp.running import architecture, read_at
from lenslrp.targets import parts_of
from lenslrp.unused import unused, withdraw

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class Session:
    """Rules attached to one model; what `lenslrp.session` returns.

    The weights are frozen and the rules attached until `close`: at the end of a ``with``
    block, when the session is collected, or after an interrupt (the next call then attaches them
    again). Hooks of the user's, edits and steering, entered before the session or inside it, take
    part in what is explained; whenever the model's hooks, weights, mode or settings have changed
    since the last call, the rules are attached anew. Between the calls the model runs as ever.

    Any thread may call a session, one at a time. Inside the thread that opened it, sessions and
    `lenslrp.relevance_rules` blocks nest: the innermost is in force.

    Attributes:
        model: the model, a ``TransformerBridge``.
        composite: the table of rules.
        attention: ``"bridge"`` or ``"fused"``.
        checkpoint: blocks are recomputed in the backward pass.
        ledger: the target is accounted for.
        strict: an operation without a rule is an error.
        logits: ``"all"`` or ``"target"``, where a call does not say.

    Examples:
        >>> with lenslrp.session(model) as s:
        ...     logits, R = s.run_with_relevance("The capital of France is", " Paris")
        ...     caches = list(s.explain(["Two plus two is", "The sky is"]))
        >>> len(caches), caches[1].str_tokens[0]
        (2, ['The', ' sky', ' is'])
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
        self.composite = as_composite(recommended(model) if composite is None else composite)
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

    def __exit__(self, *_: object) -> None:
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
        """As `lenslrp.run_with_relevance`, under the session's rules.

        Args:
            input: a string, strings, or a token tensor [batch, pos].
            target: a token, a target, a list of one per row, or ``None`` for the top logit.
            names_filter: which hook points are read; ``None`` for all on the path.
            options: ``prepend_bos``, ``reduce``, ``logits``, ``attention_mask``, ``inputs_embeds``,
                ``decoder_input``, ``pixel_values``, ``input_values``, ``input_features``,
                ``leaves`` and ``model_kwargs``, as there; ``read``: hook point -> what is called
                with its activations as they pass in the forward pass.

        Returns:
            The logits [batch, pos, vocab], detached, and the relevance in units of the target.

        Raises:
            InputError: the session is closed, or something given cannot be explained.
            CoverageError: an operation on the path has no rule, or a rule did not fire.
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
        """As `lenslrp.relevance_for_targets`, under the session's rules.

        Args:
            input: a string, strings, or a token tensor [batch, pos].
            targets: a list of targets, each for the whole batch.
            names_filter: which hook points are read; ``None`` for all on the path.
            options: as for `run_with_relevance`.

        Returns:
            One cache a target, from one forward pass.

        Raises:
            InputError: the session is closed, or something given cannot be explained.
            CoverageError: an operation on the path has no rule, or a rule did not fire.
        """
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
        """One single-row cache for each input, in the order given, from batches of like length.

        Args:
            inputs: prompts, read as they are needed: strings, lists or 1-D tensors of token ids,
                or conversations (lists of messages, as for `lenslrp.chat`).
            targets: ``None``, one target for all inputs, or an iterable of one for each.
            batch_size: prompts of a batch; ``None`` goes by tokens.
            names_filter: as for `lenslrp.run_with_relevance`; no hook points by default.
            prepend_bos: likewise.
            window: inputs that are taken, and sorted by length, at a time.
            options: ``reduce`` and ``logits`` (here ``"target"`` by default), as there.

        Yields:
            A cache of one row for each input.

        Raises:
            InputError: an input or a target that cannot be explained; the message names its number.
        """
        options = {"logits": "target", "prepend_bos": prepend_bos, **options}

        def run_one(inputs: Any, target: Any, mask: Tensor | None) -> RelevanceCache:
            return self.run_with_relevance(
                inputs, target, names_filter, attention_mask=mask, **options
            )[1]

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
            columns = self._columns(batch, [target], []) if self.logits == "target" else None
            latent = [t.hook for t in parts_of(target) if isinstance(t, Activation)]
            with self._held.forward(batch, latent, columns, at_nodes=at_nodes, rows=rows) as run:
                yield run

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
        pixel_values: Any = None,
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
            floats = media.floats_given(model, pixel_values, input_values, input_features)
            batch = media.batch_size(text, inputs_embeds, floats)
            parsed, span = targets_for(model, targets, batch)
            prepared = media.prepare_batch(
                model,
                text,
                floats,
                append=span,
                prepend_bos=prepend_bos,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                decoder_input=decoder_input,
            )
            media.check_kwargs(model, model_kwargs or {}, prepared)
            prepared.kwargs.update(model_kwargs or {})
            for item in parsed:
                require_readable(model, item)
            return self._run(prepared, parsed, names_filter, reduce, logits, leaves, read or {})

    def _run(
        self,
        prepared: Batch,
        targets: list[Target],
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
        given = names if named else []
        columns = self._columns(prepared, targets, given) if logits == "target" else None
        hooks = [t.hook for w in targets for t in parts_of(w) if isinstance(t, Activation)]
        memory = remembered(model, state.hooks)
        observes = state.hooked or memory.hidden or memory.cuts is None
        heard = set[str]()  # by passes that are run again: what is read is the same

        def hear(name: str, x: Tensor) -> None:
            heard.add(name)
            read[name](x)

        def reading(at: Attached, _: Pass) -> None:
            for name in read.keys() - heard:
                read_at(at, points, name, partial(hear, name))

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
                    run.name_gaps(targets, tracer)
                require_on_path(readers, named, self.attention)
                last = len(targets) - 1
                bar = progress_bar("targets", targets, shown=None if last else False)
                caches = [run.relevance(item, last=i == last) for i, item in enumerate(bar)]
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

    def _columns(self, prepared: Batch, targets: list[Target], names: list[str]) -> Columns | None:
        """Where logits are computed; ``None`` where somebody sees more of them than the target."""
        inside = any(name.split(".")[0] == "unembed" for name in names)
        return None if inside else columns_for(self.model, prepared, targets)


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

    Use it as a context manager, or across the cells of a notebook with `close` at the end.

    Args:
        model: a ``TransformerBridge``, in eval mode.
        composite: the rules; `lenslrp.recommended` of the model if not given.
        attention: ``"bridge"``, or ``"fused"`` for torch's fused kernel (no patterns, no scores).
        checkpoint: recompute each block in the backward pass, for long inputs.
        ledger: account for the whole target; ``False`` saves a few per cent.
        strict: raise on an operation without a rule; otherwise warn, and say so in ``R.coverage``.
        logits: ``"all"``, or ``"target"`` to compute logits at the target's positions alone; can be
            given to each call as well.

    Raises:
        InputError: rules cannot be attached to the model, or another thread has a session open on
            it.

    Examples:
        >>> s = lenslrp.session(model)
        >>> logits, R = s.run_with_relevance("The capital of France is", " Paris")
        >>> s.close()
    """
    return Session(
        model, composite, attention=attention, checkpoint=checkpoint, ledger=ledger, strict=strict,
        logits=logits,
    )  # fmt: skip
