"""Rules held on one model across calls: attached once, checked before every call, detached once.

Sessions hold them; what a call does under them is `lenslrp.sessions`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch

from lenslrp.batch import Batch
from lenslrp.errors import InputError
from lenslrp.hooks.composites import Composite
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.install import Rules, require_bridge
from lenslrp.hooks.readers import Readers
from lenslrp.hooks.sites import Accounts
from lenslrp.hooks.structure import unchanged
from lenslrp.hooks.turns import Turn, turn, turns_of
from lenslrp.logits import Columns
from lenslrp.passes import Pass, under_rules
from lenslrp.reductions import Reduce, reduction_for

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class HeldRules:
    """Rules that stay on a model until they are released, and are attached anew when it changes.

    Args:
        model: a ``TransformerBridge``.
        composite: the table of rules.
        attention: ``"bridge"`` or ``"fused"``.
        ledger: account for relevance from the start.
        stays: the model is kept from other threads between the calls; without it, threads wait
            for each other's blocks.

    Attributes:
        rules: those in force.
        closed: whether they have been released for good.
    """

    def __init__(
        self,
        model: TransformerBridge,
        composite: Composite,
        attention: str,
        *,
        ledger: bool,
        stays: bool,
    ) -> None:
        self.model, self.stays, self.closed = model, stays, False
        self.rules = Rules(model, composite, attention, Accounts() if ledger else None)
        self._fresh = False  # nothing can have changed since the rules were attached
        self._readers: Readers | None = None
        self._request: Any = None  #: the names and the reduction that they are for
        self._block: Turn | None = None
        self._release: weakref.finalize[..., HeldRules] | None = None
        require_bridge(model)
        with unchanged(model):
            self._hold()

    def close(self) -> None:
        """Detach everything; a second call does nothing."""
        self.closed = True
        if self._release is not None:
            self._release()

    def _hold(self) -> None:
        """Attach the rules, and see to it that they are detached whatever becomes of this."""
        turns, block = turns_of(self.model), Turn(self.rules, stays=self.stays)
        self._block = block
        self._release = weakref.finalize(self, turns.end, block)
        try:
            turns.begin(block)
        except BaseException:
            self._release()
            raise
        self._fresh = not self.stays  # then the call follows at once

    @contextmanager
    def calling(self) -> Iterator[None]:
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
        rules, opener = self.rules, self.rules.holder.thread
        with turn(self.model, rules, within=self._block):
            try:
                rules.holder.thread = get_ident()
                if not self._fresh and not rules.current:
                    require_bridge(self.model)
                    self._renew()
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

    def _renew(self) -> None:
        self.rules.sites = []  # others, maybe
        turns_of(self.model).renew(self.rules)

    def fit(self, *, accounts: bool, copies: bool) -> None:
        """Attach the rules anew where they keep other things than the next pass needs."""
        rules = self.rules
        if (rules.accounts is not None) != accounts or rules.copies != copies:
            rules.accounts = Accounts() if accounts else None
            rules.copies = copies
            self._renew()

    def readers(self, names: list[str], reduce: Reduce) -> Readers:
        """Readers of hook points; the same ones stay attached for calls that ask for the same."""
        rules, kept, request = self.rules, self._readers, (names, reduce)
        if kept is not None and kept.state is rules.state and self._request == request:
            return kept
        readers = Readers.plan(rules.points, names, partial(reduction_for, reduce))
        named = reduce is None or isinstance(reduce, str)  # others hold what they do
        stay = self.stays and named
        if stay or kept is not None:
            rules.keep(readers if stay else None)
        self._request, self._readers = request, readers if stay else None
        return readers

    @contextmanager
    def forward(
        self,
        batch: Batch,
        latent: list[str],
        columns: Columns | None,
        *,
        at_nodes: Callable[[Attached, Pass], None] | None,
        rows: bool,
    ) -> Iterator[Pass]:
        """A forward pass in which nothing is read: see `lenslrp.passes.under_rules`.

        Args:
            batch: what the model reads.
            latent: hook points whose units are targets.
            columns: where logits are computed.
            at_nodes: attaches what else belongs to the pass.
            rows: account for relevance row by row.
        """
        rules, readers = self.rules, Readers.plan({}, [], lambda _: None)
        self.fit(accounts=rows, copies=rules.copies)
        if rules.accounts is not None:
            rules.accounts.rows = len(batch.tokens)
        try:
            with under_rules(
                self.model, rules, batch, readers, latent=latent, columns=columns, at_nodes=at_nodes
            ) as run:
                yield run
        finally:
            if rules.accounts is not None:
                rules.accounts.rows = None
